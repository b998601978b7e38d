"""Root-mean-square normalisation with the rounding order of the original (facts, 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mxcompile::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * cast(x / sqrt(mean(x^2) + eps)), over the last axis.

    Args:
        x: [..., D], any floating dtype; the mean and the division run in fp32 (fp64 for fp64).
        weight: [D], dtype of x.
        eps: added to the mean of squares.

    Returns:
        [..., D], dtype of x: the normalised value is rounded to x's dtype before the weight multiplies it.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)
