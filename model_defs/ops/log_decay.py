"""The decay of a lightning layer, per token and head.

An operator of its own because the slopes are numbers of the graph, not weights: tracing without real tensors must keep their values.

Legend: B batch, T tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("mxcompile::log_decay", mutates_args=())
def log_decay(valid_BT1: Tensor, slopes: Sequence[float]) -> Tensor:
    """-slope of each head on valid tokens, 0 on padding, so that padding keeps a state as it is.

    Args:
        valid_BT1: 1 for a token, 0 for padding; fp32 or fp64.
        slopes: H fp32 values (`constants.decay_slopes`).

    Returns:
        [B, T, H], dtype of valid.
    """
    return valid_BT1 * -torch.tensor(slopes, dtype=valid_BT1.dtype, device=valid_BT1.device)


@log_decay.register_fake
def _(valid_BT1: Tensor, slopes: Sequence[float]) -> Tensor:
    return valid_BT1.new_empty((*valid_BT1.shape[:2], len(slopes)))
