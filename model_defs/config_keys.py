"""The keys of one text model's configuration, taken one by one; what is left over at the end is refused by name.

Knows the keys of the original schema and the renamed ones of the -hf repositories (reference/minimax01-facts.md, section
1). Needs the standard library only.
"""

from __future__ import annotations

from typing import Any

from model_defs.config import LayerKind, ModelConfig, ResidualScale, is_number
from model_defs.errors import ConfigError

# config.json leaves eos null; generation must be given this id (facts, 1.1)
_PUBLISHED_VOCABULARY, _PUBLISHED_EOS = 200064, 200020

_KINDS: dict[object, LayerKind] = {
    "linear_attention": "lightning",
    "full_attention": "softmax",
}
SCALES = {
    "lightning_scale": ("layernorm_linear_attention", "linear_attn"),
    "softmax_scale": ("layernorm_full_attention", "full_attn"),
    "mlp_scale": ("layernorm_mlp", "mlp"),
}
# Keys whose value never changes what inference computes, or that only restate what is checked elsewhere.
HARMLESS = frozenset(
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


def refuse_unknown(key: str, value: Any) -> None:
    """Raises ConfigError for a key whose meaning is not known, unless its value switches nothing on."""
    if not _switches_nothing(value):
        raise ConfigError(f"unknown key {key!r} with value {_short(value)}; it may change what the model computes")


def _switches_nothing(value: Any) -> bool:
    return value is None or value is False or value in (0, "", [], {}, [0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class KeyReader:
    """Takes keys out of one configuration and remembers which; what is left over at the end is unknown.

    `native`: it is of the -hf schema, so that a missing key is called by its name there, and `postnorm` may be missing.
    """

    def __init__(self, values: dict[str, Any], native: bool) -> None:
        self.values, self.native = values, native
        self.used: set[str] = set(HARMLESS)

    def config(self, family: str, tensor_prefix: str) -> ModelConfig:
        """The architecture that the keys describe. Raises ConfigError naming the key that is missing, contradictory, unknown
        or of a value that this family does not have.
        """
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
            family=family,
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
            tensor_prefix=tensor_prefix,
            bos_token_id=self._token_id("bos_token_id", vocab_size),
            eos_token_id=_PUBLISHED_EOS if eos is None and vocab_size == _PUBLISHED_VOCABULARY else eos,
            lightning_scale=self._scale("lightning_scale"),
            softmax_scale=self._scale("softmax_scale"),
            mlp_scale=self._scale("mlp_scale"),
        )
        for key, value in self.values.items():
            if key not in self.used:
                refuse_unknown(key, value)
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
        original, renamed = SCALES[attribute]

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
    if not is_number(value):
        raise ConfigError(f"{key} must be a number, not {_short(value)}")
    return float(value)


def _layer_kind(key: str, index: int, item: object) -> LayerKind:
    if key == "layer_types" and isinstance(item, str) and item in _KINDS:
        return _KINDS[item]
    if key == "attn_type_list" and isinstance(item, int) and not isinstance(item, bool) and item in (0, 1):
        return "softmax" if item else "lightning"
    known = "0 (lightning) and 1 (softmax)" if key == "attn_type_list" else "linear_attention and full_attention"
    raise ConfigError(f"{key} has unknown layer type {_short(item)} at layer {index}; known: {known}")
