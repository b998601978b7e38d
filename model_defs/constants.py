"""Numbers that are part of the model but not of its weights: decay slopes and rotary frequencies (facts, 2.3 and 2.4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model_defs.config import ModelConfig
from model_defs.errors import ConfigError


def decay_slopes(config: ModelConfig, layer: int) -> NDArray[np.float32]:
    """Slope s of every head in one layer; a token fades the head's state by exp(-s).

    s = 2^(-8 (h + 1) / H) * (1 - layer / (L - 1) + 1e-5), the first factor rounded to fp32 and multiplied by a double, as the
    original does. `layer` counts all layers, not only lightning ones, and L is the full model's depth.

    Args:
        config: H heads, a power of two, and `slope_layers`.
        layer: global index, from 0.

    Returns:
        fp32 [H], all positive.
    """
    heads = config.num_attention_heads
    if heads & (heads - 1):
        raise ConfigError(f"num_attention_heads must be a power of two for the decay slopes, not {heads}")
    base = np.array([2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)], dtype=np.float32)
    depth_factor = 1 - layer / max(config.slope_layers - 1, 1) + 1e-5
    return base * np.float32(depth_factor)


def rotary_frequencies(rotary_dim: int, theta: float) -> NDArray[np.float32]:
    """theta^(-2 i / rotary_dim) for i < rotary_dim / 2, in the original's order of fp32 operations: fp32 [rotary_dim / 2].

    Computed once and written into graphs as numbers: at position one million the last bit of a frequency is a visible angle, so
    no two runtimes may compute it for themselves. The power is rounded once, from fp64: numpy's own of fp32 was seen off by
    two bits, in its vectorized form only, so it need not be the same on every processor.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    powers = (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers
