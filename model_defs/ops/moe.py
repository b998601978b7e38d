"""Routed SwiGLU experts (facts, 2.5).

Legend: B batch, T tokens, N = B * T, n tokens of one expert, D hidden, E experts, I inner width of an expert, J = 2 * I.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ExpertProduct = Callable[[Tensor, int], Tensor]  # rows [n, channels] and an expert -> [n, rows of its matrix]


@torch.library.custom_op("mxcompile::mixture_of_experts", mutates_args=())
def mixture_of_experts(x_BTD: Tensor, router_logits_NE: Tensor, fc1_EJD: Tensor, fc2_EDI: Tensor, top_k: int) -> Tensor:
    """sum over the top_k experts e of w_e * w2_e( silu(w1_e x) * (w3_e x) ).

    The weights w are the softmax over all experts, cut to the top_k and divided by their sum.

    Args:
        x_BTD: tokens.
        router_logits_NE: fp32 (fp64 when x is).
        fc1_EJD: [E, 2I, D] with w1 (gate) and w3 (up) interleaved: row 2i is gate i, row 2i+1 is up i. This is the layout that
            com.microsoft::MoE calls swiglu_fusion=1.
        fc2_EDI: [E, D, I], w2.
        top_k: experts per token.

    Returns:
        [B, T, D], dtype of x.
    """
    return mix_experts(
        x_BTD, router_logits_NE, top_k, lambda x_nD, e: x_nD @ fc1_EJD[e].T, lambda x_nI, e: x_nI @ fc2_EDI[e].T
    )


@mixture_of_experts.register_fake
def _(x_BTD: Tensor, router_logits_NE: Tensor, fc1_EJD: Tensor, fc2_EDI: Tensor, top_k: int) -> Tensor:
    return torch.empty_like(x_BTD)


def mix_experts(x_BTD: Tensor, router_logits_NE: Tensor, top_k: int, fc1: ExpertProduct, fc2: ExpertProduct) -> Tensor:
    """As `mixture_of_experts`, whatever holds the experts' matrices: only those that some token chose are asked for."""
    probabilities_NE = router_logits_NE.softmax(-1)
    weights_Nk, chosen_Nk = probabilities_NE.topk(top_k, dim=-1)
    weights_Nk = (weights_Nk / weights_Nk.sum(-1, keepdim=True)).to(x_BTD.dtype)
    x_ND = x_BTD.flatten(0, 1)
    output_ND = torch.zeros_like(x_ND)
    for expert in chosen_Nk.unique().tolist():
        token, slot = (chosen_Nk == expert).nonzero(as_tuple=True)
        fused_nJ = fc1(x_ND[token], expert)
        inner_nI = torch.nn.functional.silu(fused_nJ[:, 0::2]) * fused_nJ[:, 1::2]
        output_ND.index_add_(0, token, fc2(inner_nI, expert) * weights_Nk[token, slot].unsqueeze(-1))
    return output_ND.reshape(x_BTD.shape)
