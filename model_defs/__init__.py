"""Single-device PyTorch definitions of the MiniMax-Text-01 family, their configuration and their checkpoints.

This package knows none of the others. `config` and `presets` need neither torch nor numpy, so that the command line can read a
checkpoint's architecture without loading them.
"""
