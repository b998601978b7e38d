"""Opening checkpoints: sharded, single, as transformers writes them, and damaged ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import MICRO, load_all, raw_header, rewrite

from model_defs.checkpoint import reader
from model_defs.checkpoint.names import DERIVED_BUFFERS, expected_tensors, ignorable, layer_of
from model_defs.checkpoint.reader import Checkpoint
from model_defs.checkpoint.verify import require_complete, verify
from model_defs.errors import CheckpointError, ConfigError
from model_defs.presets import preset


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_text_01_has_the_published_number_of_tensors_and_parameters():
    config = preset("text-01")
    shapes = expected_tensors(config)
    assert len(shapes) == 8243
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 456_089_655_296  # facts, 8.1
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (24576, 6144)
    assert shapes["model.layers.79.self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)


def test_views_are_the_stored_values_without_copies(micro):
    checkpoint = Checkpoint.open(micro)
    stored = load_all(micro)
    assert set(checkpoint.entries) == set(stored) == set(expected_tensors(MICRO))
    for name, expected in stored.items():
        found = checkpoint.array(name)
        np.testing.assert_array_equal(found, expected)
        assert not found.flags.writeable
        assert not found.flags.owndata
    names = list(stored)
    same_file = [n for n in names if checkpoint.entries[n].file == checkpoint.entries[names[0]].file]
    addresses = {n: checkpoint.array(n).__array_interface__["data"][0] for n in same_file}
    base = {addresses[n] - checkpoint.entries[n].offset for n in same_file}
    assert len(base) == 1  # one mapping, every tensor at its own offset in it
    assert checkpoint.total_bytes == sum(array.nbytes for array in stored.values())
    assert {path.name for path in checkpoint.tokenizer_files} >= {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
def test_stored_types_are_kept(micro, dtype: str):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    for path in micro.glob("model*"):
        path.unlink()
    values = torch.linspace(-3, 3, 64).reshape(4, 16).to(getattr(torch, dtype))
    save_file({"x": values, "odd": torch.zeros(3, dtype=torch.uint8)}, micro / "model.safetensors")
    found = Checkpoint.open(micro).array("x")
    assert found.dtype == np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    np.testing.assert_array_equal(found.astype(np.float32), values.float().numpy())


def test_a_tensor_off_alignment_is_read(micro):
    for path in micro.glob("model*"):
        path.unlink()
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    data = b"\x07" + np.array([1.5, -2, 3], "<f4").tobytes()
    (micro / "model.safetensors").write_bytes(raw_header(header, data))
    np.testing.assert_array_equal(Checkpoint.open(micro).array("x"), [1.5, -2, 3])


def test_links_into_another_folder_are_followed(micro, tmp_path):
    """The Hugging Face cache links file names to blobs elsewhere."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    before = Checkpoint.open(micro).fingerprint()
    for number, path in enumerate(sorted(micro.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(blobs / str(number))
    checkpoint = Checkpoint.open(micro)
    assert verify(checkpoint, scan_values=True).ok
    assert checkpoint.fingerprint() == before


def test_derived_buffers_are_ignored(micro):
    tensors = load_all(micro)
    names = [f"model.layers.{layer}.self_attn.{buffer}" for layer in (0, 1) for buffer in DERIVED_BUFFERS]
    rewrite(micro, tensors | {name: np.ones((2, 1, 1), np.float32) for name in names})
    report = verify(Checkpoint.open(micro))
    assert report.ok
    assert report.tensors_ignored == 8
    require_complete(Checkpoint.open(micro), MICRO)


def test_stacked_layout_is_read_as_slices(micro):
    """transformers keeps experts stacked in memory; a file of that layout holds the same bytes."""
    tensors = load_all(micro)
    native = {name: value for name, value in tensors.items() if ".block_sparse_moe." not in name}
    for layer in range(MICRO.num_layers):
        moe = f"model.layers.{layer}.block_sparse_moe"
        experts = range(MICRO.num_local_experts)
        part = {i: [tensors[f"{moe}.experts.{e}.w{i}.weight"] for e in experts] for i in (1, 2, 3)}
        there = f"model.layers.{layer}.mlp"
        native[f"{there}.experts.gate_up_proj"] = np.stack(
            [np.concatenate(pair) for pair in zip(part[1], part[3], strict=True)]
        )
        native[f"{there}.experts.down_proj"] = np.stack(part[2])
        native[f"{there}.gate.weight"] = tensors[f"{moe}.gate.weight"]
    rewrite(micro, native)
    checkpoint = Checkpoint.open(micro)
    assert verify(checkpoint, scan_values=True).ok
    for name, expected in tensors.items():
        np.testing.assert_array_equal(checkpoint.array(name), expected)


def test_vision_tensors_belong_to_vl_01_only():
    vision = "image_newline", "vision_tower.vision_model.pre_layrnorm.bias", "multi_modal_projector.linear_1.weight"
    for name in vision:
        assert ignorable(name, "language_model.")
        assert not ignorable(name)
    assert not ignorable("model.layers.0.shared_mlp.w1.weight")
    assert layer_of("language_model.model.layers.12.self_attn.norm.weight") == 12
    assert layer_of("model.norm.weight") is None


def test_fingerprint_tells_contents_apart(micro, monkeypatch):
    before = Checkpoint.open(micro).fingerprint()
    assert Checkpoint.open(micro).fingerprint() == before
    path = first_shard(micro)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert Checkpoint.open(micro).fingerprint() != before
    content[-1] ^= 1
    path.write_bytes(content)
    config = json.loads((micro / "config.json").read_text())
    (micro / "config.json").write_text(json.dumps(config | {"rope_theta": 5e6}))
    assert Checkpoint.open(micro).fingerprint() != before
    (micro / "config.json").write_text(json.dumps(config, indent=7))  # the same model, written differently
    assert Checkpoint.open(micro).fingerprint() == before
    monkeypatch.setattr(reader, "_FINGERPRINT_WHOLE", 0)  # the sampled way, as for large shards
    sampled = Checkpoint.open(micro).fingerprint()
    content[-1] ^= 1
    path.write_bytes(content)
    assert Checkpoint.open(micro).fingerprint() != sampled


def test_generation_config_supplies_missing_ids(micro):
    config = json.loads((micro / "config.json").read_text())
    (micro / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": None}))
    (micro / "generation_config.json").write_text('{"bos_token_id": 7, "eos_token_id": 8}')
    opened = Checkpoint.open(micro).config
    assert (opened.bos_token_id, opened.eos_token_id) == (7, 8)
    (micro / "generation_config.json").write_text("broken")
    assert Checkpoint.open(micro).config.eos_token_id is None


def test_opening_needs_no_torch():
    code = (
        "import sys, model_defs.checkpoint.verify, model_defs.checkpoint.create;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'onnx', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Bad input -------------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=match) as caught:
        Checkpoint.open(folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_folder_missing_empty_or_a_file(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a folder")


def test_config_missing_or_of_another_architecture(micro):
    config = json.loads((micro / "config.json").read_text())
    (micro / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    refused(micro, "model_type 'mixtral'")
    (micro / "config.json").unlink()
    refused(micro, "config.json is missing")


def test_pickles_are_refused(micro):
    for path in micro.glob("model*"):
        path.unlink()
    refused(micro, "no weights")
    (micro / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(micro, "pickle")


def test_shards_without_an_index(micro):
    (micro / "model.safetensors.index.json").unlink()
    refused(micro, "index.json is missing")


def test_shard_missing(micro):
    shard = first_shard(micro)
    shard.unlink()
    refused(micro, f"{shard.name} is missing")
    report = verify(Checkpoint.open(micro, strict=False))
    kinds = {problem.kind for problem in report.problems}
    assert kinds == {"missing shard", "missing"}
    assert "model.embed_tokens.weight" in {problem.subject for problem in report.problems}


@pytest.mark.parametrize("keep", [0.95, 0.5, 0.01])
def test_shard_truncated(micro, keep: float):
    shard = first_shard(micro)
    os.truncate(shard, int(shard.stat().st_size * keep))
    refused(micro, "truncated")
    report = verify(Checkpoint.open(micro, strict=False), scan_values=True)
    assert any(problem.subject == shard.name for problem in report.problems)
    assert any(problem.kind == "missing" for problem in report.problems)


def test_shard_that_shrinks_while_open(micro):
    checkpoint = Checkpoint.open(micro)
    shard = first_shard(micro)
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match="changed while in use"):
        checkpoint.array("model.embed_tokens.weight")


def test_shard_that_is_an_lfs_pointer(micro):
    first_shard(micro).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(micro, "not a safetensors file")


FOREIGN = [
    "../model.safetensors",
    "/a/b.safetensors",
    "a/b.safetensors",
    "x.bin",
    "",
    3,
    ".safetensors",
    "a\\b.safetensors",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_index_cannot_point_elsewhere(micro, name):
    edit_index(micro, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    refused(micro, "not the name of a safetensors file")


def test_index_and_shards_disagree(micro):
    shard = first_shard(micro).name
    edit_index(micro, lambda weight_map: weight_map.update({"lm_head.weight": shard}))
    refused(micro, f"lm_head.weight is not in {shard}")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{}"])
def test_malformed_index(micro, text: str):
    (micro / "model.safetensors.index.json").write_text(text)
    refused(micro, "index.json")


def test_tensor_stored_twice(micro):
    shard = first_shard(micro)
    shutil.copy(shard, micro / "extra.safetensors")
    edit_index(micro, lambda weight_map: weight_map.update({"model.embed_tokens.weight": "extra.safetensors"}))
    refused(micro, "model.embed_tokens.weight is not in|stored twice")


def test_unknown_tensor_name(micro):
    with pytest.raises(CheckpointError, match="no_such"):
        Checkpoint.open(micro).array("no_such")
