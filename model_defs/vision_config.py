"""The vision half of MiniMax-VL-01 as one frozen record, read from and written to the published configuration (facts, 1.3 and 5).

Nothing is taken from a class default where released programs disagree about it: which layer's features are taken, and whether the
class token is dropped, must stand in the file.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from model_defs.errors import ConfigError

ACTIVATIONS = ("gelu", "quick_gelu")  # exact (erf) GELU, and x * sigmoid(1.702 x)
PUBLISHED_TILE = 336
# Height and width in tiles of the resolutions that an image may be brought to, in the published order.
PUBLISHED_GRIDS = tuple(
    (height, width)
    for height, widths in ((1, 6), (2, 6), (3, 6), (4, 4), (5, 3), (6, 3))
    for width in range(1, widths + 1)
)
_LARGEST_COUNT = 1 << 20
_MOST_TILES = 64  # of one resolution; the published ones have 18 at most


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of the vision tower and the projector. Widths in elements, image sizes in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # side of a tile
    patch_size: int
    hidden_act: str
    feature_layer: int  # index into the embeddings (0) and the outputs of all layers; negative: from the end
    projector_act: str
    projector_bias: bool
    image_token_id: int
    grid_pinpoints: tuple[tuple[int, int], ...]  # resolutions (height, width) that are cut into tiles
    num_channels: int = 3
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size num_channels"
        for key in sizes.split():
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_COUNT:
                raise ConfigError(f"vision_config.{key} must be a positive whole number, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config.hidden_size ({self.hidden_size}) must be a multiple of its num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision_config.image_size ({self.image_size}) must be a multiple of its patch_size ({self.patch_size})"
            )
        if self.num_channels != 3:
            raise ConfigError(f"vision_config.num_channels must be 3 (RGB), not {self.num_channels}")
        for key, act in (("vision_config.hidden_act", self.hidden_act), ("projector_hidden_act", self.projector_act)):
            if act not in ACTIVATIONS:
                raise ConfigError(f"{key} {act!r} is not supported; known: {', '.join(ACTIVATIONS)}")
        if not isinstance(self.projector_bias, bool):
            raise ConfigError(f"multimodal_projector_bias must be true or false, not {self.projector_bias!r}")
        eps = self.layer_norm_eps
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < 1:
            raise ConfigError(f"vision_config.layer_norm_eps must be between 0 and 1, not {eps!r}")
        layers = self.num_hidden_layers
        layer = self.feature_layer
        if not isinstance(layer, int) or isinstance(layer, bool) or not -layers - 1 <= layer <= layers:
            raise ConfigError(
                f"vision_feature_layer must be one number between {-layers - 1} and {layers}, not {layer!r}"
            )
        _check_pinpoints(self.grid_pinpoints, self.image_size)

    @property
    def layers_used(self) -> int:
        """How many layers run: those behind the one whose output is taken do not matter."""
        return self.feature_layer if self.feature_layer >= 0 else self.num_hidden_layers + 1 + self.feature_layer

    @property
    def patches_per_side(self) -> int:
        """Patches along each side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches, and so feature rows, of a tile."""
        return self.patches_per_side**2

    def tensors(self, text_hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of the vision half with its shape, by published name (facts, 3.2)."""
        d, inner, out = self.hidden_size, self.intermediate_size, text_hidden_size
        tower = "vision_tower.vision_model"
        shapes: dict[str, tuple[int, ...]] = {
            f"{tower}.embeddings.class_embedding": (d,),
            f"{tower}.embeddings.patch_embedding.weight": (d, self.num_channels, self.patch_size, self.patch_size),
            f"{tower}.embeddings.position_embedding.weight": (self.patches + 1, d),
            f"{tower}.pre_layrnorm.weight": (d,),  # so misspelt in CLIP
            f"{tower}.pre_layrnorm.bias": (d,),
        }
        for layer in range(self.num_hidden_layers):
            here = f"{tower}.encoder.layers.{layer}"
            matrices = {f"self_attn.{part}_proj": (d, d) for part in "qkv"} | {
                "self_attn.out_proj": (d, d),
                "mlp.fc1": (inner, d),
                "mlp.fc2": (d, inner),
            }
            for part in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{here}.{part}.weight": (d,), f"{here}.{part}.bias": (d,)}
            for part, shape in matrices.items():
                shapes |= {f"{here}.{part}.weight": shape, f"{here}.{part}.bias": shape[:1]}
        for part, shape in {"linear_1": (out, d), "linear_2": (out, out)}.items():
            shapes[f"multi_modal_projector.{part}.weight"] = shape
            if self.projector_bias:
                shapes[f"multi_modal_projector.{part}.bias"] = shape[:1]
        shapes["image_newline"] = (out,)
        return shapes

    def parameter_counts(self, text_hidden_size: int) -> dict[str, int]:
        """Parameters by part, in elements."""
        counts = {"vision tower": 0, "projector": 0}
        for name, shape in self.tensors(text_hidden_size).items():
            counts["vision tower" if name.startswith("vision_tower.") else "projector"] += math.prod(shape)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` restores an equal record."""
        return dataclasses.asdict(self) | {"grid_pinpoints": [list(pair) for pair in self.grid_pinpoints]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VisionConfig:
        """Inverse of `to_dict`. Raises ConfigError on a missing or unknown key."""
        try:
            return cls(**(values | {"grid_pinpoints": tuple(tuple(pair) for pair in values["grid_pinpoints"])}))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"incomplete description of the vision half: {error}") from error


def read_vision(outer: dict[str, Any], vocab_size: int) -> VisionConfig | None:
    """The vision half that MiniMax-VL-01's config.json describes, or None when it has no `vision_config`: then only the text model
    is there.

    Raises ConfigError naming the key that is missing or of a value that this definition does not have.
    """
    inner = outer.get("vision_config")
    if inner is None:
        return None
    if not isinstance(inner, dict):
        raise ConfigError("vision_config must be an object")
    if inner.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise ConfigError(
            f"vision_config.model_type {inner['model_type']!r} is not supported; it must be clip_vision_model"
        )

    def need(values: dict[str, Any], key: str, where: str = "", why: str = "") -> Any:
        if values.get(key) is None:
            raise ConfigError(f"required key {where}{key} is missing" + (f": {why}" if why else ""))
        return values[key]

    for key, only in (("process_image_mode", "anyres"), ("vision_feature_select_strategy", "default")):
        why = "programs for this model differ in its default" if key != "process_image_mode" else "it must be anyres"
        if (value := need(outer, key, why=why)) != only:
            raise ConfigError(f"{key} {value!r} is not supported; the published model has {only}")
    if outer.get("img_token_compression_config"):
        raise ConfigError("img_token_compression_config is not supported; MiniMax-VL-01 has none")
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size hidden_act"
    found = {key: need(inner, key, "vision_config.") for key in sizes.split()}
    token = outer["image_token_index"] if outer.get("image_token_index") is not None else outer.get("image_token_id")
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
        raise ConfigError(f"image_token_index must be a token id below vocab_size ({vocab_size}), not {token!r}")
    config = VisionConfig(
        **found,
        num_channels=inner.get("num_channels", 3),
        layer_norm_eps=inner.get("layer_norm_eps", 1e-5),
        feature_layer=need(outer, "vision_feature_layer", why="programs for this model differ in its default"),
        projector_act=need(outer, "projector_hidden_act"),
        projector_bias=need(outer, "multimodal_projector_bias"),
        image_token_id=token,
        grid_pinpoints=_pairs(need(outer, "image_grid_pinpoints")),
    )
    stated = outer.get("image_seq_length")
    if stated not in (None, config.patches):
        raise ConfigError(f"image_seq_length is {stated!r}, but a tile has {config.patches} patches")
    return config


def vision_to_schema(config: VisionConfig, text_hidden_size: int) -> dict[str, Any]:
    """The keys of config.json that describe `config`, as MiniMax-VL-01 has them."""
    return {
        "ignore_index": -100,
        "image_grid_pinpoints": [list(pair) for pair in config.grid_pinpoints],
        "image_seq_length": config.patches,
        "image_token_index": config.image_token_id,
        "multimodal_projector_bias": config.projector_bias,
        "process_image_mode": "anyres",
        "projector_hidden_act": config.projector_act,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": config.hidden_act,
            "hidden_size": config.hidden_size,
            "image_size": config.image_size,
            "initializer_range": 0.02,
            "intermediate_size": config.intermediate_size,
            "layer_norm_eps": config.layer_norm_eps,
            "model_type": "clip_vision_model",
            "num_attention_heads": config.num_attention_heads,
            "num_channels": config.num_channels,
            "num_hidden_layers": config.num_hidden_layers,
            "patch_size": config.patch_size,
            "projection_dim": text_hidden_size,
        },
    }


def _pairs(value: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ConfigError("image_grid_pinpoints must list pairs of height and width")
    return tuple((pair[0], pair[1]) for pair in value)


def _check_pinpoints(pairs: tuple[tuple[int, int], ...], tile: int) -> None:
    if not pairs or len(pairs) > 1024:
        raise ConfigError(f"image_grid_pinpoints must hold between 1 and 1024 resolutions, not {len(pairs)}")
    for pair in pairs:
        for side in pair:
            if not isinstance(side, int) or isinstance(side, bool) or side < tile or side % tile:
                raise ConfigError(
                    f"image_grid_pinpoints has {list(pair)}; sides must be multiples of image_size ({tile})"
                )
        if pair[0] * pair[1] > _MOST_TILES * tile * tile:
            raise ConfigError(f"image_grid_pinpoints has {list(pair)}, which is more than {_MOST_TILES} tiles")
    # The released processor reads a pair as width, height and the model as height, width; both agree only on closed lists.
    if lone := [pair for pair in pairs if pair[::-1] not in pairs]:
        raise ConfigError(f"image_grid_pinpoints has {list(lone[0])} but not {list(lone[0][::-1])}; it needs both")
