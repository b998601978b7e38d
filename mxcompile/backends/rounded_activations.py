"""The PyTorch definition with activations in int8 where a quantized engine has them: products with quantized weights.

An engine built with `--quantize` rounds what goes into such a product to 127 steps of the largest magnitude in each block of a token's
channels. This is that, in plain PyTorch: what such an engine may differ from exact activations by is measured with it.

Shape suffixes: B batch, T tokens, N = B * T, K channels, k chosen experts, n tokens of an expert, E experts, D hidden.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

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
            module.forward = functools.partial(_experts, module, WHOLE[quantize].block)  # type: ignore[method-assign]
        scheme = block_scheme(name, quantize) if isinstance(module, Weight) else None
        if scheme is not None and module.weight.dim() == 2:
            module.linear = module.linear_wide = functools.partial(_linear, module, scheme.block)


def _linear(module: Weight, block: int, x: Tensor) -> Tensor:
    wide = wide_dtype(x.dtype)
    return torch.nn.functional.linear(rounded(x.to(wide), block), module.weight.to(wide))


def _experts(module: MixtureOfExperts, block: int, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """As `MixtureOfExperts.forward`; the formula is that of `model_defs.ops.moe`."""
    router_BTE = module.gate.linear_wide(x_BTD)
    weights_Nk, chosen_Nk = router_BTE.flatten(0, 1).topk(module.top_k, dim=-1)
    weights_Nk = weights_Nk.softmax(-1)
    x_ND = rounded(x_BTD.flatten(0, 1), block)
    output_ND = torch.zeros_like(x_ND)
    for expert in chosen_Nk.unique().tolist():
        token, slot = (chosen_Nk == expert).nonzero(as_tuple=True)
        fused = x_ND[token] @ module.fc1.weight[expert].T
        inner = rounded(torch.nn.functional.silu(fused[:, 0::2]) * fused[:, 1::2], block)
        output_ND.index_add_(0, token, (inner @ module.fc2.weight[expert].T) * weights_Nk[token, slot].unsqueeze(-1))
    return output_ND.reshape(x_BTD.shape), router_BTE
