"""Triton Inference Server: the model repository, and starting the server on it."""
