"""Rotary embedding of the leading channels of each head, rotate-half style (facts, 2.4).

Legend: B batch, H heads, T tokens, K channels of a head, R half of the rotary channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("mxcompile::rotary_angles", mutates_args=())
def rotary_angles(positions_BT: Tensor, frequencies: Sequence[float]) -> Tensor:
    """position * frequency, in fp32 whatever the model's dtype: the original multiplies fp32 by fp32, so the rounding belongs
    to the model.

    Args:
        positions_BT: int64, absolute positions.
        frequencies: R fp32 values (`constants.rotary_frequencies`).

    Returns:
        fp32 [B, T, R], radians.
    """
    frequencies_R = torch.tensor(frequencies, dtype=torch.float32, device=positions_BT.device)
    return positions_BT.float().unsqueeze(-1) * frequencies_R


@rotary_angles.register_fake
def _(positions_BT: Tensor, frequencies: Sequence[float]) -> Tensor:
    return positions_BT.new_empty((*positions_BT.shape, len(frequencies)), dtype=torch.float32)


@torch.library.custom_op("mxcompile::rotary_embedding", mutates_args=())
def rotary_embedding(x_BHTK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + R), i < R, by the given angles; channels from 2R on pass unchanged.

    Args:
        x_BHTK: queries or keys, fp32 or fp64.
        cos_BTR, sin_BTR: cosine and sine per token and pair, dtype of x.

    Returns:
        [B, H, T, K], dtype of x.
    """
    half = cos_BTR.shape[-1]
    cos, sin = cos_BTR.unsqueeze(1), sin_BTR.unsqueeze(1)
    first, second, rest = x_BHTK[..., :half], x_BHTK[..., half : 2 * half], x_BHTK[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


@rotary_embedding.register_fake
def _(x_BHTK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    return torch.empty_like(x_BHTK)
