"""Names, types and dimensions of everything that goes in and out of the canonical graph.

Legend: B batch, T new tokens, P positions at which logits are wanted, S cache capacity, H heads, G key/value heads, K channels of a
head, N vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model_defs.config import ModelConfig

CANONICAL_OPSET = 27  # the first with LinearAttention
BATCH, TOKENS, POSITIONS, CAPACITY = "batch", "tokens", "positions", "capacity"
Dim = int | str


@dataclass(frozen=True)
class StateSpec:
    """One state tensor that a step takes in and gives out."""

    layer: int
    kind: Literal["recurrent_state", "key", "value"]
    dims: tuple[Dim, ...]

    @property
    def input_name(self) -> str:
        return f"past_key_values.{self.layer}.{self.kind}"

    @property
    def output_name(self) -> str:
        return f"present.{self.layer}.{self.kind}"


# name -> dimensions; all int64
TOKEN_INPUTS: dict[str, tuple[Dim, ...]] = {
    "input_ids": (BATCH, TOKENS),  # right-padded rows
    "new_lengths": (BATCH,),  # valid tokens of each row
    "past_lengths": (BATCH,),  # tokens of each row seen before
    "logit_positions": (BATCH, POSITIONS),  # indices into the new tokens
}
LOGITS = "logits"  # [batch, positions, vocabulary]

# Of models with a vision half only, behind the states. A token whose position is not negative takes that row of the features in the
# place of its own embedding.
IMAGE_FEATURES, IMAGE_POSITIONS = "image_features", "image_positions"
IMAGE_ROWS = "image_rows"
# The graph of the vision half: normalised tiles to rows like token embeddings, those of all patches and one for a line's end.
PIXELS, TILES, FEATURES = "pixels", "tiles", "features"


def image_inputs(config: ModelConfig) -> dict[str, tuple[Dim, ...]]:
    """Inputs of the text graph for images: name -> dimensions. Features are of the model's type, positions int64."""
    if config.vision is None:
        return {}
    return {IMAGE_FEATURES: (IMAGE_ROWS, config.hidden_size), IMAGE_POSITIONS: (BATCH, TOKENS)}


def state_specs(config: ModelConfig) -> tuple[StateSpec, ...]:
    """The states in the order of the model's flat list: layer by layer, key before value."""
    recurrent: tuple[Dim, ...] = (BATCH, config.num_attention_heads, config.head_dim, config.head_dim)
    cache: tuple[Dim, ...] = (BATCH, config.num_key_value_heads, CAPACITY, config.head_dim)
    specs = []
    for layer, kind in enumerate(config.layer_kinds):
        if kind == "lightning":
            specs.append(StateSpec(layer, "recurrent_state", recurrent))
        else:
            specs += [StateSpec(layer, "key", cache), StateSpec(layer, "value", cache)]
    return tuple(specs)


def hidden_tap(layer: int) -> str:
    """Name of the value that holds the residual stream behind a layer, [batch, tokens, hidden]."""
    return f"taps.{layer}.hidden"


def router_tap(layer: int) -> str:
    """Name of the value that holds a layer's router logits, [batch, tokens, experts]."""
    return f"taps.{layer}.router_logits"
