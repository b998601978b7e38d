"""Causal grouped-query softmax attention over a cache (facts, 2.4).

Legend: B batch, H query heads, G key/value heads, T new tokens, S cache capacity, K channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mxcompile::softmax_attention", mutates_args=())
def softmax_attention(q_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, past_lengths_B: Tensor) -> Tensor:
    """Query i of row b sees cache positions 0 .. past_lengths[b] + i; scale 1/sqrt(K); softmax in fp32 (fp64 for fp64).

    Args:
        q_BHTK: queries after rotary embedding.
        key_BGSK, value_BGSK: caches that already hold the T new tokens; kv head g serves query heads g*H/G .. (g+1)*H/G - 1.
        past_lengths_B: int64, tokens that were in the cache before this call.

    Returns:
        [B, H, T, K], dtype of q.
    """
    batch, heads, tokens, width = q_BHTK.shape
    kv_heads = key_BGSK.shape[1]
    # Nothing past the longest row is looked at, whatever the capacity.
    seen = int(past_lengths_B.max()) + tokens if batch else 0
    key_BGSK, value_BGSK = key_BGSK[:, :, :seen], value_BGSK[:, :, :seen]
    q_BGqTK = q_BHTK.reshape(batch, kv_heads, heads // kv_heads, tokens, width)
    last_seen_BT = past_lengths_B.unsqueeze(1) + torch.arange(tokens, device=q_BHTK.device)
    hidden_BTS = torch.arange(seen, device=q_BHTK.device) > last_seen_BT.unsqueeze(-1)
    wide = torch.float64 if q_BHTK.dtype == torch.float64 else torch.float32
    scores = (q_BGqTK @ key_BGSK.unsqueeze(2).transpose(-1, -2)).to(wide) * width**-0.5
    weights = scores.masked_fill(hidden_BTS[:, None, None], float("-inf")).softmax(-1).to(q_BHTK.dtype)
    return (weights @ value_BGSK.unsqueeze(2)).reshape(batch, heads, tokens, width)


@softmax_attention.register_fake
def _(q_BHTK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, past_lengths_B: Tensor) -> Tensor:
    return torch.empty_like(q_BHTK)
