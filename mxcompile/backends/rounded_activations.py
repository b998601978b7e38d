"""The PyTorch definition with activations in int8 where a quantized engine has them: products with quantized weights.

An engine built with `--quantize` rounds what goes into such a product to 127 steps of the largest magnitude in each block of a token's
channels. This is that, in plain PyTorch: what such an engine may differ from exact activations by is measured with it.

Shape suffixes: B batch, T tokens, N = B * T, K channels, n tokens of an expert, E experts, D hidden, I inner width of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from model_defs import ops
from model_defs.quantization import LEVELS, WHOLE, block_scheme
from model_defs.text_model import MixtureOfExperts, TextModel, Weight, wide_dtype


def rounded(x_K: Tensor, block: int) -> Tensor:
    """`x_K` [..., K] rounded to int8 by blocks of its last dimension, and read back."""
    blocks = x_K.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / LEVELS
    return (torch.round(blocks / scale.masked_fill(scale == 0, 1)) * scale).flatten(-2)


def round_activations(model: TextModel, quantize: str) -> None:
    """Let `model`, whose weights are rounded already, compute as an engine quantized so does; in place."""
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            module.mix = functools.partial(_mix, module, WHOLE[quantize].block)  # type: ignore[method-assign]
        scheme = block_scheme(name, quantize) if isinstance(module, Weight) else None
        if scheme is not None and not name.endswith((".fc1", ".fc2")):
            module.linear = module.linear_wide = functools.partial(_linear, module.linear_wide, scheme.block)


def _linear(exact: Callable[[Tensor], Tensor], block: int, x: Tensor) -> Tensor:
    return exact(rounded(x.to(wide_dtype(x.dtype)), block))


def _mix(module: MixtureOfExperts, block: int, x_BTD: Tensor, router_NE: Tensor) -> Tensor:
    """As `MixtureOfExperts.mix`, with what goes into both products rounded."""
    return ops.mix_experts(
        x_BTD,
        router_NE,
        module.top_k,
        lambda x_nD, expert: module.fc1.linear_of(rounded(x_nD, block), expert),
        lambda inner_nI, expert: module.fc2.linear_of(rounded(inner_nI, block), expert),
    )
