"""A bundle becomes TensorRT engines, one set for each GPU. Holds no code yet: the runtime runs bundles on ONNX
Runtime."""
