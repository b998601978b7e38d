"""Writing new keys or values behind the valid part of a cache.

Legend: B batch, G key/value heads, S capacity, T new tokens, K channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mxcompile::append_to_cache", mutates_args=())
def append_to_cache(cache_BGSK: Tensor, new_BGTK: Tensor, past_lengths_B: Tensor) -> Tensor:
    """A copy of the cache in which row b holds its T new entries at positions past_lengths[b] onwards.

    Args:
        cache_BGSK: S >= past_lengths[b] + T for every row.
        new_BGTK: dtype of the cache. Entries of padding tokens are written too; they lie past the row's valid length,
            where the next call overwrites them and causal attention never looks.
        past_lengths_B: int64.

    Returns:
        [B, G, S, K], dtype of the cache.
    """
    tokens = new_BGTK.shape[2]
    positions_BT = past_lengths_B.unsqueeze(1) + torch.arange(tokens, device=cache_BGSK.device)
    return cache_BGSK.scatter(2, positions_BT[:, None, :, None].expand_as(new_BGTK), new_BGTK)


@append_to_cache.register_fake
def _(cache_BGSK: Tensor, new_BGTK: Tensor, past_lengths_B: Tensor) -> Tensor:
    return torch.empty_like(cache_BGSK)
