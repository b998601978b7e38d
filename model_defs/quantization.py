"""Weight-only quantization of experts: symmetric int8 with one fp32 scale per output row.

A weight w of a row becomes round(w / s) in -127 .. 127 with s = max |w| / 127, and is read back as that number times s. A row's scale
does not depend on other rows, so a range of experts or of rows quantizes as the whole does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INT8 = "int8"
SCHEMES = (INT8,)
LEVELS = 127
_BLOCK_ROWS = 1024  # rows that are widened at a time


def quantize_rows(weight_RC: NDArray, quantized_RC: NDArray[np.int8]) -> NDArray[np.float32]:
    """Fill `quantized_RC` from `weight_RC` [rows, columns] of any float type, and return the scales, float32 [rows].

    A row of zeros gets the scale 1. Raises ValueError where a weight is not finite.
    """
    scales_R = np.empty(len(weight_RC), np.float32)
    for start in range(0, len(weight_RC), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        wide = weight_RC[rows].astype(np.float32)
        largest = np.abs(wide).max(axis=1, initial=0.0)
        if not np.isfinite(largest).all():
            raise ValueError("a weight is not finite")
        scales_R[rows] = np.where(largest == 0, np.float32(1), largest / np.float32(LEVELS))
        wide /= scales_R[rows, None]
        np.clip(np.rint(wide, out=wide), -LEVELS, LEVELS, out=wide)
        quantized_RC[rows] = wide
    return scales_R


def dequantize_rows(quantized_RC: NDArray[np.int8], scales_R: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the weights are taken for, float32 [rows, columns]."""
    return quantized_RC.astype(np.float32) * scales_R[:, None]


def rounded_rows(weight_RC: NDArray) -> NDArray[np.float32]:
    """`weight_RC` quantized and read back, float32 [rows, columns]: the reference of a quantized engine computes with it."""
    quantized_RC = np.empty(weight_RC.shape, np.int8)
    return dequantize_rows(quantized_RC, quantize_rows(weight_RC, quantized_RC))
