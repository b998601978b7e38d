"""A checkpoint with a vision half, built and asked about images: answers are those of the PyTorch definition, in any pieces."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from cli_process import environment
from PIL import Image

import mxcompile
from engines.errors import EngineError
from engines.generation import Generation, GenerationError
from engines.vision.pixels import prepare
from engines.vision.placed import PlacedImages
from engines.vision.prompts import expand
from model_defs.presets import preset
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.chat import opening, render
from mxcompile.errors import MxcompileError
from mxcompile.refitting import refit
from mxcompile.validation import ValidationOptions, validate

SMALL = dataclasses.replace(preset("tiny-vl"), layer_kinds=("lightning", "softmax"), slope_layers=2)
# Two fp32 programs that add in different orders, as validation allows (mxcompile/validation/thresholds.py), over 2 layers.
TOLERANCE = 2e-4


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vl")
    mxcompile.create_checkpoint(SMALL, root / "checkpoint", dtype="float32")
    mxcompile.build(root / "checkpoint", root / "engine", max_seq_len=700, max_batch_size=4, threads=1)
    return root


@pytest.fixture(scope="module")
def engine(folders):
    return mxcompile.load(folders / "engine", threads=1)


@pytest.fixture(scope="module")
def reference(folders):
    return PyTorchSession.load(folders / "checkpoint", vision=True, threads=1, max_seq_len=700)


def prepared(engine, *sizes):
    return [prepare(picture(*size, seed=i), engine.config.vision) for i, size in enumerate(sizes)]


def test_features_are_the_definitions(engine, reference):
    """19 tiles go through the graph four at a time."""
    images = prepared(engine, (28, 28), (60, 100), (56, 168))
    mine, theirs = engine.session.image_features(images), reference.image_features(images)
    assert mine.shape == (sum(image.tokens for image in images), SMALL.hidden_size)
    error = np.linalg.norm(mine - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert error.max() < 1e-4  # as any hidden state


def test_answers_are_the_definitions_in_any_pieces(engine, reference):
    images = prepared(engine, (60, 40), (30, 90))
    mark = engine.config.vision.image_token_id
    text = engine.tokens("Compare <image> with <image>: what is new?")
    ids = expand(text, images, mark)
    expected = Generation(reference, [ids], images=[images], prefill_chunk=len(ids)).results()[0].tokens
    assert len(expected) == 128
    for chunk in (None, 1, 7, 64):
        shown = [picture(60, 40, 0), picture(30, 90, 1)]
        found = engine.generate([text], images=[shown], prefill_chunk=chunk, max_new_tokens=128)[0]
        assert found.tokens == expected
        assert found.prompt_tokens == len(ids)
    assert engine.generate([ids])[0].tokens != expected  # without the images the same tokens mean nothing


def logits_of(session, rows, images, chunk=None):
    """Last logits of a batch of prompts with images."""
    mark, state = session.config.vision.image_token_id, session.new_state(len(rows))
    prompts = [expand(row, shown, mark) for row, shown in zip(rows, images, strict=True)]
    for row, shown in enumerate(images):
        if shown:
            places = np.flatnonzero(np.asarray(prompts[row]) == mark)
            state.place_images(row, places, session.image_features(shown))
    return session.prefill(prompts, state, chunk), state


def test_ragged_batches_of_rows_with_and_without_images(engine, reference):
    a, b = prepared(engine, (40, 30), (28, 84))
    mark = engine.config.vision.image_token_id
    rows, images = [[5, mark, 6], [1, 2, 3], [mark, mark, 9], []], [[a], [], [a, b], []]
    expected, _ = logits_of(reference, rows, images)
    for chunk in (None, 16):
        found, state = logits_of(engine.session, rows, images, chunk)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        assert not state.images  # nothing is kept once it was used
    for row, shown in ((0, [a]), (2, [a, b])):
        alone, _ = logits_of(engine.session, [rows[row]], [shown])
        np.testing.assert_allclose(alone[0], expected[row], rtol=0, atol=TOLERANCE)


def test_an_image_in_a_later_turn(engine, reference):
    (image,) = prepared(engine, (50, 50))
    mark = engine.config.vision.image_token_id
    found = []
    for session in (engine.session, reference):
        state = session.new_state(1)
        session.prefill([[7, 8, 9, 10]], state)
        state.place_images(0, np.arange(5, 5 + image.tokens), session.image_features([image]))
        assert state.images.nbytes == image.tokens * SMALL.hidden_size * 4
        session.decode([11], state)  # a token before the image, and the image token by token
        for _ in range(image.tokens):
            last = session.decode([mark], state)
        assert not state.images
        found.append(last)
    np.testing.assert_allclose(*found, rtol=0, atol=TOLERANCE)


def test_chat_continues_behind_an_image(engine):
    state = engine.new_state(1)
    first = engine.start(["<image>"], images=[[picture(30, 30)]], state=state, max_new_tokens=3).results()[0]
    more = engine.start([[*first.unfed_tokens, 4, 5]], state=state, max_new_tokens=3).results()[0]
    whole = [*engine.tokens("<image>"), *first.tokens, 4, 5]
    again = engine.generate([whole], images=[[picture(30, 30)]], max_new_tokens=3)[0]
    assert again.tokens == more.tokens


def test_image_tokens_count_towards_the_limit(engine):
    (image,) = prepared(engine, (28, 168))
    text = "<image>" * (700 // image.tokens + 1)
    with pytest.raises(GenerationError, match="holds at most 700"):
        engine.generate(text, images=[picture(28, 168)] * text.count("<"))


@pytest.mark.parametrize(
    ("prompt", "images", "said"),
    [
        ("no mark", 1, "no <image> marks for 1 image"),
        ("<image><image>", 1, "2 <image> marks for 1 image"),
        ("<image>", 0, "1 <image> mark for no images"),
        ("<image>", 2, "1 <image> mark for 2 images"),
    ],
)
def test_marks_and_images_must_agree(engine, prompt, images, said):
    with pytest.raises(EngineError, match=said) as caught:
        engine.generate(prompt, images=[picture(9, 9)] * images)
    assert caught.value.exit_code == 2


def test_text_alone_is_that_of_the_text_checkpoint(engine, folders, tmp_path):
    text = dataclasses.replace(preset("tiny"), layer_kinds=SMALL.layer_kinds, slope_layers=2)
    mxcompile.create_checkpoint(text, tmp_path / "text", dtype="float32")
    mxcompile.build(tmp_path / "text", tmp_path / "engine", max_seq_len=64, threads=1)
    plain = mxcompile.load(tmp_path / "engine", threads=1)
    ids = [[1, 2, 3, 4, 5], [9, 8]]
    assert [r.tokens for r in plain.generate(ids, max_new_tokens=20)] == [
        r.tokens for r in engine.generate(ids, max_new_tokens=20)
    ]
    assert "vision" not in json.loads((tmp_path / "engine" / "config.json").read_text())
    assert plain.generate("<image>", max_new_tokens=1).text is not None  # only letters to it
    with pytest.raises(MxcompileError, match="no vision half"):
        plain.generate("<image>", images=[picture(9, 9)])
    with pytest.raises(EngineError, match="no vision half"):
        plain.session.image_features([])


def test_wrong_places_are_refused():
    waiting = PlacedImages(4)
    good = np.zeros((2, 4), np.float32)
    for places, features in (([3, 3], good), ([0, 1], good), ([3, 4], good[:1]), ([3, 4], np.zeros((2, 5)))):
        with pytest.raises(EngineError):
            waiting.put(0, np.array(places), features, 2)
    assert not waiting
    waiting.put(1, np.array([3, 5]), good, 2)
    waiting.passed(np.array([9, 5]))
    assert waiting
    waiting.passed(np.array([9, 6]))
    assert not waiting


def test_a_changed_vision_file_is_found(folders, tmp_path):
    copy = tmp_path / "engine"
    shutil.copytree(folders / "engine", copy)
    with (copy / "vision.onnx").open("r+b") as file:
        file.seek(200)
        file.write(b"X")
    with pytest.raises(EngineError, match=r"vision\.onnx"):
        mxcompile.load(copy)
    (copy / "vision.onnx").unlink()
    with pytest.raises(EngineError, match=r"vision\.onnx: missing"):
        mxcompile.load(copy)


def test_validation_covers_the_images(folders):
    report = validate(
        folders / "engine", folders / "checkpoint", ValidationOptions(quick=True, lengths=(1,), threads=1)
    )
    assert report.passed, report.verdict
    assert sum("image" in check.group.lower() for check in report.checks) == 11


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tile", 0),
        ("patches_per_side", 29),
        ("image_token_id", 512),
        ("pinpoints", []),
        ("pinpoints", [[28, 30]]),
        ("pinpoints", [[28 * 1000, 28 * 1000]]),
        ("mean", [0.5]),
        ("std", [0.5, 0.0, 0.5]),
    ],
)
def test_a_senseless_description_is_refused(folders, tmp_path, key: str, value: object):
    shutil.copytree(folders / "engine", tmp_path / "engine")
    file = tmp_path / "engine" / "config.json"
    values = json.loads(file.read_text())
    values["vision"][key] = value
    file.write_text(json.dumps(values))
    with pytest.raises(EngineError, match="rebuild the engine"):
        mxcompile.load(tmp_path / "engine", threads=1)


def test_refit_takes_the_other_checkpoints_vision_half(folders, tmp_path):
    shutil.copytree(folders / "engine", tmp_path / "engine")
    mxcompile.create_checkpoint(SMALL, tmp_path / "other", seed=5, dtype="float32")
    refit(tmp_path / "engine", tmp_path / "other")
    report = validate(tmp_path / "engine", tmp_path / "other", ValidationOptions(quick=True, lengths=(1,), threads=1))
    assert report.passed, report.verdict
    mxcompile.create_checkpoint(SMALL.text_only(), tmp_path / "text", seed=6, schema="vl-01")
    with pytest.raises(MxcompileError, match="has no vision half, but the engine has one"):
        refit(tmp_path / "engine", tmp_path / "text")


def test_inspect_shows_the_vision_half(folders):
    of_engine, of_checkpoint = (mxcompile.inspect(folders / name) for name in ("engine", "checkpoint"))
    assert of_engine["architecture"]["vision"] == of_checkpoint["architecture"]["vision"]
    assert of_engine["architecture"]["vision"].startswith("3 layers of 64, tiles of 28 pixels and 16 tokens")
    assert of_engine["parameters"]["vision tower"] > of_engine["parameters"]["projector"] > 0
    assert of_engine["memory"][0]["vision weights, from the first image on"] > 0
    assert {"vision.onnx", "vision.weights.json", "vision.weights.bin"} <= set(of_engine["files"])


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mxcompile", "run", *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def test_run_answers_about_images(folders, engine, tmp_path):
    """In a chat, images without marks come before the text; their number must fit wherever there are marks."""
    picture(60, 40).save(tmp_path / "a.png")
    picture(30, 30, 1).save(tmp_path / "b.jpg")
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:1000])
    both = ["--image", tmp_path / "a.png", "--image", tmp_path / "b.jpg"]
    answer = run(folders / "engine", "--chat", "--prompt", "What?", *both, "--max-new-tokens", 5, "--json")
    assert answer.returncode == 0, answer.stderr
    prompt = render(opening(None, "<image><image>What?"))
    files = [tmp_path / "a.png", tmp_path / "b.jpg"]
    assert json.loads(answer.stdout)["tokens"] == engine.generate(prompt, images=files, max_new_tokens=5).tokens
    for arguments, said in (
        (["--prompt", "What?", *both], "no <image> marks for 2 images"),
        (["--prompt", "<image>", "--image", tmp_path / "bad.png"], "bad.png: the image is damaged"),
    ):
        refused = run(folders / "engine", *arguments)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
        assert said in refused.stderr
