"""Rows of image features in the places of tokens' embeddings (facts, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("mxcompile::place_images", mutates_args=())
def place_images(x_BTD: Tensor, features_MD: Tensor, positions_BT: Tensor) -> Tensor:
    """The embeddings, with row `positions` of the features instead where `positions` is not negative.

    Args:
        x_BTD: embeddings of tokens.
        features_MD: same dtype, M >= 1.
        positions_BT: int64, -1 .. M - 1.

    Returns:
        [B, T, D], same dtype.
    """
    images_BTD = torch.nn.functional.embedding(positions_BT.clamp(min=0), features_MD)
    return torch.where((positions_BT < 0).unsqueeze(-1), x_BTD, images_BTD)


@place_images.register_fake
def _(x_BTD: Tensor, features_MD: Tensor, positions_BT: Tensor) -> Tensor:
    return torch.empty_like(x_BTD)
