"""`bench --state-drift`: the oracles against plain loops, good and wrong engines, bounds, interruptions and bad input."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from bench_models import two_layers

from engines.onnxruntime.session import OrtSession
from export.contract import router_tap
from model_defs.constants import decay_slopes
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.bench import drift as drift_module
from mxcompile.bench.drift import drift
from mxcompile.bench.drift_oracle import (
    INPUT_ERROR,
    STEP_ROUNDINGS,
    FollowingReference,
    Recurrence,
    U,
    recurrence_limit,
    remembered,
)
from mxcompile.bench.drift_results import MEASURES, DriftReport, read_drift, verdict
from mxcompile.bench.results import write_json
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.errors import MxcompileError


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Three layers, lightning, softmax, lightning, and an engine of them: (checkpoint, engine)."""
    folder = tmp_path_factory.mktemp("deep")
    config = dataclasses.replace(two_layers(), layer_kinds=("lightning", "softmax", "lightning"), slope_layers=3)
    create_checkpoint(config, folder / "checkpoint", seed=7)
    build(folder / "checkpoint", folder / "engine", max_batch_size=1, max_seq_len=300, threads=2)
    return folder / "checkpoint", folder / "engine"


@pytest.fixture(scope="module")
def measured(deep, tmp_path_factory):
    file = tmp_path_factory.mktemp("drift") / "d.json"
    return drift(deep[1], None, (300, 1, 150, 301), threads=2, json_file=file), file


def test_a_good_engine_keeps_every_limit(measured):
    report, file = measured
    assert report.passed
    assert [(row.step, row.layer) for row in report.rows] == [(n, layer) for n in (1, 150, 300) for layer in (0, 2)]
    for row in report.rows:
        assert [item.measure for item in row.errors] == list(MEASURES)
        assert all(0 <= item.error <= item.limit for item in row.errors if item.status == "agrees")
        assert row.of("recurrence").status == row.of("model").status == "agrees"
    assert report.not_run == [{"steps": 301, "reason": "exceeds the engine's max_seq_len 300"}]
    assert read_drift(file) == report
    assert [path.name for path in file.parent.iterdir()] == ["d.json"]  # no file of states is left
    assert "do not drift over 300 decoded tokens" in verdict(report)


def test_the_fp64_recurrence_against_a_loop(checkpoint):
    """Keys and values by the PyTorch definition in fp64, then the recurrence token by token."""
    import torch

    model = PyTorchSession.load(checkpoint, "float64", threads=2).model
    oracle = Recurrence(PyTorchSession.load(checkpoint, threads=2).model)
    x_TD = np.random.default_rng(0).standard_normal((37, model.config.hidden_size), np.float32)
    for part in (x_TD[:1], x_TD[1:30], x_TD[30:]):
        oracle.feed({0: part})
    block = model.layers[0]
    wide = torch.from_numpy(x_TD).double()
    normed = wide / (wide**2).mean(-1, keepdim=True).add(block.eps).sqrt() * block.input_layernorm.weight
    qkv = torch.nn.functional.silu(block.self_attn.qkv_proj.linear(normed)).numpy().reshape(37, oracle.heads, 3, -1)
    decay_H = np.exp(-decay_slopes(model.config, 0).astype(np.float64))
    state_HKV = np.zeros_like(oracle.states[0])
    for token in qkv:
        state_HKV = decay_H[:, None, None] * state_HKV + token[:, 1, :, None] * token[:, 2, None, :]
    assert np.abs(oracle.states[0] - state_HKV).max() < 1e-12 * np.abs(state_HKV).max()


def test_the_bound_holds_for_an_fp32_recurrence_and_is_a_geometric_sum():
    """A plain fp32 loop with fp32 decay factors stays within what the limit allows for its steps; a decay off by 1e-3 does not."""
    slopes_H = np.array([0.25, 0.01, 5e-4], np.float32)
    random, steps = np.random.default_rng(1), 4000
    state, wrong, exact = (np.zeros((3, 8, 8), dtype) for dtype in (np.float32, np.float32, np.float64))
    decay, wide = np.exp(-slopes_H)[:, None, None], np.exp(-slopes_H.astype(np.float64))[:, None, None]
    for _ in range(steps):
        k, v = random.standard_normal((2, 3, 8)).astype(np.float32)
        new = k[:, :, None] * v[:, None, :]
        state, wrong, exact = decay * state + new, decay * np.float32(1.001) * wrong + new, wide * exact + new
    limit_H = recurrence_limit(slopes_H, steps)
    off = [np.linalg.norm(s - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2)) for s in (state, wrong)]
    assert (off[0] <= limit_H - INPUT_ERROR).all()
    assert (off[1] > limit_H).all()
    by_hand = [sum(float(np.exp(-np.float64(s))) ** i for i in range(steps)) for s in slopes_H]
    assert remembered(slopes_H, steps) == pytest.approx(by_hand)
    assert recurrence_limit(slopes_H, 10**9) == pytest.approx(
        INPUT_ERROR + STEP_ROUNDINGS * U / -np.expm1(-slopes_H.astype(np.float64))
    )


def wrong_decode(change):
    """`OrtSession._step` and `decode` that damage the first layer's state after every token."""
    step, decode = OrtSession._step, OrtSession.decode

    def damage(self, state):
        buffer = state._buffer(0, "recurrent_state")
        change(buffer, state)

    def bad_step(self, run, ids_BT, new_B, wanted_RP, state, taps=False):
        result = step(self, run, ids_BT, new_B, wanted_RP, state, taps)
        damage(self, state)
        return result

    def bad_decode(self, tokens_B, state):
        result = decode(self, tokens_B, state)
        damage(self, state)
        return result

    return bad_step, bad_decode


def round_to_bfloat16(buffer, state):
    import ml_dtypes

    buffer[:] = buffer.astype(ml_dtypes.bfloat16).astype(np.float32)


def decay_off_by_one_step(buffer, state):
    """Once, in the middle: the state fades by one token too many."""
    if state.lengths[0] == 120:
        buffer *= np.exp(-decay_slopes(two_layers(), 0))[None, :, None, None]


@pytest.mark.parametrize("change", [round_to_bfloat16, decay_off_by_one_step])
def test_a_wrong_state_is_caught_and_named(deep, monkeypatch, change):
    step, decode = wrong_decode(change)
    monkeypatch.setattr(OrtSession, "_step", step)
    monkeypatch.setattr(OrtSession, "decode", decode)
    report = drift(deep[1], None, (100, 150), threads=2)
    assert not report.passed
    bad = {(row.step, row.layer) for row in report.rows if row.of("recurrence").status == "differs"}
    assert (150, 0) in bad
    assert "that of layer 0" in verdict(report)
    # Layer 2 is given what follows from the wrong state, and does with it what the definition does.
    assert not {layer for _, layer in bad} - {0}


def test_states_that_are_no_numbers_are_caught(deep, monkeypatch, tmp_path):
    def poison(buffer, state):
        buffer[0, 0, 0, 0] = np.nan

    step, decode = wrong_decode(poison)
    monkeypatch.setattr(OrtSession, "_step", step)
    monkeypatch.setattr(OrtSession, "decode", decode)
    report = drift(deep[1], None, (3,), threads=2, json_file=tmp_path / "d.json")
    assert not report.passed
    assert read_drift(tmp_path / "d.json").rows[0].of("recurrence").error is None
    assert "not finite" in verdict(report)


def test_the_reference_follows_near_ties_only(checkpoint):
    """PyTorch's own routing, changed by hand for one token: a near-tie is followed, a clear choice is not."""
    session = PyTorchSession.load(checkpoint, threads=2)
    tokens = np.random.default_rng(0).integers(0, session.vocab_size, 20)
    taps = session.forward(tokens[None], [20], session.new_state(1), taps=True).taps
    router = [taps[router_tap(layer)][0].copy() for layer in range(2)]
    order_E = np.argsort(-router[0][5])
    second, third = order_E[1], order_E[2]
    margin = float(router[0][5, second] - router[0][5, third])
    router[0][5, [second, third]] = router[0][5, [third, second]]
    following, strict = FollowingReference(session, 1.01 * margin), FollowingReference(session, margin / 2)
    following.feed(tokens.tolist(), router)
    strict.feed(tokens.tolist(), router)
    assert following.followed >= 1
    assert (strict.followed, strict.refused) == (0, 1)
    plain = session.new_state(1)
    session.forward(tokens[None], [20], plain)
    assert (strict.state.key(1) == plain.key(1)).all()
    moved = np.abs(following.state.key(1) - plain.key(1)).max((0, 1, 3))
    assert moved[5] > 0  # the token that went to another expert, and none before it
    assert not moved[:5].any()


def test_an_interrupted_run_ends_with_the_same_numbers(deep, measured, tmp_path, monkeypatch):
    file, calls = tmp_path / "d.json", []
    feed = FollowingReference.feed

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return feed(self, *arguments)

    how = {"threads": 2, "json_file": file}
    steps = (300, 1, 150, 301)
    monkeypatch.setattr(FollowingReference, "feed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drift(deep[1], None, steps, **how)
    monkeypatch.setattr(FollowingReference, "feed", feed)
    stopped = read_drift(file)
    assert (stopped.finished, stopped.interruptions, stopped.state["step"]) == (False, 1, 150)
    with pytest.raises(MxcompileError, match="unfinished run; go on with --resume"):
        drift(deep[1], None, steps, **how)
    with pytest.raises(MxcompileError, match="its seed were 0, not 1"):
        drift(deep[1], None, steps, seed=1, resume=True, **how)
    states = file.with_name(stopped.state["file"])
    content = states.read_bytes()
    states.write_bytes(content[:-1])
    with pytest.raises(MxcompileError, match="is missing or damaged, so"):
        drift(deep[1], None, steps, resume=True, **how)
    states.write_bytes(content)
    done = drift(deep[1], None, steps, resume=True, **how)
    assert done.rows == measured[0].rows
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]


def test_states_are_saved_between_the_steps_too(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(drift_module, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(drift_module, "CHUNK", 10)
    saved = []
    monkeypatch.setattr(drift_module._Run, "_save", lambda self: saved.append(self._step))
    drift(deep[1], None, (25,), threads=2, json_file=tmp_path / "d.json")
    assert saved == [10, 20, 25]


def test_bad_input(engine, checkpoint, measured, tmp_path):
    with pytest.raises(MxcompileError, match="after at least 1 token"):
        drift(engine, None, (0, 5))
    create_checkpoint("tiny", tmp_path / "other", seed=99)
    with pytest.raises(MxcompileError, match="built from another checkpoint"):
        drift(engine, tmp_path / "other", (5,))
    values = measured[0].to_dict()
    for change, message in (
        ({"schema_version": 7}, "schema version 7, this mxcompile reads 1"),
        ({"schema": "mxcompile.bench"}, "not a file of `mxcompile bench --state-drift`"),
        ({"rows": [{"step": 1, "layer": 0, "errors": []}]}, "damaged"),
    ):
        write_json(values | change, tmp_path / "d.json")
        with pytest.raises(MxcompileError, match=message):
            read_drift(tmp_path / "d.json")
        with pytest.raises(MxcompileError, match="no measurement of drift; choose another file"):
            drift(engine, None, (5,), json_file=tmp_path / "d.json")
    assert isinstance(DriftReport.from_dict(values), DriftReport)


def test_the_command(mxcompile, engine, tmp_path):
    done = mxcompile("bench", engine, "--state-drift", "10,40,1k", "--threads", 2, "--json", tmp_path / "d.json")
    assert done.returncode == 0, done.stderr
    assert "do not drift over 40 decoded tokens" in done.stdout
    assert "not run: 1024 tokens: exceeds the engine's max_seq_len 200" in done.stdout
    assert json.loads((tmp_path / "d.json").read_text())["passed"] is True
    refused = mxcompile("bench", engine, "--state-drift", "ten")
    assert refused.returncode == 2
    assert "not a number of tokens" in refused.stderr
