"""Reads and writes the published configuration files of the MiniMax-01 family (reference/minimax01-facts.md, section
1).

Four schemas carry the same facts: "original" (MiniMax-Text-01), "m1" (the same keys), "hf" (renamed keys of the -hf
repositories and of what transformers saves) and "vl-01" (original keys inside `text_config`). Nothing is guessed: a key
that is needed must be there, and a key whose meaning is unknown is refused by name unless its value switches nothing
on.

Needs the standard library only.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, get_args

from model_defs.config import ModelConfig
from model_defs.config_keys import HARMLESS, SCALES, KeyReader, refuse_unknown
from model_defs.errors import ConfigError
from model_defs.strict_json import parse_object
from model_defs.vision_config import read_vision, vision_to_schema

Schema = Literal["original", "hf", "m1", "vl-01"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)

_MAX_CONFIG_BYTES = 10_000_000
_MODEL_TYPES: dict[str, Schema] = {
    "MiniMaxText01": "original",  # first release
    "minimax_text_01": "original",
    "minimax_m1": "m1",
    "minimax": "hf",
    "minimax_vl_01": "vl-01",
}
_ARCHITECTURES: dict[str, Schema] = {
    "MiniMaxText01ForCausalLM": "original",
    "MiniMaxM1ForCausalLM": "m1",
    "MiniMaxForCausalLM": "hf",
    "MiniMaxVL01ForConditionalGeneration": "vl-01",
}
_FAMILIES: dict[Schema, str] = {"original": "text-01", "hf": "text-01", "m1": "m1", "vl-01": "vl-01"}
_VL_PREFIX = "language_model."

# Of MiniMax-VL-01's outer level: how images become embeddings, read by `vision_config`.
_VISION = frozenset(
    {
        "text_config",
        "vision_config",
        "image_token_index",
        "image_token_id",
        "image_seq_length",
        "ignore_index",
        "projector_hidden_act",
        "multimodal_projector_bias",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "process_image_mode",
        "image_grid_pinpoints",
        "img_token_compression_config",
    }
)


def read_config(source: str | os.PathLike[str] | dict[str, Any]) -> ModelConfig:
    """The architecture that a configuration file (or the folder it is in, or its parsed content) describes.

    Raises ConfigError naming the key that is missing, contradictory, unknown or of a value that this family does not
    have.
    """
    if isinstance(source, dict):
        return _read(source, "configuration")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: is not a file")  # reading a pipe would wait for ever
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: is too large for a configuration")
        return _read(parse_object(path.read_bytes()), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be understood: {error}") from None


def config_for_schema(config: ModelConfig, schema: Schema) -> ModelConfig:
    """`config` as reading it back from `schema` gives it: family, tensor prefix and vision half are what the schema stands for."""
    if schema not in SCHEMAS:
        raise ConfigError(f"unknown schema {schema!r}; known: {', '.join(SCHEMAS)}")
    prefix, vision = (_VL_PREFIX, config.vision) if schema == "vl-01" else ("", None)
    return dataclasses.replace(config, family=_FAMILIES[schema], tensor_prefix=prefix, vision=vision)


def config_to_schema(config: ModelConfig, schema: Schema, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The content of config.json for `config` in `schema`; `read_config` of it gives `config_for_schema(config,
    schema)`.

    Raises ConfigError for a model cut to its first layers: no published schema can say how deep the full model is.
    """
    config = config_for_schema(config, schema)
    if config.slope_layers != config.num_layers:
        raise ConfigError(
            "a model cut to its first layers cannot be written: its decay slopes depend on the full depth"
        )
    if config.lightning_norm_eps != 1e-6:
        raise ConfigError("lightning_norm_eps is fixed at 1e-6 in the published schemas")
    values: dict[str, Any] = {
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rotary_dim": config.rotary_dim,
        "rope_theta": config.rope_theta,
        "postnorm": True,
        "shared_intermediate_size": [0] if schema == "vl-01" else 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    for attribute, (original, renamed) in SCALES.items():
        scale = getattr(config, attribute)
        alpha, beta = (
            (f"{renamed}_alpha_factor", f"{renamed}_beta_factor")
            if schema == "hf"
            else (f"{original}_alpha", f"{original}_beta")
        )
        values |= {alpha: scale.alpha, beta: scale.beta}
    if schema == "hf":
        values["layer_types"] = [
            "linear_attention" if kind == "lightning" else "full_attention" for kind in config.layer_kinds
        ]
    else:
        values["attn_type_list"] = [0 if kind == "lightning" else 1 for kind in config.layer_kinds]
        values["rope_scaling"] = None
    architecture = next(name for name, known in _ARCHITECTURES.items() if known == schema)
    model_type = {"original": "minimax_text_01", "m1": "minimax_m1", "hf": "minimax", "vl-01": "minimax_vl_01"}[schema]
    if schema == "vl-01":
        inner = {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "model_type": "minimax_text_01",
            **values,
            "torch_dtype": dtype,
        }
        values = {"tie_word_embeddings": False, "text_config": inner}
        if config.vision is not None:
            values |= vision_to_schema(config.vision, config.hidden_size)
    return {"architectures": [architecture], "model_type": model_type, **values, "torch_dtype": dtype}


def _read(values: dict[str, Any], where: str) -> ModelConfig:
    try:
        schema = _schema(values)
        if schema != "vl-01":
            return KeyReader(values, native=schema == "hf").config(_FAMILIES[schema], "")
        inner = _text_config(values)
        native = _MODEL_TYPES.get(str(inner.get("model_type"))) == "hf"
        config = KeyReader(inner, native).config(_FAMILIES[schema], _VL_PREFIX)
        return dataclasses.replace(config, vision=read_vision(values, config.vocab_size))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _schema(values: dict[str, Any]) -> Schema:
    """Which schema the keys `model_type` and `architectures` name; either may be missing, none may be foreign."""
    found: list[tuple[str, Schema]] = []
    model_type = values.get("model_type")
    if model_type not in (None, ""):
        if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
            raise ConfigError(
                f"model_type {model_type!r} is not of the MiniMax-01 family; known: {', '.join(_MODEL_TYPES)}"
            )
        found.append(("model_type", _MODEL_TYPES[model_type]))
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"architectures must be a list, not {architectures!r}")
    for name in architectures:
        if not isinstance(name, str) or name not in _ARCHITECTURES:
            raise ConfigError(
                f"architectures names {name!r}, not of the MiniMax-01 family; known: {', '.join(_ARCHITECTURES)}"
            )
        found.append(("architectures", _ARCHITECTURES[name]))
    if not found:
        raise ConfigError("model_type and architectures are both missing, so the architecture is unknown")
    schemas = {schema for _, schema in found}
    # M1 differs from Text-01 in weights only, and files exist that name the one in model_type and the other in
    # architectures.
    if len(schemas) > 1 and schemas != {"original", "m1"}:
        raise ConfigError(f"model_type {model_type!r} contradicts architectures {architectures!r}")
    return "m1" if "m1" in schemas else found[0][1]


def _text_config(outer: dict[str, Any]) -> dict[str, Any]:
    inner = outer.get("text_config")
    if not isinstance(inner, dict):
        raise ConfigError("text_config is missing, where MiniMax-VL-01 keeps its text model")
    if inner.get("model_type") is not None and _MODEL_TYPES.get(str(inner["model_type"])) not in ("original", "hf"):
        raise ConfigError(
            f"text_config.model_type {inner['model_type']!r} is not a text model of the MiniMax-01 family"
        )
    for key, value in outer.items():
        repeated = key in inner and inner[key] == value
        if key not in HARMLESS | _VISION and not repeated:
            refuse_unknown(key, value)
    return inner
