"""A bundle becomes TensorRT engines: for the GPU of this machine, or for GPUs that are not there."""
