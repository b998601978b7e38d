"""Weight-only quantization, symmetric and rounded to nearest.

Experts alone (`--quantize-experts`): int8 with one fp32 scale s = max |w| / 127 per output row. A weight w becomes round(w / s) and is
read back as that number times s.

The whole model (`--quantize`): one fp32 scale per block of neighbouring inputs of an output row. In 8 bits as above; in 4 bits the number
of the largest magnitude becomes -8, so s has the opposite sign of that weight, and all 16 numbers are used. A 4-bit model keeps its output
projection in 8 bits: its error goes to the logits undamped.

Scales depend on no other row, so a range of experts or of rows quantizes as the whole does.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class BlockScheme:
    """Weights of `bits` (8 or 4), one scale per `block` inputs of an output row."""

    bits: int
    block: int

    @property
    def zero(self) -> int:
        """The stored number that means 0."""
        return 1 << (self.bits - 1)

    def stored_width(self, columns: int) -> int:
        """Bytes of a row of so many weights."""
        return columns * self.bits // 8


WHOLE = {"int8": BlockScheme(8, 64), "int4": BlockScheme(4, 32)}
"""What `--quantize` knows. docs/quantization.md says what the block sizes rest on."""

# Embeddings are read one row per token, the router decides by small differences, norms are vectors: they stay as they are.
_QUANTIZED = ("qkv_proj", "output_gate", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "lm_head")


def block_scheme(name: str, quantize: str) -> BlockScheme | None:
    """How the parameter `name` of `TextModel` is stored in a model quantized as `quantize` (of WHOLE); None: not quantized."""
    owner = name.removesuffix(".weight").rpartition(".")[2]
    if owner not in _QUANTIZED or not name.startswith(("layers.", "lm_head")):
        return None
    return WHOLE["int8"] if owner == "lm_head" else WHOLE[quantize]


def quantize_blocks(weight_RC: NDArray, scheme: BlockScheme) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantize [rows, columns] of any float type; columns must be a multiple of the block.

    Returns the stored numbers, uint8 [rows, blocks, block * bits / 8] with the first of two 4-bit numbers in the lower half of a byte, and
    the scales, float32 [rows, blocks]. A block of zeros gets the scale 1. Raises ValueError where a weight is not finite.
    """
    rows, columns = weight_RC.shape
    if columns % scheme.block:
        raise ValueError(f"{columns} columns are no multiple of the block size {scheme.block}")
    blocks = columns // scheme.block
    stored = np.empty((rows, blocks, scheme.stored_width(scheme.block)), np.uint8)
    scales_RB = np.empty((rows, blocks), np.float32)
    low = -scheme.zero if scheme.bits == 4 else -LEVELS
    for start in range(0, rows, _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        wide = weight_RC[part].astype(np.float32).reshape(-1, blocks, scheme.block)
        largest = np.take_along_axis(wide, np.abs(wide).argmax(-1)[..., None], -1)[..., 0]
        if not np.isfinite(wide).all():
            raise ValueError("a weight is not finite")
        scale = np.abs(largest) / np.float32(LEVELS) if scheme.bits == 8 else largest / np.float32(low)
        scale[scale == 0] = 1
        scales_RB[part] = scale
        wide /= scale[..., None]
        numbers = np.clip(np.rint(wide, out=wide), low, scheme.zero - 1, out=wide).astype(np.int16) + scheme.zero
        unsigned = numbers.astype(np.uint8)
        stored[part] = unsigned if scheme.bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
    return stored, scales_RB


def dequantize_blocks(
    stored: NDArray[np.uint8], scales_RB: NDArray[np.float32], scheme: BlockScheme
) -> NDArray[np.float32]:
    """What the weights are taken for, float32 [rows, columns]; arguments as `quantize_blocks` returns them."""
    numbers = stored
    if scheme.bits == 4:
        numbers = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*scales_RB.shape, scheme.block)
    wide = (numbers.astype(np.float32) - np.float32(scheme.zero)) * scales_RB[..., None]
    return wide.reshape(len(stored), -1)


def rounded_blocks(weight_RC: NDArray, scheme: BlockScheme) -> NDArray[np.float32]:
    """`weight_RC` quantized and read back, float32 [rows, columns]."""
    return dequantize_blocks(*quantize_blocks(weight_RC, scheme), scheme)
