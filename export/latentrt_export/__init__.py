"""The exporter, which converts checkpoints to bundles. Needs the extra `export`: torch, diffusers, transformers, onnx."""
