"""What `validate` finds of an engine with a vision half."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from plain_models import PLAIN

from model_defs.checkpoint.create import create_checkpoint
from model_defs.presets import preset
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.errors import MxcompileError
from mxcompile.validation import ValidationOptions, validate

OPTIONS = ValidationOptions(quick=True, lengths=(1,), threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vision = dataclasses.replace(preset("tiny-vl").vision, num_hidden_layers=1, image_token_id=95)
    config = dataclasses.replace(PLAIN, family="vl-01", tensor_prefix="language_model.", vision=vision)
    path = tmp_path_factory.mktemp("vl") / "checkpoint"
    create_checkpoint(config, path, seed=3, dtype="float32", with_tokenizer=False)
    return path


def load(folder, **limits):
    return PyTorchSession.load(
        folder, vision=True, **({"threads": 1, "max_seq_len": 320, "max_batch_size": 4} | limits)
    )


@pytest.fixture(scope="module")
def reference(folder):
    return load(folder)


def groups(report) -> dict[str, str]:
    return {check.group: check.status for check in report.checks if "image" in check.group.lower()}


def test_an_engine_like_the_reference_passes(folder, reference):
    report = validate(load(folder), reference, OPTIONS)
    assert report.passed, report.verdict
    assert not report.not_run
    found = groups(report)
    assert len(found) == 7
    assert "Greedy answer about images against PyTorch" in found
    assert report.to_dict()["engine"]["vision"]["image_token_id"] == 95


def test_wrong_features_are_named(folder, reference):
    """Rows of another order, as a wrong tiling gives them."""
    engine = load(folder)
    right = engine.image_features
    engine.image_features = lambda images: np.roll(right(images), 1, axis=0)
    report = validate(engine, reference, OPTIONS)
    assert not report.passed
    assert report.fault.kind == "vision half"
    assert set(groups(report).values()) == {"failed"}


def test_features_in_the_wrong_places_fail(folder, reference):
    """Off by one token, which no check of the features alone can see."""
    engine = load(folder)
    right = engine.new_state

    def shifted(batch):
        state = right(batch)
        put = state.place_images
        state.place_images = lambda row, places, features: put(row, places + 1, features)
        return state

    engine.new_state = shifted
    report = validate(engine, reference, OPTIONS)
    found = groups(report)
    assert found["Image features against PyTorch"] == "passed"
    assert found["Prefill logits with images against PyTorch"] == "failed"
    assert found["Greedy answer about images against PyTorch"] == "failed"
    assert report.fault.kind == "vision half"
    assert "places" in report.fault.part


def test_other_preprocessing_is_no_engine_of_the_checkpoint(folder, reference):
    engine = load(folder)
    half = dataclasses.replace(engine.config.vision, mean=[0.5, 0.5, 0.5])
    engine._config = dataclasses.replace(engine.config, vision=half)
    with pytest.raises(MxcompileError, match="prepare images differently: mean"):
        validate(engine, reference, OPTIONS)


def test_what_does_not_fit_is_said(folder, reference):
    report = validate(load(folder, max_seq_len=30), reference, OPTIONS)
    assert any(item.check == "prompts with images" for item in report.not_run)
    text = PyTorchSession.load(folder, threads=1, max_seq_len=320, max_batch_size=4)
    assert not groups(validate(text, reference, OPTIONS))
    report = validate(load(folder), text, OPTIONS)
    assert any(item.check == "images" for item in report.not_run)
