"""The vision half of MiniMax-VL-01: vision tower (CLIP's ViT), projector, and the packing of tiles (facts, 1.3, 3.2 and 5).

Parameters have the names of the published checkpoint.

Legend: N tiles, C colour channels, Y X pixels of a tile, Q patches of a tile, P = Q + 1 (the class token first), V vision width,
H heads, K channels of a head, D hidden size of the text model, M = N * Q + 1 feature rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_defs import anyres
from model_defs.text_model import Weight
from model_defs.vision_config import VisionConfig


def activation(name: str, x: Tensor) -> Tensor:
    """One of `vision_config.ACTIVATIONS`."""
    return nn.functional.gelu(x) if name == "gelu" else x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Patches of a tile as vectors, the class vector before them, and learned absolute positions added."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype), requires_grad=False)
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, patch, bias=False, dtype=dtype)
        self.position_embedding = Weight(config.patches + 1, width, dtype=dtype)

    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        patches_NQV = self.patch_embedding(pixels_NCYX).flatten(2).transpose(1, 2)
        class_N1V = self.class_embedding.expand(pixels_NCYX.shape[0], 1, -1)
        return torch.cat([class_N1V, patches_NQV], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Softmax attention of all patches of a tile to all."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.head_dim = config.num_attention_heads, width // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width, dtype=dtype) for _ in range(4))

    def forward(self, x_NPV: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

        q_NHPK, k_NHPK, v_NHPK = (heads(proj(x_NPV)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        scores_NHPP = torch.matmul(q_NHPK * self.head_dim**-0.5, k_NHPK.transpose(-1, -2))
        mixed_NHPK = torch.matmul(torch.softmax(scores_NHPP, dim=-1), v_NHPK)
        return self.out_proj(mixed_NHPK.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.act = config.hidden_act
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, dtype=dtype)

    def forward(self, x_NPV: Tensor) -> Tensor:
        return self.fc2(activation(self.act, self.fc1(x_NPV)))


class EncoderLayer(nn.Module):
    """Pre-norm: the residual carries the un-normed stream, unlike the text model's."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype) for _ in range(2)
        )
        self.self_attn, self.mlp = Attention(config, dtype), FeedForward(config, dtype)

    def forward(self, x_NPV: Tensor) -> Tensor:
        x_NPV = x_NPV + self.self_attn(self.layer_norm1(x_NPV))
        return x_NPV + self.mlp(self.layer_norm2(x_NPV))


class Tower(nn.Module):
    """The ViT up to the layer whose output is taken; there is no norm behind it."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, dtype)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=dtype)
        self.encoder = nn.Module()  # only for the published names
        self.encoder.layers = nn.ModuleList(EncoderLayer(config, dtype) for _ in range(config.layers_used))

    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """Features of the patches [N, Q, V], the class token dropped."""
        x_NPV = self.pre_layrnorm(self.embeddings(pixels_NCYX))
        for layer in self.encoder.get_submodule("layers").children():
            x_NPV = layer(x_NPV)
        return x_NPV[:, 1:]


class Projector(nn.Module):
    """From the tower's width to the text model's, in two linear layers."""

    def __init__(self, config: VisionConfig, out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.act = config.projector_act
        self.linear_1 = nn.Linear(config.hidden_size, out, config.projector_bias, dtype=dtype)
        self.linear_2 = nn.Linear(out, out, config.projector_bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(activation(self.act, self.linear_1(x)))


class VisionModel(nn.Module):
    """Tiles to rows that take the place of token embeddings in the text model."""

    def __init__(self, config: VisionConfig, text_hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = nn.ModuleDict({"vision_model": Tower(config, dtype)})
        self.multi_modal_projector = Projector(config, text_hidden_size, dtype)
        self.image_newline = nn.Parameter(torch.empty(text_hidden_size, dtype=dtype), requires_grad=False)

    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """Projected features of all patches, tile by tile and row by row, and the newline as the last row: [M, D].

        `pixels_NCYX`: normalised RGB tiles [N, 3, image_size, image_size] in the model's dtype.
        """
        features_NQD = self.multi_modal_projector(self.vision_tower["vision_model"](pixels_NCYX))
        return torch.cat([features_NQD.flatten(0, 1), self.image_newline.unsqueeze(0)])

    def pack(self, rows_MD: Tensor, size: anyres.Size) -> Tensor:
        """What one image of `size` (height, width) puts into the prompt, [image_tokens, D]: its thumbnail (the first tile), then
        the other tiles put together again, what was padding left out, and the newline behind every row.
        """
        config, side, newline_D = self.config, self.config.patches_per_side, rows_MD[-1]
        tile_NQD = rows_MD[:-1].unflatten(0, (-1, config.patches))
        grid = anyres.tile_grid(size, config)
        if len(tile_NQD) != 1 + grid[0] * grid[1]:
            raise ValueError(
                f"an image of {size} has a thumbnail and {grid[0]} x {grid[1]} tiles, not {len(tile_NQD)} in all"
            )
        map_YXD = tile_NQD[1:].unflatten(1, (side, side)).unflatten(0, grid).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        rows, columns = anyres.padding(size, (map_YXD.shape[0], map_YXD.shape[1]))
        map_YXD = map_YXD[rows : map_YXD.shape[0] - rows, columns : map_YXD.shape[1] - columns]
        newlines_Y1D = newline_D.expand(map_YXD.shape[0], 1, -1)
        return torch.cat([tile_NQD[0], torch.cat([map_YXD, newlines_Y1D], dim=1).flatten(0, 1)])
