"""Checkpoints of the MiniMax-Text-01 family: reading without copies, verifying, and writing random ones. Needs no
torch.
"""
