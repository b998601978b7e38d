"""What the lightning launchers refuse before they touch CUDA."""

from __future__ import annotations

import ctypes

import lightning_host as host
import pytest

BASE = 1 << 40  # never dereferenced
GAP = 1 << 32


def good(**changes) -> host.LightningParams:
    values = {
        **{name: BASE + i * GAP for i, name in enumerate(("q", "k", "v", "out", "state_in", "state_out"))},
        "slopes_H": BASE + 7 * GAP,
        "batch": 2,
        "tokens": 100,
        "heads": 8,
        "head_dim": 128,
        "slots": 0,
        "scale": 1.0,
        "dtype": 2,
    }
    values.update(changes)
    return host.LightningParams(**values)


def status(params, decode=False):
    return host.library().host_check(ctypes.byref(params), int(decode))


@pytest.mark.parametrize("decode", [False, True])
def test_good_arguments_pass(decode):
    tokens = 1 if decode else 100
    for changes in (
        {},
        {"state_in": None},
        {"state_in": BASE + 5 * GAP},  # in place
        {"slopes_H": None, "log_decay": BASE + 8 * GAP},
        {"slots": 50, "slots_B": BASE + 9 * GAP, "lengths_B": BASE + 10 * GAP},
        {"head_dim": 64, "dtype": 1},
        {"tokens": 0, "q": None, "k": None, "v": None, "out": None, "slopes_H": None},
        {"batch": 0, "q": None, "state_out": None},
    ):
        assert status(good(**{"tokens": tokens, **changes}), decode) == host.OK, (changes, host.last_error())


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"head_dim": 96}, host.UNSUPPORTED, "head_dim 96 is not supported; use 64 or 128"),
        ({"head_dim": 0}, host.UNSUPPORTED, "head_dim 0"),
        ({"head_dim": -128}, host.UNSUPPORTED, "head_dim -128"),
        ({"dtype": 3}, host.UNSUPPORTED, "dtype 3"),
        ({"dtype": 0}, host.UNSUPPORTED, "use fp16 or bf16"),
        ({"batch": -1}, host.INVALID, "batch -1 is negative"),
        ({"tokens": -1}, host.INVALID, "tokens -1 is negative"),
        ({"tokens": 2**31 - 1}, host.INVALID, "more than 2^30"),
        ({"heads": 0}, host.INVALID, "heads 0"),
        ({"heads": -8}, host.INVALID, "heads -8"),
        ({"slots": -1}, host.INVALID, "slots -1 is negative"),
        ({"slots": 1}, host.INVALID, "1 slots for 2 sequences"),
        ({"batch": 2**30, "heads": 64}, host.INVALID, "too large"),
        ({"scale": float("nan")}, host.INVALID, "scale is not finite"),
        ({"scale": float("inf")}, host.INVALID, "scale is not finite"),
        ({"q": None}, host.INVALID, "q is null"),
        ({"k": None}, host.INVALID, "k is null"),
        ({"v": None}, host.INVALID, "v is null"),
        ({"out": None}, host.INVALID, "out is null"),
        ({"state_out": None}, host.INVALID, "state_out is null"),
        *[
            ({name: BASE + 20 * GAP + 8}, host.INVALID, f"{name} is not aligned to 16 bytes")
            for name in ("q", "k", "v", "out", "state_in", "state_out")
        ],
        ({"lengths_B": BASE + 20 * GAP + 2}, host.INVALID, "lengths_B is not aligned"),
        ({"slots_B": BASE + 20 * GAP + 1}, host.INVALID, "slots_B is not aligned"),
        ({"slopes_H": BASE + 20 * GAP + 1}, host.INVALID, "slopes_H is not aligned"),
        ({"slopes_H": None}, host.INVALID, "exactly one"),
        ({"log_decay": BASE + 8 * GAP}, host.INVALID, "exactly one"),
        ({"state_in": BASE + 5 * GAP + 65536}, host.INVALID, "overlap in part"),
        ({"state_in": BASE + 5 * GAP - 65536}, host.INVALID, "overlap in part"),
        ({"out": BASE}, host.INVALID, "out overlaps q"),
        ({"out": BASE + GAP + 4096}, host.INVALID, "out overlaps k"),
        ({"out": BASE + 5 * GAP}, host.INVALID, "out overlaps state_out"),
        ({"v": BASE + 5 * GAP}, host.INVALID, "v overlaps state_out"),
    ],
)
def test_bad_arguments_are_refused(changes, code, words):
    assert status(good(**changes)) == code
    assert words in host.last_error()
    assert host.last_error().startswith("lightning prefill: ")


def test_decode_takes_one_token():
    assert status(good(tokens=2), decode=True) == host.INVALID
    assert "one new token" in host.last_error()
    assert status(good(tokens=1, dtype=0), decode=True) == host.OK


def plan_status(params, plan4, capability=90):
    return host.library().host_check_plan(ctypes.byref(params), (ctypes.c_int * 4)(*plan4), capability)


@pytest.mark.parametrize(
    ("plan4", "capability", "code", "words"),
    [
        ((0, 1, 1, 2), 75, host.ARCHITECTURE, "7.5 is too old"),
        ((3, 1, 1, 2), 90, host.INVALID, "plan.kernel 3"),
        ((1, 1, 1, 2), 80, host.ARCHITECTURE, "9.0"),
        ((1, 1, 1, 2), 120, host.ARCHITECTURE, "9.0"),
        ((0, 3, 1, 2), 90, host.INVALID, "3 value splits"),
        ((0, 0, 1, 2), 90, host.INVALID, "0 value splits"),
        ((0, 1, 1, 1), 90, host.INVALID, "do not cover"),
        ((0, 1, 3, 1), 90, host.INVALID, "empty"),
        ((0, 1, 0, 2), 90, host.INVALID, "do not cover"),
        ((0, 1, -1, 2), 90, host.INVALID, "do not cover"),
        ((0, 1, 2, -1), 90, host.INVALID, "do not cover"),
        ((0, 1, 2, 1), 90, host.WORKSPACE, "the workspace has 0 bytes"),
    ],
)
def test_bad_plans_are_refused(plan4, capability, code, words):
    assert plan_status(good(), plan4, capability) == code
    assert words in host.last_error()


def test_the_workspace_must_be_large_enough_and_aligned():
    needed = host.workspace_bytes((0, 1, 2, 1), 2, 8, 128)
    for size, address, code in (
        (needed, BASE + 30 * GAP, host.OK),
        (needed - 1, BASE + 30 * GAP, host.WORKSPACE),
        (needed, None, host.WORKSPACE),
        (needed, BASE + 30 * GAP + 16, host.INVALID),
    ):
        assert plan_status(good(workspace=address, workspace_bytes=size), (0, 1, 2, 1)) == code
    assert plan_status(good(head_dim=64), (0, 2, 1, 2)) == host.INVALID
