"""What `validate` compares, by which limits, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from plain_models import plain_checkpoint

from engines.config import EngineConfig
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.errors import MxcompileError
from mxcompile.validation import ValidationOptions, validate
from mxcompile.validation.judge import Judge
from mxcompile.validation.metrics import kl_divergence, relative_norm
from mxcompile.validation.observe import RowTrace, compared_positions
from mxcompile.validation.thresholds import EXACT, FLOAT32, LOGIT_SCALE, Yardstick, rounded_thresholds, thresholds_for

LIMITS = {"threads": 1, "max_seq_len": 320, "max_batch_size": 4}
OPTIONS = ValidationOptions(quick=True, lengths=(1, 65), threads=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return plain_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint")


def test_an_onnxruntime_engine_passes(checkpoint, tmp_path):
    """The default target end to end, and moved checkpoints and engines of others."""
    build(checkpoint.folder, tmp_path / "engine", max_batch_size=4, max_seq_len=320, threads=1)
    report = validate(tmp_path / "engine", checkpoint.folder, OPTIONS)
    assert report.passed, report.verdict
    assert report.engine["target"] == "onnxruntime"
    assert len(report.layers) == 4
    assert not report.not_run
    create_checkpoint(checkpoint.config, tmp_path / "other", seed=4, with_tokenizer=False)
    with pytest.raises(MxcompileError, match="another checkpoint") as error:
        validate(tmp_path / "engine", tmp_path / "other", OPTIONS)
    assert error.value.exit_code == 2
    forced = validate(tmp_path / "engine", tmp_path / "other", dataclasses.replace(OPTIONS, force=True))
    assert not forced.passed
    assert forced.fault.layer == 0


def test_another_architecture_is_refused(checkpoint, tmp_path):
    other = plain_checkpoint(tmp_path / "other", intermediate_size=32)
    with pytest.raises(MxcompileError, match="intermediate_size is 32 in the engine and 48") as error:
        validate(PyTorchSession.load(other, **LIMITS), PyTorchSession.load(checkpoint, **LIMITS), OPTIONS)
    assert error.value.exit_code == 2


def test_a_small_engine_runs_what_fits_and_says_what_does_not(checkpoint):
    engine = PyTorchSession.load(checkpoint, threads=1, max_seq_len=40, max_batch_size=2)
    report = validate(engine, checkpoint, OPTIONS)
    assert report.passed, report.verdict
    left_out = {item.check: item.reason for item in report.not_run}
    assert "prompts of 65 tokens" in left_out
    assert "36 tokens run instead" in left_out["prompts of 65 tokens"]
    assert any("2 rows" in reason for reason in left_out.values())
    assert any(check.startswith("Greedy") for check in left_out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_types_are_measured_by_pytorch_in_the_same_type(checkpoint, dtype):
    report = validate(PyTorchSession.load(checkpoint, dtype, **LIMITS), checkpoint, OPTIONS)
    assert report.passed, report.verdict
    assert not report.thresholds["exact"]
    assert dtype in report.thresholds["limits"]["logits"]["reason"]
    assert report.thresholds["limits"]["logits"]["value"] > FLOAT32.logits.value
    with pytest.raises(MxcompileError, match="against a checkpoint"):
        validate(PyTorchSession.load(checkpoint, dtype, **LIMITS), PyTorchSession.load(checkpoint, **LIMITS), OPTIONS)


def test_limits_are_those_of_the_engines_dtype(checkpoint):
    config = PyTorchSession.load(checkpoint, **LIMITS).config
    assert thresholds_for(config) is FLOAT32
    assert thresholds_for(dataclasses.replace(config, dtype="float64")) is EXACT["float64"]
    assert thresholds_for(dataclasses.replace(config, dtype="bfloat16")) is None
    refused: list[tuple[EngineConfig, str]] = [
        (dataclasses.replace(config, dtype="int3"), "int3"),
        (dataclasses.replace(config, quantization={"experts": "int4"}), "int4"),
    ]
    for changed, word in refused:
        with pytest.raises(MxcompileError, match=word):
            thresholds_for(changed)
    assert all(limit.reason for limits in EXACT.values() for limit in limits.limits().values())
    # The promise of the project for fp32 engines.
    assert (FLOAT32.logits.value, FLOAT32.states.value) == (2e-4, 1e-4)


@pytest.mark.parametrize(
    "wrong", [{"lengths": (0,)}, {"lengths": ()}, {"reference_dtype": "int8"}, {"seed": -1}], ids=str
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(MxcompileError):
        ValidationOptions(**wrong)


def trace(logits, margins=None):
    count = len(logits)
    return RowTrace(np.arange(count), np.arange(count), np.asarray(logits, np.float32), margins_Ln=margins)


def errors_at(positions, count=20):
    """Logits of `count` positions, and the same with an error from each of `positions` on."""
    reference = np.zeros((count, 5), np.float32)
    other = reference.copy()
    other[positions, 2] = 1.0
    return reference, other


def margins(ties, layers=3, count=20):
    """Router margins of 1 but for near-ties at (layer, position)."""
    out = np.ones((layers, count), np.float32)
    for layer, position in ties:
        out[layer, position] = 1e-5
    return out


@pytest.mark.parametrize(
    ("wrong", "ties", "judged", "status"),
    [
        ([], [(1, 4)], 20, "passed"),  # a tie that changes nothing sets nothing aside
        ([15, 16, 19], [(1, 15)], 15, "passed"),  # the error begins at the tie: rerouted
        ([15, 16, 19], [(1, 14)], 20, "failed"),  # it begins behind it: not the tie's doing
        ([15, 16, 19], [], 20, "failed"),
        ([3, 15], [(1, 15)], 20, "failed"),
        ([4, 5, 6], [(0, 4)], 4, "inconclusive"),  # too little is left
    ],
)
def test_a_router_tie_explains_only_what_begins_at_it(wrong, ties, judged, status):
    judge = Judge(FLOAT32, 6.0)
    reference, other = errors_at(wrong)
    compared = judge.compare("case", [trace(reference, margins(ties))], [trace(other)])
    check = judge.logits_check("group", compared)
    assert (check.judged, check.compared, check.status) == (judged, 20, status)
    assert len(judge.reroutes) == len(check.notes) == (judged < 20)
    if check.notes:
        tie = judge.reroutes[0]
        assert (tie.layer, tie.position) == ties[0]
        assert f"layer {tie.layer}" in check.notes[0]


def test_only_states_behind_a_tie_are_set_aside():
    from engines.interface import RowSnapshot

    def snapshot(scale):
        recurrent = {layer: np.full((2, 3, 3), 1.0 + scale * (layer == 2), np.float32) for layer in range(3)}
        return RowSnapshot(20, recurrent, {}, {})

    judge = Judge(FLOAT32, 6.0)
    reference, other = errors_at([15])
    for tied, status in ((1, "passed"), (2, "failed")):  # layer 2 lies behind a tie in layer 1, not behind its own
        rows = trace(reference, margins([(tied, 15)])), trace(other)
        rows[0].snapshots[20], rows[1].snapshots[20] = snapshot(0.0), snapshot(0.5)
        assert judge.states_check("group", judge.compare("case", [rows[0]], [rows[1]])).status == status


def test_limits_on_logits_follow_their_scale():
    reference, other = errors_at([3])
    other[3, 2] = 3e-4
    for scale, status in ((6.0, "failed"), (12.0, "passed"), (3.0, "failed")):
        judge = Judge(FLOAT32, scale)
        assert judge.logits_check("g", judge.compare("c", [trace(reference)], [trace(other)])).status == status


def test_metrics_know_what_is_not_finite_and_what_is_equal():
    logits = np.array([[1.0, 2.0, 3.0], [0.0, np.nan, 1.0]], np.float32)
    assert kl_divergence(logits[:1], logits[:1]).tolist() == [0.0]
    assert kl_divergence(logits[1:], logits[1:]).tolist() == [np.inf]
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    np.testing.assert_allclose(kl_divergence(p, q), 0.25 * np.log(2), rtol=1e-12)
    zero = np.zeros((1, 3))
    assert relative_norm(zero, zero).tolist() == [0.0]
    assert relative_norm(zero, zero + 1).tolist() == [np.inf]


@pytest.mark.parametrize(("length", "vocab"), [(1, 200_064), (1000, 16_384), (1000, 200_064), (100_000, 512)])
def test_compared_positions_hold_both_ends_and_stay_within_memory(length, vocab):
    positions = compared_positions(length, vocab)
    assert positions[0] == 0
    assert positions[-1] == length - 1
    assert (np.diff(positions) > 0).all()
    assert len(positions) * vocab <= 2 * (1 << 24) or len(positions) == length
    if len(positions) < length:
        assert {63, 64, length - 2} <= set(positions.tolist())


@pytest.mark.parametrize(("moved", "passes"), [(slice(50, None), True), (slice(None), False)])
def test_next_tokens_need_what_the_yardstick_reaches_on_the_same_positions(moved, passes):
    """On its own prompt the yardstick kept every first token among the best; on these positions, half of them."""
    reference = np.zeros((100, 10), np.float32)
    reference[np.arange(100), np.arange(100) % 10] = 1.0

    def without_first(positions):
        logits = reference.copy()
        logits[np.arange(100)[positions], np.arange(100)[positions] % 10] = -1.0
        return trace(logits)

    limits = rounded_thresholds(Yardstick("int8", (1.0, 1.0, 1.0), (1.0, 1.0), (1.0, 1.0), 1.0, 1.0, topk=1.0))
    judge = Judge(limits, logit_scale=LOGIT_SCALE)
    source = trace(reference)
    source.yardstick = without_first(slice(0, 50))
    compared = judge.compare("made", [source], [without_first(moved)])
    check = judge.next_token_check([compared])
    assert (check.status == "passed") == passes
    assert check.measures[1].limit == pytest.approx(0.45)
