"""A checkpoint becomes a bundle. Needs the `export` extra: torch, diffusers, transformers and onnx."""
