"""The engine builder: TensorRT engines from a bundle, for this machine's GPU or for other GPUs."""
