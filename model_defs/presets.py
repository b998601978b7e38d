"""Named architectures: two small ones for tests and measurements, and the published models."""

from __future__ import annotations

import dataclasses
from typing import Any

from model_defs.config import LayerKind, ModelConfig, ResidualScale
from model_defs.errors import ConfigError
from model_defs.vision_config import PUBLISHED_GRIDS, PUBLISHED_TILE, VisionConfig


def hybrid_pattern(num_layers: int) -> tuple[LayerKind, ...]:
    """Seven lightning layers, then one softmax layer, repeated (facts, 1.1: attn_type_list)."""
    return tuple("softmax" if (i + 1) % 8 == 0 else "lightning" for i in range(num_layers))


def deepnorm_alpha(num_layers: int) -> float:
    """alpha = (2 L)^(1/4); 3.5565588200778455 for 80 layers (facts, 1.1)."""
    return (2 * num_layers) ** 0.25


def _hybrid(num_layers: int, *, family: str = "text-01", **sizes: Any) -> ModelConfig:
    scale = ResidualScale(deepnorm_alpha(num_layers), 1.0)
    return ModelConfig(
        family=family,
        layer_kinds=hybrid_pattern(num_layers),
        slope_layers=num_layers,
        lightning_scale=scale,
        softmax_scale=scale,
        mlp_scale=scale,
        rope_theta=1e7,
        **sizes,
    )


def _full_size(family: str) -> ModelConfig:
    return _hybrid(
        80,
        family=family,
        hidden_size=6144,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9216,
        num_local_experts=32,
        num_experts_per_tok=2,
        vocab_size=200064,
        rotary_dim=64,
        max_position_embeddings=10240000,
        eos_token_id=200020,
    )


def _tiny() -> ModelConfig:
    return _hybrid(
        8,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=512,
        rotary_dim=32,
        max_position_embeddings=65536,
        bos_token_id=509,
        eos_token_id=510,
    )


def _small() -> ModelConfig:
    # Text-01's proportions: query width 4/3 of hidden, inner width 3/2 of hidden, 32 experts, rotary on half of a head.
    return _hybrid(
        8,
        hidden_size=384,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=576,
        num_local_experts=32,
        num_experts_per_tok=2,
        vocab_size=16384,
        rotary_dim=32,
        max_position_embeddings=1048576,
        bos_token_id=16381,
        eos_token_id=16382,
    )


def _vision(tile: int, **sizes: Any) -> VisionConfig:
    """A vision half that takes the last layer's features and tiles images as the published one does."""
    return VisionConfig(
        image_size=tile,
        hidden_act="gelu",
        feature_layer=-1,
        projector_act="gelu",
        projector_bias=True,
        grid_pinpoints=tuple((rows * tile, columns * tile) for rows, columns in PUBLISHED_GRIDS),
        **sizes,
    )


def _with_vision(config: ModelConfig, vision: VisionConfig) -> ModelConfig:
    return dataclasses.replace(config, family="vl-01", tensor_prefix="language_model.", vision=vision)


def _tiny_vl() -> ModelConfig:
    # Tiles of 4 x 4 patches: images take 36 to 333 tokens.
    vision = _vision(
        28,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        patch_size=7,
        image_token_id=507,
    )
    return _with_vision(_tiny(), vision)


def _vl_01() -> ModelConfig:
    vision = _vision(
        PUBLISHED_TILE,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        image_token_id=200025,
    )
    return _with_vision(dataclasses.replace(_full_size("text-01"), max_position_embeddings=8192), vision)


_PRESETS = {
    "tiny": _tiny,
    "small": _small,
    "tiny-vl": _tiny_vl,
    "text-01": lambda: _full_size("text-01"),
    "m1": lambda: _full_size("m1"),
    "vl-01": _vl_01,
}
PRESET_NAMES: tuple[str, ...] = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The architecture called `name`: tiny (tests), small (about 180M parameters, measurements), tiny-vl (tiny with a small vision
    half), text-01, m1, vl-01.
    """
    if name not in _PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESET_NAMES)}")
    return _PRESETS[name]()
