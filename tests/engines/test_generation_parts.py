"""Settings, the top-k and top-p cuts, and stop strings, each against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engines.generation import GenerationConfig, GenerationError
from engines.generation.sampling import Sampler, candidates, log_softmax, top_k_ids, top_p_ids
from engines.generation.settings import NotFiniteError
from engines.generation.stopping import StopStrings

few_values = arrays(np.float64, st.integers(1, 60), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]))


@given(few_values, st.integers(1, 80))
def test_top_k_is_the_head_of_a_stable_sort(values, k):
    assert list(top_k_ids(values, k)) == list(np.argsort(-values, kind="stable")[:k])


@given(few_values, st.floats(0.001, 0.999))
def test_top_p_is_the_shortest_sufficient_head(values, top_p):
    probabilities = np.exp(values) / np.exp(values).sum()
    ids = top_p_ids(probabilities, top_p)
    order = np.argsort(-probabilities, kind="stable")
    assert list(ids) == list(order[: len(ids)])
    total = probabilities.sum()
    assert probabilities[ids].sum() >= top_p * total - 1e-12
    assert probabilities[ids[:-1]].sum() < top_p * total + 1e-12


@pytest.mark.parametrize("top_p", [0.01, 0.6, 0.9, 0.999, 0.9999999])
def test_top_p_on_a_wide_vocabulary_equals_the_full_sort(top_p):
    """Flat enough that the mass lies far beyond the first candidates that are looked at."""
    scores = np.random.default_rng(0).normal(0, 1, 50_000)
    probabilities = np.exp(scores) / np.exp(scores).sum()
    order = np.argsort(-probabilities, kind="stable")
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p * probabilities.sum())) + 1
    assert list(top_p_ids(probabilities, top_p)) == list(order[:count])


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    kept, probabilities = candidates(np.array([500.0, 499.0, -500.0]), 1e-9, 0, 1.0)
    assert list(kept) == [0, 1, 2]
    assert list(probabilities) == [1.0, 0.0, 0.0]


@settings(max_examples=200)
@given(
    arrays(
        np.float32, st.integers(1, 12), elements=st.one_of(st.floats(-(2.0**127), 2.0**127, width=32), st.just(-np.inf))
    ),
    st.sampled_from([0.0, 5e-324, 1e-30, 0.7, 1e300]),
    st.sampled_from([0, 1, 3, 100]),
    st.sampled_from([5e-324, 0.5, 1.0]),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.integers(0, 2**64 - 1),
)
@pytest.mark.filterwarnings("error")
def test_any_settings_draw_a_token_that_can_be(logits, temperature, top_k, top_p, penalty, seed):
    """Whatever the extremes: one of the finite logits, and the likeliest of all when only one may be."""
    config = GenerationConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, frequency_penalty=100, seed=seed
    )
    sampler = Sampler(config, len(logits), [0])
    if not np.isfinite(logits.max()):
        with pytest.raises(NotFiniteError):
            sampler.sample(logits)
        return
    drawn = [sampler.sample(logits) for _ in range(3)]
    assert np.isfinite(logits[drawn]).all()
    if penalty == 1 and (top_k == 1 or temperature == 0):
        assert drawn[0] == int(logits.argmax())


def test_log_softmax_survives_large_and_masked_logits():
    out = log_softmax(np.array([1000.0, 1000.0, -np.inf], np.float32))
    assert out[:2] == pytest.approx([-np.log(2)] * 2)
    assert out[2] == -np.inf


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first position where some stop string ends; the longest of those."""
    for end in range(1, len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            longest = max(matched, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text("ab#", max_size=24)


@settings(max_examples=400, deadline=None)
@given(letters, st.lists(st.text("ab#", min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_stop_strings_do_not_depend_on_the_cuts(text, stops, data):
    watcher, shown, position = StopStrings(stops), "", 0
    expected, matched = reference_stop(text, stops)
    while position < len(text):
        size = data.draw(st.integers(1, 6))
        shown += watcher.feed(text[position : position + size])
        position += size
        assert expected.startswith(shown)  # nothing is shown that would have to be taken back
    shown += watcher.finish()
    assert (shown, watcher.matched) == (expected, matched)


def test_text_that_cannot_become_a_stop_string_is_not_held():
    watcher = StopStrings(["END"])
    assert [watcher.feed(piece) for piece in ("xE", "N", "x", "y")] == ["x", "", "ENx", "y"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"temperature": -1}, "temperature must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number of at least 0.001 and at most 1000"),
        ({"repetition_penalty": 1e-310}, "repetition_penalty"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"presence_penalty": 101}, "presence_penalty must be a number of at least -100 and at most 100"),
        ({"frequency_penalty": "much"}, "frequency_penalty must be a number"),
        ({"seed": -1}, "seed must be a whole number between 0 and"),
        ({"seed": 2**64}, "seed"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop_strings": "text"}, "stop_strings must be a list"),
        ({"stop_strings": 5}, "stop_strings must be a list"),
        ({"stop_token_ids": None}, "stop_token_ids must be a list"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be a list"),
        ({"stop_strings": [""]}, "non-empty"),
        ({"stop_token_ids": [-3]}, "stop token id"),
        ({"typical_p": 0.5}, "unknown generation setting 'typical_p'"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(GenerationError, match=message):
        GenerationConfig.from_dict(values)
