"""Limits of the engines that the TensorRT tests build."""

LIMITS = {"max_batch_size": 2, "max_seq_len": 96, "prefill_chunk": 16}
