"""CUDA without torch: memory, streams, graphs and the device-resident loop."""
