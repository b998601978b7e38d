"""The TensorRT targets, `tensorrt` and `tensorrt-rtx`: one builder and one session for two Python modules of the same API."""
