"""Tensor and expert parallelism: which rank holds what, each rank's weights, and each rank's graph."""
