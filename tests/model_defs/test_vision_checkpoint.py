"""Checkpoints with a vision half: written in the published layout, and held to every tensor of it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from checkpoint_helpers import load_all, rewrite

from model_defs.checkpoint.create import create_checkpoint
from model_defs.checkpoint.names import expected_tensors
from model_defs.checkpoint.processor import PUBLISHED_PROCESSING, read_processing
from model_defs.checkpoint.reader import Checkpoint
from model_defs.checkpoint.verify import verify
from model_defs.errors import ConfigError
from model_defs.presets import preset

TOWER = "vision_tower.vision_model."


@pytest.fixture
def vl(tmp_path):
    create_checkpoint(preset("tiny-vl"), tmp_path / "vl", dtype="float32")
    return tmp_path / "vl"


def problems(folder) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in verify(Checkpoint.open(folder)).problems]


def test_published_names():
    names = sorted(expected_tensors(preset("vl-01")))
    assert len(names) == 8637
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert digest == "d0caf1b714cdfc4caa65b56cbec591668d77b0e2a5d6cf3b5af169531311c886"


def test_created_checkpoint_is_whole(vl):
    opened = Checkpoint.open(vl)
    assert opened.config == preset("tiny-vl")
    report = verify(opened, scan_values=True)
    assert report.ok
    assert report.tensors_checked == len(expected_tensors(opened.config))
    assert read_processing(vl, opened.config.vision) == PUBLISHED_PROCESSING
    tokens = {t["content"]: t["id"] for t in json.loads((vl / "tokenizer.json").read_text())["added_tokens"]}
    assert tokens["<image>"] == opened.config.vision.image_token_id


def test_the_text_half_is_that_of_the_text_checkpoint(vl, tmp_path):
    text = create_checkpoint(preset("tiny"), tmp_path / "text", dtype="float32")
    opened = Checkpoint.open(vl)
    for name in text.entries:
        np.testing.assert_array_equal(opened.array(f"language_model.{name}"), text.array(name))


def test_every_vision_tensor_is_needed_in_its_shape(vl):
    tensors = load_all(vl)
    del tensors["image_newline"]
    lost = f"{TOWER}encoder.layers.1.mlp.fc1.bias"
    del tensors[lost]
    bent = f"{TOWER}embeddings.position_embedding.weight"
    tensors[bent] = tensors[bent][:-1]
    tensors[f"{TOWER}encoder.layers.7.mlp.fc1.bias"] = np.zeros(128, np.float32)
    rewrite(vl, tensors)
    assert sorted(problems(vl)) == [
        ("missing", "image_newline"),
        ("missing", lost),
        ("shape", bent),
        ("unexpected", f"{TOWER}encoder.layers.7.mlp.fc1.bias"),
    ]


def test_names_of_transformers_and_what_its_class_has_more(vl):
    tensors = load_all(vl)
    turned = {
        name.replace(TOWER, "model.vision_tower.")
        .replace("multi_modal", "model.multi_modal")
        .replace("image_newline", "model.image_newline"): value
        for name, value in tensors.items()
    }
    turned["model.vision_tower.post_layernorm.weight"] = np.ones(64, np.float32)
    turned["model.vision_tower.embeddings.position_ids"] = np.arange(17)[None]
    rewrite(vl, turned)
    assert problems(vl) == []
    opened = Checkpoint.open(vl)
    for name, value in tensors.items():
        np.testing.assert_array_equal(opened.array(name), value)


def test_the_text_half_alone_does_not_ask_for_vision(vl):
    opened = Checkpoint.open(vl)
    report = verify(opened, config=opened.config.text_only())
    assert report.ok
    assert report.tensors_ignored == len(opened.config.vision.tensors(128))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resample": 2}, "resample"),
        ({"size": {"height": 336, "width": 336}}, "size"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"process_image_mode": "resize"}, "process_image_mode"),
    ],
)
def test_other_preprocessing_is_refused(vl, change: dict, named: str):
    file = vl / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=named):
        read_processing(vl, preset("tiny-vl").vision)
    assert problems(vl) == [("preprocessor", "preprocessor_config.json")]


def test_preprocessing_is_read(vl):
    file = vl / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}))
    found = read_processing(vl, preset("tiny-vl").vision)
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    file.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_processing(vl, preset("tiny-vl").vision)
    file.unlink()
    assert read_processing(vl, preset("tiny-vl").vision) == PUBLISHED_PROCESSING
