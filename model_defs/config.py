"""The architecture of one model of the MiniMax-Text-01 family, as one frozen record.

`config_schemas.py` reads the published configuration files into it; the values are explained in
reference/minimax01-facts.md, sections 1 and 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from model_defs.errors import ConfigError
from model_defs.vision_config import VisionConfig

LayerKind = Literal["lightning", "softmax"]
LAYER_KINDS: tuple[LayerKind, ...] = ("lightning", "softmax")


def is_number(value: object) -> bool:
    """Whether it is a number that fp32 holds: no truth value, not infinite, not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


@dataclass(frozen=True)
class ResidualScale:
    """x_next = alpha * normed_input + beta * sublayer(normed_input)."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of the text model. All widths are in elements."""

    family: str  # "text-01", "m1" or "vl-01": which published model the configuration describes
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int  # of the softmax layers; lightning layers have as many as query heads
    head_dim: int
    intermediate_size: int  # inner width of one expert
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    layer_kinds: tuple[LayerKind, ...]  # one entry per built layer, layer 0 first
    slope_layers: int  # depth that the decay slopes are spread over; stays the full model's in a truncated build
    rotary_dim: int  # leading channels of a head that rotary embedding turns; the others pass
    rope_theta: float
    lightning_scale: ResidualScale
    softmax_scale: ResidualScale
    mlp_scale: ResidualScale
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6  # the class default of the original, not rms_norm_eps (facts, 2.3)
    tensor_prefix: str = ""  # "language_model." in MiniMax-VL-01 checkpoints
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    vision: VisionConfig | None = None  # the vision half of MiniMax-VL-01, where it is to be computed too

    def __post_init__(self) -> None:
        positive = (
            "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size num_local_experts "
            "num_experts_per_tok vocab_size slope_layers max_position_embeddings"
        ).split()
        for key in positive:
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{key} must be a positive whole number, not {value!r}")
        if not self.layer_kinds:
            raise ConfigError("the configuration has no layers")
        for index, kind in enumerate(self.layer_kinds):
            if kind not in LAYER_KINDS:
                raise ConfigError(f"layer {index} is of unknown kind {kind!r}; known: lightning, softmax")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_local_experts ({self.num_local_experts})"
            )
        if not isinstance(self.rotary_dim, int) or not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_dim must be even and between 2 and head_dim ({self.head_dim}), not {self.rotary_dim!r}"
            )
        if self.slope_layers < len(self.layer_kinds):
            raise ConfigError(
                f"slope_layers ({self.slope_layers}) is less than the {len(self.layer_kinds)} layers built"
            )
        for key in ("rope_theta", "rms_norm_eps", "lightning_norm_eps"):
            value = getattr(self, key)
            if not is_number(value) or value <= 0:
                raise ConfigError(f"{key} must be a positive number, not {value!r}")
        for key in ("lightning_scale", "softmax_scale", "mlp_scale"):
            scale = getattr(self, key)
            if not is_number(scale.alpha) or not is_number(scale.beta):
                raise ConfigError(f"{key} must hold two numbers, not {scale.alpha!r} and {scale.beta!r}")

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def attention_width(self) -> int:
        """Channels of all query heads together; 8192 in Text-01, wider than hidden_size."""
        return self.num_attention_heads * self.head_dim

    @property
    def lightning_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "lightning")

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind == "softmax")

    def truncated(self, num_layers: int) -> ModelConfig:
        """The same model cut to its first layers. Slopes keep the full depth, so every layer computes what it does there."""
        if not 1 <= num_layers <= self.num_layers:
            raise ConfigError(f"--layers must be between 1 and {self.num_layers} for this checkpoint, not {num_layers}")
        return dataclasses.replace(self, layer_kinds=self.layer_kinds[:num_layers])

    def text_only(self) -> ModelConfig:
        """The same model without its vision half."""
        return dataclasses.replace(self, vision=None)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the text model by kind of tensor, in elements."""
        d, width = self.hidden_size, self.attention_width
        kv_width = self.num_key_value_heads * self.head_dim
        n_lightning, n_softmax = len(self.lightning_layers), len(self.softmax_layers)
        return {
            "embedding": self.vocab_size * d,
            "lightning attention": n_lightning * (5 * d * width + width),
            "softmax attention": n_softmax * (2 * d * width + 2 * d * kv_width),
            "experts": self.num_layers * self.num_local_experts * 3 * d * self.intermediate_size,
            "router": self.num_layers * self.num_local_experts * d,
            "norms": (2 * self.num_layers + 1) * d,
            "lm_head": self.vocab_size * d,
        }

    def all_parameter_counts(self) -> dict[str, int]:
        """Those of the vision half too, where there is one."""
        vision = {} if self.vision is None else self.vision.parameter_counts(self.hidden_size)
        return self.parameter_counts() | vision

    def state_elements_per_sequence(self) -> int:
        """Recurrent state elements (fp32) of one sequence over all lightning layers; independent of its length."""
        return len(self.lightning_layers) * self.num_attention_heads * self.head_dim**2

    def cache_elements_per_token(self) -> int:
        """Key and value cache elements of one token over all softmax layers."""
        return len(self.softmax_layers) * 2 * self.num_key_value_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` restores an equal record."""
        values = dataclasses.asdict(self) | {"layer_kinds": list(self.layer_kinds)}
        if self.vision is None:
            del values["vision"]
            return values
        return values | {"vision": self.vision.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises ConfigError on a missing or unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown key {unknown[0]!r} in the model description")
        converted = dict(values)
        try:
            converted["layer_kinds"] = tuple(values["layer_kinds"])
            for key in ("lightning_scale", "softmax_scale", "mlp_scale"):
                converted[key] = ResidualScale(**values[key])
            if values.get("vision") is not None:
                converted["vision"] = VisionConfig.from_dict(values["vision"])
            return cls(**converted)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"incomplete model description: {error}") from error
