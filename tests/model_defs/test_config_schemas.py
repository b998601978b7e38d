"""Every published schema is read, written back, and anything that would change the model is refused by the key's name."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_defs.config import ModelConfig, ResidualScale
from model_defs.config_schemas import SCHEMAS, config_for_schema, config_to_schema, read_config
from model_defs.errors import ConfigError
from model_defs.presets import PRESET_NAMES, preset

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is not a fault
ALPHA = 3.5565588200778455

# Text-01's configuration file, written out from the fact sheet (section 1.1) rather than by the code under test.
TEXT_01 = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": ALPHA,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": ALPHA,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": ALPHA,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_text_01",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rope_scaling": None,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}
RENAMED = {
    "layernorm_full_attention_alpha": "full_attn_alpha_factor",
    "layernorm_full_attention_beta": "full_attn_beta_factor",
    "layernorm_linear_attention_alpha": "linear_attn_alpha_factor",
    "layernorm_linear_attention_beta": "linear_attn_beta_factor",
    "layernorm_mlp_alpha": "mlp_alpha_factor",
    "layernorm_mlp_beta": "mlp_beta_factor",
}


def native() -> dict:
    values = {
        RENAMED.get(key, key): value for key, value in TEXT_01.items() if key not in ("attn_type_list", "auto_map")
    }
    values["layer_types"] = (["linear_attention"] * 7 + ["full_attention"]) * 10
    return values | {"architectures": ["MiniMaxForCausalLM"], "model_type": "minimax"}


def vl() -> dict:
    return {
        "architectures": ["MiniMaxVL01ForConditionalGeneration"],
        "model_type": "minimax_vl_01",
        "image_token_index": 200025,
        "process_image_mode": "anyres",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 6144,
            "vocab_size": 32000,
        },
        "image_seq_length": 576,
        "image_grid_pinpoints": [
            [336 * a, 336 * b] for a, most in enumerate((6, 6, 6, 4, 3, 3), 1) for b in range(1, most + 1)
        ],
        "text_config": TEXT_01 | {"shared_intermediate_size": [0], "max_position_embeddings": 8192},
    }


def test_original_text_01_is_the_preset():
    assert read_config(TEXT_01) == preset("text-01")


def test_first_release_model_type():
    assert read_config(TEXT_01 | {"model_type": "MiniMaxText01"}) == preset("text-01")


def test_native_schema_is_the_same_model():
    assert read_config(native()) == preset("text-01")


def test_m1():
    values = TEXT_01 | {"model_type": "minimax_m1", "architectures": ["MiniMaxM1ForCausalLM"]}
    assert read_config(values) == preset("m1")


def test_vl_01_is_the_text_config_and_a_vision_half():
    expected = dataclasses.replace(
        preset("text-01"), family="vl-01", tensor_prefix="language_model.", max_position_embeddings=8192
    )
    assert read_config(vl()) == preset("vl-01")
    assert read_config(vl()).text_only() == expected
    without = {key: value for key, value in vl().items() if key != "vision_config"}
    assert read_config(without) == expected


def test_a_model_description_keeps_the_vision_half():
    config = preset("vl-01")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "vision" not in preset("text-01").to_dict()


@pytest.mark.parametrize(
    "key", ["vision_feature_layer", "vision_feature_select_strategy", "image_grid_pinpoints", "projector_hidden_act"]
)
def test_vl_01_guesses_nothing(key: str):
    values = vl()
    del values[key]
    with pytest.raises(ConfigError, match=key):
        read_config(values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
        ({"vision_feature_layer": 25}, "vision_feature_layer"),
        ({"process_image_mode": "resize"}, "process_image_mode"),
        ({"image_token_index": 200064}, "image_token_index"),
        ({"image_seq_length": 144}, "576 patches"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"multimodal_projector_bias": 1}, "multimodal_projector_bias"),
        ({"image_grid_pinpoints": [[336, 672]]}, "it needs both"),
        ({"image_grid_pinpoints": [[336, 500], [500, 336]]}, "multiples of image_size"),
        ({"image_grid_pinpoints": [[336 * 9, 336 * 9]]}, "more than 64 tiles"),
        ({"image_grid_pinpoints": []}, "between 1 and"),
        ({"vision_config": vl()["vision_config"] | {"hidden_act": None}}, "hidden_act"),
        ({"vision_config": vl()["vision_config"] | {"hidden_act": "mish"}}, "hidden_act"),
        ({"vision_config": vl()["vision_config"] | {"patch_size": 15}}, "patch_size"),
        ({"vision_config": vl()["vision_config"] | {"num_attention_heads": 7}}, "num_attention_heads"),
        ({"vision_config": vl()["vision_config"] | {"num_hidden_layers": 0}}, "num_hidden_layers"),
        ({"vision_config": vl()["vision_config"] | {"num_channels": 1}}, "num_channels"),
        ({"vision_config": vl()["vision_config"] | {"layer_norm_eps": "small"}}, "layer_norm_eps"),
        ({"vision_config": vl()["vision_config"] | {"layer_norm_eps": 10**400}}, "layer_norm_eps"),
        ({"vision_config": vl()["vision_config"] | {"model_type": "siglip_vision_model"}}, "model_type"),
        ({"vision_config": []}, "vision_config"),
        ({"img_token_compression_config": {"spatial_merge_size": 2}}, "img_token_compression_config"),
    ],
)
def test_vision_halves_of_another_kind_are_refused(change: dict, named: str):
    with pytest.raises(ConfigError, match=named):
        read_config(vl() | change)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", PRESET_NAMES)
def test_round_trip(name: str, schema: str):
    config = preset(name)
    text = json.dumps(config_to_schema(config, schema))
    assert read_config(json.loads(text)) == config_for_schema(config, schema)


def test_transformers_saved_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    expected = preset("tiny")
    values = config_to_schema(expected, "hf") | {"rope_theta": 1e7}
    del values["architectures"], values["model_type"]
    transformers.MiniMaxConfig(architectures=["MiniMaxForCausalLM"], **values).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved  # the newer spelling is what this test is about
    assert read_config(tmp_path) == expected


def test_partial_rotary_factor_stands_for_rotary_dim():
    values = native()
    del values["rotary_dim"], values["rope_theta"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}
    assert read_config(values) == preset("text-01")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": "minimax_m2"}, "model_type"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"model_type": "minimax"}, "contradicts"),
        ({"architectures": [], "model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"postnorm": False}, "postnorm"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "beta_fast": 32}}, "rope_parameters.beta_fast"),
        ({"partial_rotary_factor": 1.0}, "rotary_dim contradicts"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"shared_intermediate_size": 512}, "shared_intermediate_size"),
        ({"shared_intermediate_size": [512]}, "shared_intermediate_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"attn_type_list": [0, 1]}, "attn_type_list"),
        ({"attn_type_list": [0, 0, 0, 0, 0, 0, 0, 2] * 10}, "attn_type_list"),
        ({"attn_type_list": [False] * 80}, "attn_type_list"),
        ({"attn_type_list": 3}, "attn_type_list"),
        ({"layer_types": ["full_attention"] * 80}, "layer_types"),
        ({"layer_types": ["mamba"] * 80}, "layer_types"),
        ({"full_attn_alpha_factor": 1.0}, "layernorm_full_attention_alpha"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_mtp_modules": 3}, "num_mtp_modules"),
        ({"hidden_size": "6144"}, "hidden_size"),
        ({"hidden_size": 6144.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rms_norm_eps": [1e-5]}, "rms_norm_eps"),
        ({"rotary_dim": 63}, "rotary_dim"),
        ({"rotary_dim": 256}, "rotary_dim"),
        ({"num_key_value_heads": 7}, "num_key_value_heads"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"eos_token_id": 200064}, "eos_token_id"),
    ],
)
def test_a_change_of_the_model_is_refused_by_name(change: dict, key: str):
    with pytest.raises(ConfigError, match=key) as caught:
        read_config(TEXT_01 | change)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


REQUIRED = sorted(
    set(TEXT_01)
    - set(
        "architectures attention_dropout auto_map bos_token_id eos_token_id initializer_range model_type "
        "output_router_logits rope_scaling router_aux_loss_coef router_jitter_noise shared_intermediate_size "
        "shared_moe_mode sliding_window tie_word_embeddings transformers_version use_cache".split()
    )
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str):
    values = {name: value for name, value in TEXT_01.items() if name != key}
    with pytest.raises(ConfigError, match=key):
        read_config(values)
    if key == "postnorm":
        return  # built into the -hf class
    renamed = native()
    del renamed[{"attn_type_list": "layer_types"}.get(key, RENAMED.get(key, key))]
    with pytest.raises(ConfigError, match="required key"):
        read_config(renamed)


def test_missing_rotary_dim_says_why():
    values = native()
    del values["rotary_dim"]
    with pytest.raises(ConfigError, match="64 of a head's 128 channels"):
        read_config(values)


def test_unknown_keys_that_switch_nothing_are_ignored():
    harmless = {"a": None, "b": False, "c": 0, "d": [], "e": {}, "f": "", "torch_dtype": "bfloat16", "pad_token_id": 5}
    assert read_config(TEXT_01 | harmless) == preset("text-01")


def test_vl_outer_level_is_checked_too():
    with pytest.raises(ConfigError, match="use_new_attention"):
        read_config(vl() | {"use_new_attention": True})
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        read_config(vl() | {"tie_word_embeddings": True})
    with pytest.raises(ConfigError, match="text_config"):
        read_config({key: value for key, value in vl().items() if key != "text_config"})
    with pytest.raises(ConfigError, match=r"text_config\.model_type"):
        read_config(vl() | {"text_config": TEXT_01 | {"model_type": "qwen2"}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"a": 1, "a": 2}',
        '{"rope_theta": NaN}',
        "[" * 100000,
        '{"a": ' * 5000,
        '{"a": ' + "9" * 5000 + "}",
        "\ufeff{}",
    ],
)
def test_a_malformed_file_is_one_clear_error(tmp_path, text: str):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


def test_unreadable_files_are_clear_errors(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "nothing.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match=r"pipe\.json: is not a file"):
        read_config(tmp_path / "pipe.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_config(tmp_path)


@untimed
@given(
    st.dictionaries(
        st.sampled_from([*TEXT_01, "layer_types", "rope_parameters", "quantization_config", "new_key"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text("ab_é", max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab_é", max_size=5), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_no_value_crashes_the_reader(changes: dict):
    for base in (TEXT_01, native(), vl()):
        with contextlib.suppress(ConfigError):
            assert isinstance(read_config(base | changes), ModelConfig)


@st.composite
def odd_models(draw: st.DrawFn) -> ModelConfig:
    """Sizes, patterns of layers and constants that no published model has."""
    kinds = draw(st.lists(st.sampled_from(["lightning", "softmax"]), min_size=1, max_size=9))
    size, number = st.integers(1, 2**31 - 1), st.floats(-1e20, 1e20)
    scale = st.builds(ResidualScale, number, number)
    head_dim, kv_heads, experts, vocabulary = (draw(st.integers(low, 1 << 20)) for low in (2, 1, 1, 200026))
    return dataclasses.replace(
        preset(draw(st.sampled_from(["text-01", "vl-01"]))),
        layer_kinds=tuple(kinds),
        slope_layers=len(kinds),
        hidden_size=draw(size),
        head_dim=head_dim,
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * draw(st.integers(1, 64)),
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        intermediate_size=draw(size),
        vocab_size=vocabulary,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        rope_theta=draw(st.floats(1e-3, 1e12)),
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        lightning_scale=draw(scale),
        softmax_scale=draw(scale),
        mlp_scale=draw(scale),
        max_position_embeddings=draw(size),
        bos_token_id=draw(st.none() | st.integers(0, vocabulary - 1)),
        eos_token_id=draw(st.integers(0, vocabulary - 1)),
    )


@untimed
@given(odd_models())
def test_odd_models_survive_every_schema_and_their_description(config: ModelConfig):
    for schema in SCHEMAS:
        written = json.loads(json.dumps(config_to_schema(config, schema)))
        assert read_config(written) == config_for_schema(config, schema)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"mlp_scale": {"alpha": "1", "beta": 1.0}}, "mlp_scale"),
        ({"softmax_scale": {"alpha": 1.0, "beta": float("inf")}}, "softmax_scale"),
        ({"lightning_scale": {"alpha": 1.0}}, "beta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"layer_kinds": ["mamba"] * 8}, "layer 0"),
        ({"heads": 4}, "heads"),
    ],
)
def test_a_description_of_another_model_is_refused_by_name(change: dict, key: str):
    """Descriptions stand in engines and result files, which are as untrusted as checkpoints."""
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict(preset("tiny").to_dict() | change)


def test_truncated_model_cannot_be_written():
    with pytest.raises(ConfigError, match="first layers"):
        config_to_schema(preset("tiny").truncated(3), "original")
    with pytest.raises(ConfigError, match="unknown schema"):
        config_to_schema(preset("tiny"), "gguf")  # type: ignore[arg-type]


def test_reading_needs_no_heavy_imports():
    code = "import sys, model_defs.config_schemas; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'onnx')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
