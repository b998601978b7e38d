"""Names and shapes of the tensors in a checkpoint (reference/minimax01-facts.md, section 3).

The original names are the reference. Two variants are mapped onto them: the layout that transformers keeps in memory
(experts stacked under `.mlp.`), whose slices are the original tensors byte for byte, and its names for the vision
model's parts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from model_defs.config import ModelConfig

# Lookup tables that transformers stores although they follow from the configuration: 4 per lightning layer, 280 in
# Text-01.
DERIVED_BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")

_DERIVED = re.compile(rf"\.layers\.\d+\.self_attn\.({'|'.join(DERIVED_BUFFERS)})$")
_VISION = re.compile(r"^(model\.)?(vision_tower\.|multi_modal_projector\.|image_newline$)")
# Of CLIP's class, without a part in MiniMax-VL-01; transformers stores them.
_UNUSED_VISION = re.compile(r"^vision_tower\.vision_model\.(embeddings\.position_ids|post_layernorm\.(weight|bias))$")
_NATIVE_VISION = {
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}
_MAX_EXPERTS = 4096  # an untrusted shape must not make a list of any length
_NATIVE_MOE = re.compile(r"^(.*\.layers\.\d+)\.mlp\.(gate\.weight|experts\.gate_up_proj|experts\.down_proj)$")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that `config` needs, with its shape, in the order of the model; those of the vision half come last.

    Rows of `qkv_proj` are grouped per head as q, k, v (facts, 2.3); w1 is the gate, w3 the up and w2 the down matrix of
    an expert.
    """
    d, width, inner = config.hidden_size, config.attention_width, config.intermediate_size
    kv_width = config.num_key_value_heads * config.head_dim
    lightning = {"qkv_proj": (3 * width, d), "output_gate": (width, d), "norm": (width,), "out_proj": (d, width)}
    softmax = {"q_proj": (width, d), "k_proj": (kv_width, d), "v_proj": (kv_width, d), "o_proj": (d, width)}
    prefix = config.tensor_prefix
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}model.embed_tokens.weight": (config.vocab_size, d)}
    for layer, kind in enumerate(config.layer_kinds):
        here = f"{prefix}model.layers.{layer}"
        shapes[f"{here}.input_layernorm.weight"] = (d,)
        for part, shape in (lightning if kind == "lightning" else softmax).items():
            shapes[f"{here}.self_attn.{part}.weight"] = shape
        shapes[f"{here}.post_attention_layernorm.weight"] = (d,)
        shapes[f"{here}.block_sparse_moe.gate.weight"] = (config.num_local_experts, d)
        for expert in range(config.num_local_experts):
            there = f"{here}.block_sparse_moe.experts.{expert}"
            shapes[f"{there}.w1.weight"] = (inner, d)
            shapes[f"{there}.w2.weight"] = (d, inner)
            shapes[f"{there}.w3.weight"] = (inner, d)
    shapes[f"{prefix}model.norm.weight"] = (d,)
    shapes[f"{prefix}lm_head.weight"] = (config.vocab_size, d)
    if config.vision is not None:
        shapes |= config.vision.tensors(d)
    return shapes


def ignorable(name: str, tensor_prefix: str = "", with_vision: bool = False) -> bool:
    """Whether a tensor outside `expected_tensors` is known and rightly unused: derived buffers, and of VL-01 the vision half, or,
    when that is to be computed too (`with_vision`), what CLIP's class has beyond it.
    """
    if _DERIVED.search(name):
        return True
    return tensor_prefix == "language_model." and bool((_UNUSED_VISION if with_vision else _VISION).match(name))


def layer_of(name: str) -> int | None:
    """Index of the decoder layer that a text-model tensor belongs to; None for the embedding, the final norm and
    lm_head.
    """
    match = re.match(r"^(?:language_model\.)?model\.layers\.(\d{1,6})\.", name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class NamedSlice:
    """A tensor of the original layout inside a stored one: `shape` at row-major element `start`."""

    name: str
    start: int
    shape: tuple[int, ...]


def original_slices(name: str, shape: tuple[int, ...], tensor_prefix: str = "") -> list[NamedSlice] | None:
    """The original tensors that a tensor of the transformers layout holds, or None if `name` is no such tensor.

    `experts.gate_up_proj` [E, 2I, D] holds each expert's w1 above its w3, `experts.down_proj` [E, D, I] each expert's
    w2 (facts, 3.3). None as well when the shape cannot be cut that way: the tensor then shows up as unexpected.
    """
    renamed = name
    if tensor_prefix == "language_model.":
        if name.startswith("model.language_model."):
            renamed = "language_model.model." + name.removeprefix("model.language_model.")
        elif name == "lm_head.weight":
            renamed = "language_model.lm_head.weight"
        else:
            there = next((prefix for prefix in _NATIVE_VISION if name.startswith(prefix)), None)
            renamed = name if there is None else _NATIVE_VISION[there] + name.removeprefix(there)
    match = _NATIVE_MOE.match(renamed)
    if not match:
        return [NamedSlice(renamed, 0, shape)] if renamed != name else None
    moe = f"{match.group(1)}.block_sparse_moe"
    if match.group(2) == "gate.weight":
        return [NamedSlice(f"{moe}.gate.weight", 0, shape)]
    if len(shape) != 3 or shape[0] > _MAX_EXPERTS:
        return None
    experts, rows, columns = shape
    if match.group(2) == "experts.down_proj":
        return [NamedSlice(f"{moe}.experts.{e}.w2.weight", e * rows * columns, (rows, columns)) for e in range(experts)]
    if rows % 2:
        return None
    half = (rows // 2, columns)
    return [
        NamedSlice(f"{moe}.experts.{e}.{part}.weight", (e * rows + first) * columns, half)
        for e in range(experts)
        for part, first in (("w1", 0), ("w3", rows // 2))
    ]
