"""The mixture-of-experts kernels' own code, emulated on the CPU, against fp64.

Tolerance: the result is rounded once to the tokens' type, and so is silu(gate) * up before fc2; sums are fp32. Rounding to bf16 is
1.7e-3 relative RMS (1/8 of that for fp16), two of them 2.4e-3: bounds 4e-3 and 5e-4.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_host import run
from moe_reference import make_case, mixture_of_experts, relative_rms

TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}
PATHS = ("stream", "grouped64", "grouped128")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "top_k"),
    [
        (1, 64, 32, 4, 2),
        (7, 16, 16, 3, 3),  # less than one step of columns
        (9, 144, 80, 4, 2),  # no size a multiple of the tiles
        (40, 80, 144, 3, 2),
    ],
)
def test_equals_reference(
    path: str, dtype: str, int8: bool, tokens: int, hidden: int, inner: int, experts: int, top_k: int
) -> None:
    case = make_case(tokens, tokens, hidden, inner, experts, top_k, dtype=dtype, int8=int8)
    assert relative_rms(run(case, path), mixture_of_experts(case)) <= TOLERANCE[dtype]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_size(data: st.DataObject) -> None:
    int8 = data.draw(st.booleans())
    step = 16 if int8 else 8
    experts = data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(["bfloat16", "float16"]))
    case = make_case(
        data.draw(st.integers(0, 1000)),
        data.draw(st.integers(1, 40)),
        step * data.draw(st.integers(1, 160 // step)),
        step * data.draw(st.integers(1, 160 // step)),
        experts,
        data.draw(st.integers(1, min(8, experts))),
        dtype=dtype,
        int8=int8,
        scale_dtype=data.draw(st.sampled_from(["float32", dtype])),
        router_dtype=data.draw(st.sampled_from(["float32", dtype])),
        normalize=data.draw(st.booleans()),
        skew=data.draw(st.sampled_from([0.0, 1.0, 20.0])),
    )
    path = data.draw(st.sampled_from([None, *PATHS]))
    found = run(case, path, schedule=data.draw(st.integers(0, 5)))
    # Few tokens and columns: the RMS of so few roundings scatters around its mean, so the bound is a half more.
    assert relative_rms(found, mixture_of_experts(case)) <= 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize(("path", "tokens"), [("stream", 77), ("grouped64", 150), ("grouped128", 270)])
@pytest.mark.parametrize("int8", [False, True])
def test_one_expert_gets_most_tokens(path: str, tokens: int, int8: bool) -> None:
    """Several passes over one expert's weights, several token tiles, and experts without any row."""
    case = make_case(3, tokens, 64, 48, 6, 2, int8=int8, skew=20.0)
    assert relative_rms(run(case, path), mixture_of_experts(case)) <= TOLERANCE["bfloat16"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("experts", "top_k", "skew"), [(70, 3, 0.0), (256, 8, 0.0), (100, 1, -1.0)])
def test_many_experts(path: str, experts: int, top_k: int, skew: float) -> None:
    """More experts than a warp has lanes; with skew -1 the last ones get all tokens."""
    case = make_case(experts, 30, 16, 24, experts, top_k, skew=skew)
    assert relative_rms(run(case, path), mixture_of_experts(case)) <= TOLERANCE["bfloat16"]


@pytest.mark.parametrize("path", PATHS)
def test_pieces(path: str) -> None:
    """Tokens are independent: any cut gives the same bits where each piece takes the same path."""
    case = make_case(1, 45, 64, 32, 5, 2)
    whole = run(case, path)
    for piece_tokens in (44, 20, 7):
        found = run(case, path, piece_tokens=piece_tokens)
        if path == "stream":  # other kernels for up to 8 tokens; the sums are the same
            assert relative_rms(found, mixture_of_experts(case)) <= TOLERANCE["bfloat16"]
        else:
            np.testing.assert_array_equal(found.view(np.uint16), whole.view(np.uint16))


def test_token_bands() -> None:
    """More token tiles of one expert than a band holds."""
    case = make_case(4, 64 * 17 + 5, 8, 8, 2, 1, skew=20.0)
    assert relative_rms(run(case, "grouped64"), mixture_of_experts(case)) <= TOLERANCE["bfloat16"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("int8", [False, True])
def test_ranks_add_up(path: str, int8: bool) -> None:
    """Each rank's experts alone equal the reference over them; a token without local experts gets exact zeros."""
    case = make_case(8, 20, 64, 32, 7, 2, int8=int8)
    total = np.zeros(case.x.shape)
    for first, count in ((0, 3), (3, 1), (4, 3)):
        found = run(case, path, first=first, count=count)
        expected = mixture_of_experts(case, first, count)
        assert relative_rms(found, expected) <= TOLERANCE["bfloat16"]
        idle = (expected == 0).all(1)
        assert (found[idle].view(np.uint16) == 0).all()
        total += found.astype(np.float64)
    assert relative_rms(total, mixture_of_experts(case)) <= TOLERANCE["bfloat16"]


@pytest.mark.parametrize("path", PATHS)
def test_schedules_agree_bit_for_bit(path: str) -> None:
    """Another order of warps and copies: any missing barrier shows as a difference."""
    case = make_case(2, 37, 200, 72, 3, 2)
    first = run(case, path)
    for schedule in range(1, 6):
        np.testing.assert_array_equal(run(case, path, schedule=schedule).view(np.uint16), first.view(np.uint16))


@pytest.mark.parametrize("path", PATHS)
def test_a_bad_token_touches_no_other(path: str) -> None:
    case = make_case(6, 12, 64, 32, 4, 2)
    good = run(case, path)
    case.x[3] = np.nan
    case.logits[5, 1] = np.nan
    found = run(case, path)
    for token in range(12):
        if token in (3, 5):
            assert np.isnan(found[token].astype(np.float32)).all()
        else:
            np.testing.assert_array_equal(found[token].view(np.uint16), good[token].view(np.uint16))


def test_weights_of_experts_without_tokens_are_not_read() -> None:
    case = make_case(6, 3, 64, 32, 8, 1, skew=30.0)
    expected = mixture_of_experts(case)
    case.fc1[1:] = np.nan
    case.fc2[1:] = np.nan
    for path in PATHS:
        assert relative_rms(run(case, path), expected) <= TOLERANCE["bfloat16"]


def test_extreme_gates() -> None:
    """silu far out: no NaN from exp(-gate)."""
    case = make_case(1, 4, 16, 16, 2, 1)
    case.x[...] = 60
    case.fc1[:, 0::2] = np.where(np.arange(16) % 2 == 0, 1, -1)[None, :, None]  # gates of +-960
    case.fc1[:, 1::2] = 0.01
    found = run(case, "stream")
    assert np.isfinite(found.astype(np.float32)).all()
    assert relative_rms(found, mixture_of_experts(case)) <= TOLERANCE["bfloat16"]


@pytest.mark.parametrize(("first", "count", "inner"), [(0, 0, 40), (2, 3, 40), (0, 0, 136)])
def test_steps_of_the_sm90_path(first: int, count: int, inner: int) -> None:
    """Gather, argument arrays, fc1's epilogue (tiles cut at both edges) and combine; the GEMMs are plain loops in the harness."""
    case = make_case(7, 50, 64, inner, 6, 2)
    found = run(case, "sm90", first=first, count=count)
    assert relative_rms(found, mixture_of_experts(case, first, count or None)) <= TOLERANCE["bfloat16"]


def test_no_tokens_is_nothing_to_do() -> None:
    case = make_case(0, 0, 16, 16, 2, 1)
    assert run(case).shape == (0, 16)
