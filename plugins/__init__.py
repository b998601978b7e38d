"""The CUDA plugin library: its build, what it offers, and how to call it with and without TensorRT."""
