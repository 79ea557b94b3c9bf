"""The exporter of checkpoints to bundles. The extra `export` has its requirements (torch, diffusers, transformers)."""
