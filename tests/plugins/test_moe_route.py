"""Router and sort of the mixture-of-experts kernels: the kernels' own code, emulated on the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_host import Route, route
from moe_reference import DTYPES
from moe_reference import route as reference

# fp32 softmax of fp32 sums of at most 256 terms: a few units in the last place.
WEIGHT_TOLERANCE = 2e-6


def check(logits: npt.NDArray[np.generic], top_k: int, normalize: bool, first: int, count: int, found: Route) -> None:
    """Everything the two kernels promise about finite logits."""
    tokens, experts = logits.shape
    chosen, expected = reference(logits, top_k, normalize)
    local = chosen - first
    held = (local >= 0) & (local < (count or experts))
    np.testing.assert_array_equal(found.experts.reshape(tokens, top_k), np.where(held, local, -1))
    np.testing.assert_allclose(found.weights.reshape(tokens, top_k), expected, rtol=WEIGHT_TOLERANCE, atol=1e-37)
    # Rows: by expert, then by pair.
    pairs = np.flatnonzero(found.experts >= 0)
    order = pairs[np.argsort(found.experts[pairs], kind="stable")]
    np.testing.assert_array_equal(found.tokens[: len(order)], order // top_k)
    np.testing.assert_array_equal(found.rows[order], np.arange(len(order)))
    counts = np.bincount(found.experts[pairs], minlength=count or experts)
    np.testing.assert_array_equal(found.offsets, np.concatenate([[0], np.cumsum(counts)]))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_route_equals_reference(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 32))
    experts = data.draw(st.sampled_from([1, 2, 3, 8, 31, 32, 33, 64, 100, 255, 256]))
    top_k = data.draw(st.integers(1, min(8, experts)))
    first = data.draw(st.integers(0, experts - 1))
    count = data.draw(st.integers(1, experts - first))
    normalize = data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    spread = data.draw(st.sampled_from([0.0, 0.3, 5.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = np.round(rng.standard_normal((tokens, experts)) * spread, data.draw(st.integers(0, 3))).astype(
        DTYPES[dtype]
    )
    for small in (False, True):
        found = route(
            logits,
            top_k,
            normalize=normalize,
            first=first,
            count=count,
            small=small,
            schedule=data.draw(st.integers(0, 5)),
        )
        check(logits, top_k, normalize, first, count, found)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(33, 32, 2), (600, 32, 2), (129, 5, 5), (300, 256, 8)])
def test_many_tokens(tokens: int, experts: int, top_k: int) -> None:
    logits = np.random.default_rng(tokens).standard_normal((tokens, experts)).astype(np.float32)
    check(logits, top_k, True, 0, 0, route(logits, top_k))


def test_equal_logits_go_to_the_lowest_experts() -> None:
    found = route(np.zeros((3, 40), np.float32), 4)
    np.testing.assert_array_equal(found.experts.reshape(3, 4), [[0, 1, 2, 3]] * 3)
    np.testing.assert_array_equal(found.weights, np.full(12, 0.25, np.float32))


def test_all_tokens_to_one_expert() -> None:
    logits = np.zeros((70, 32), np.float32)
    logits[:, 17] = 9
    found = route(logits, 1)
    np.testing.assert_array_equal(found.tokens, np.arange(70))
    np.testing.assert_array_equal(found.offsets, [0] * 18 + [70] * 15)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e38, -1e38, 9.9e37, 0], [-3e38, -3e38, -3e38, -3e38]], np.float32)
    found = route(logits, 2)
    np.testing.assert_array_equal(found.experts, [0, 2, 0, 1])
    np.testing.assert_array_equal(found.weights, np.array([1, 0, 0.5, 0.5], np.float32))


def test_masked_experts_are_chosen_last() -> None:
    logits = np.full((1, 6), -np.inf, np.float32)
    logits[0, 4] = 1
    found = route(logits, 3)
    np.testing.assert_array_equal(found.experts, [4, 0, 1])
    np.testing.assert_array_equal(found.weights, [1, 0, 0])


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_bad_logits_stay_in_range_and_touch_one_token(value: float, small: bool) -> None:
    """Whatever the logits, experts are distinct and in range; a NaN or infinite token gets NaN weights as softmax would."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((9, 33)).astype(np.float32)
    good = route(logits, 3, small=small)
    logits[4, :] = value  # all of them
    logits[7, 20] = np.nan
    found = route(logits, 3, small=small)
    for token in range(9):
        experts = found.experts.reshape(9, 3)[token]
        assert len(set(experts)) == 3
        assert ((experts >= 0) & (experts < 33)).all()
    bad = np.isnan(found.weights.reshape(9, 3))
    np.testing.assert_array_equal(bad.all(1), [token in (4, 7) for token in range(9)])
    np.testing.assert_array_equal(bad.any(1), bad.all(1))
    keep = [token for token in range(9) if token not in (4, 7)]
    np.testing.assert_array_equal(found.weights.reshape(9, 3)[keep], good.weights.reshape(9, 3)[keep])
    assert found.offsets[-1] == 27
    assert 20 not in found.experts.reshape(9, 3)[7]


def test_schedules_agree_bit_for_bit() -> None:
    logits = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    first = route(logits, 2)
    for schedule in range(1, 6):
        again = route(logits, 2, schedule=schedule)
        for name in ("weights", "experts", "rows", "tokens", "offsets"):
            np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
