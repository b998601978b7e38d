"""Measuring engines beside PyTorch and transformers: times, memory, layer kinds, and long-context agreement."""
