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

from model_defs.config import LayerKind, ModelConfig, ResidualScale
from model_defs.errors import ConfigError
from model_defs.strict_json import parse_object
from model_defs.vision_config import read_vision, vision_to_schema

Schema = Literal["original", "hf", "m1", "vl-01"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)

PUBLISHED_VOCABULARY, PUBLISHED_EOS = (
    200064,
    200020,
)  # config.json leaves eos null; generation must be given this id (facts, 1.1)

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

_KINDS: dict[object, LayerKind] = {
    "linear_attention": "lightning",
    "full_attention": "softmax",
}
_SCALES = {
    "lightning_scale": ("layernorm_linear_attention", "linear_attn"),
    "softmax_scale": ("layernorm_full_attention", "full_attn"),
    "mlp_scale": ("layernorm_mlp", "mlp"),
}
# Keys whose value never changes what inference computes, or that only restate what is checked elsewhere.
_HARMLESS = frozenset(
    {
        "architectures",
        "model_type",
        "auto_map",
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "shared_moe_mode",
        "pad_token_id",
        "block_size",
        "id2label",
        "label2id",
        "return_dict",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "max_model_len",
        "chunk_size_feed_forward",
        "problem_type",
        "_commit_hash",
    }
)
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
    for attribute, (original, renamed) in _SCALES.items():
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
            return _Reader(values, schema).config()
        config = _Reader(_text_config(values), schema).config()
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
        if key not in _HARMLESS | _VISION and not repeated and not _switches_nothing(value):
            raise ConfigError(f"unknown key {key!r} with value {_short(value)}; it may change what the model computes")
    return inner


def _switches_nothing(value: Any) -> bool:
    return value is None or value is False or value in (0, "", [], {}, [0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Reader:
    """Takes keys out of one configuration and remembers which; what is left over at the end is unknown."""

    def __init__(self, values: dict[str, Any], schema: Schema) -> None:
        self.values, self.schema = values, schema
        self.used: set[str] = set(_HARMLESS)
        if schema == "vl-01" and _MODEL_TYPES.get(str(values.get("model_type"))) == "hf":
            self.native = True
        else:
            self.native = schema == "hf"

    def config(self) -> ModelConfig:
        self._refuse_variants()
        layers = self._count("num_hidden_layers")
        kinds = self._layer_kinds(layers)
        head_dim = self._count(
            "head_dim",
            why="it does not follow from hidden_size and num_attention_heads in this family (128, not 6144 / 64)",
        )
        vocab_size = self._count("vocab_size")
        eos = self._token_id("eos_token_id", vocab_size)
        config = ModelConfig(
            family=_FAMILIES[self.schema],
            hidden_size=self._count("hidden_size"),
            num_attention_heads=self._count("num_attention_heads"),
            num_key_value_heads=self._count("num_key_value_heads"),
            head_dim=head_dim,
            intermediate_size=self._count("intermediate_size"),
            num_local_experts=self._count("num_local_experts"),
            num_experts_per_tok=self._count("num_experts_per_tok"),
            vocab_size=vocab_size,
            layer_kinds=kinds,
            slope_layers=layers,
            rotary_dim=self._rotary_dim(head_dim),
            rope_theta=self._rope_theta(),
            max_position_embeddings=self._count("max_position_embeddings"),
            rms_norm_eps=self._number("rms_norm_eps"),
            tensor_prefix=_VL_PREFIX if self.schema == "vl-01" else "",
            bos_token_id=self._token_id("bos_token_id", vocab_size),
            eos_token_id=PUBLISHED_EOS if eos is None and vocab_size == PUBLISHED_VOCABULARY else eos,
            lightning_scale=self._scale("lightning_scale"),
            softmax_scale=self._scale("softmax_scale"),
            mlp_scale=self._scale("mlp_scale"),
        )
        for key, value in self.values.items():
            if key not in self.used and not _switches_nothing(value):
                raise ConfigError(
                    f"unknown key {key!r} with value {_short(value)}; it may change what the model computes"
                )
        return config

    def _take(self, key: str) -> Any:
        self.used.add(key)
        return self.values.get(key)

    def _need(self, key: str, why: str = "") -> Any:
        value = self._take(key)
        if value is None:
            raise ConfigError(f"required key {key} is missing" + (f": {why}" if why else ""))
        return value

    def _count(self, key: str, why: str = "") -> int:
        value = self._need(key, why)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ConfigError(f"{key} must be a positive whole number, not {_short(value)}")
        return value

    def _number(self, key: str) -> float:
        return _as_number(key, self._need(key))

    def _token_id(self, key: str, vocab_size: int) -> int | None:
        value = self._take(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise ConfigError(
                f"{key} must be one token id below vocab_size ({vocab_size}) or null, not {_short(value)}"
            )
        return value

    def _refuse_variants(self) -> None:
        """Switches of the original code whose other position this definition does not implement."""
        if (act := self._need("hidden_act")) != "silu":
            raise ConfigError(f"hidden_act {_short(act)} is not supported; this family uses silu")
        # The -hf class has the postnorm form built in, so there the key may be missing; in the original its default is
        # false.
        postnorm = self._take("postnorm") if self.native else self._need("postnorm")
        if postnorm not in (None, True):
            raise ConfigError(
                f"postnorm {_short(postnorm)} is not supported; the published models carry the normed input (true)"
            )
        for key in ("rope_scaling", "sliding_window", "quantization_config"):
            if (value := self._take(key)) is not None:
                hint = (
                    "; quantized checkpoints cannot be read, give the 16-bit one"
                    if key == "quantization_config"
                    else ""
                )
                raise ConfigError(f"{key} {_short(value)} is not supported; it must be null{hint}")
        if self._take("tie_word_embeddings") not in (None, False):
            raise ConfigError("tie_word_embeddings true is not supported; this family stores lm_head apart")
        shared = self._take("shared_intermediate_size")
        if any(item != 0 for item in (shared if isinstance(shared, list) else [shared or 0])):
            raise ConfigError(
                f"shared_intermediate_size {_short(shared)} is not supported; published models have no shared expert (0)"
            )
        if self._take("norm_topk_prob") not in (None, True):
            raise ConfigError(
                "norm_topk_prob false is not supported; this family renormalises the chosen experts' weights"
            )

    def _layer_kinds(self, layers: int) -> tuple[LayerKind, ...]:
        why = "it says which layers are lightning and which softmax attention"
        by_number, by_name = self._take("attn_type_list"), self._take("layer_types")
        if by_number is None and by_name is None:
            self._need("layer_types" if self.native else "attn_type_list", why)
        kinds: set[tuple[LayerKind, ...]] = set()
        for key, listed in (("attn_type_list", by_number), ("layer_types", by_name)):
            if listed is None:
                continue
            if not isinstance(listed, list) or len(listed) != layers:
                found = len(listed) if isinstance(listed, list) else _short(listed)
                raise ConfigError(f"{key} must list num_hidden_layers ({layers}) layers, found {found}")
            kinds.add(tuple(_layer_kind(key, index, item) for index, item in enumerate(listed)))
        if len(kinds) > 1:
            raise ConfigError("attn_type_list contradicts layer_types")
        return kinds.pop()

    def _scale(self, attribute: str) -> ResidualScale:
        original, renamed = _SCALES[attribute]

        def factor(part: str) -> float:
            names = (f"{original}_{part}", f"{renamed}_{part}_factor")
            found = {name: _as_number(name, self._take(name)) for name in names if self._take(name) is not None}
            if not found:
                self._need(
                    names[1] if self.native else names[0], "its default of 1 is not what the published models use"
                )
            if len(set(found.values())) > 1:
                raise ConfigError(f"{names[0]} contradicts {names[1]}")
            return next(iter(found.values()))

        return ResidualScale(factor("alpha"), factor("beta"))

    def _rope_parameters(self) -> dict[str, Any]:
        """What newer transformers versions gather under one key."""
        parameters = self._take("rope_parameters") or {}
        if not isinstance(parameters, dict):
            raise ConfigError(f"rope_parameters must be an object, not {_short(parameters)}")
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            raise ConfigError(f"rope_parameters.rope_type {_short(kind)} is not supported; it must be default")
        for key, value in parameters.items():
            if key not in ("rope_type", "rope_theta", "partial_rotary_factor") and not _switches_nothing(value):
                raise ConfigError(f"unknown key 'rope_parameters.{key}' with value {_short(value)}")
        return parameters

    def _rope_theta(self) -> float:
        found = [
            value
            for value in (self._take("rope_theta"), self._rope_parameters().get("rope_theta"))
            if value is not None
        ]
        if not found:
            self._need("rope_theta")
        numbers = {_as_number("rope_theta", value) for value in found}
        if len(numbers) > 1:
            raise ConfigError("rope_theta contradicts rope_parameters.rope_theta")
        return numbers.pop()

    def _rotary_dim(self, head_dim: int) -> int:
        factors = [self._take("partial_rotary_factor"), self._rope_parameters().get("partial_rotary_factor")]
        numbers = [head_dim * _as_number("partial_rotary_factor", factor) for factor in factors if factor is not None]
        if not all(number.is_integer() for number in numbers):
            raise ConfigError(f"partial_rotary_factor does not give a whole number of channels for head_dim {head_dim}")
        found = {int(number) for number in numbers}
        if not found or self._take("rotary_dim") is not None:
            found.add(
                self._count(
                    "rotary_dim",
                    why="the published models turn 64 of a head's 128 channels; transformers ignores the key and turns "
                    "all, so a file it saved may lack it. Add it as the model was trained",
                )
            )
        if len(found) > 1:
            raise ConfigError(f"rotary_dim contradicts partial_rotary_factor times head_dim: {sorted(found)}")
        return found.pop()


def _as_number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
        raise ConfigError(f"{key} must be a number, not {_short(value)}")
    return float(value)


def _layer_kind(key: str, index: int, item: object) -> LayerKind:
    if key == "layer_types" and isinstance(item, str) and item in _KINDS:
        return _KINDS[item]
    if key == "attn_type_list" and isinstance(item, int) and not isinstance(item, bool) and item in (0, 1):
        return "softmax" if item else "lightning"
    known = "0 (lightning) and 1 (softmax)" if key == "attn_type_list" else "linear_attention and full_attention"
    raise ConfigError(f"{key} has unknown layer type {_short(item)} at layer {index}; known: {known}")
