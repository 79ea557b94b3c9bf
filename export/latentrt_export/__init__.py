"""The exporter of checkpoints to bundles. The extra `export` has its requirements (torch, diffusers, transformers)."""

from latentrt.telemetry import opt_out

opt_out()  # before a module of this package imports one of those
