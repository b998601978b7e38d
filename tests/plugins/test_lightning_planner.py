"""The prefill and decode planners: pure functions, checked over every shape that matters."""

from __future__ import annotations

import itertools

import lightning_host as host
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SM_COUNTS = (1, 16, 78, 132, 148)


def check(batch: int, tokens: int, heads: int, head_dim: int, sms: int) -> tuple[int, int, int, int]:
    kernel, splits, segments, segment_chunks = plan = host.plan(batch, tokens, heads, head_dim, sms)
    chunks = -(-tokens // 64)
    assert kernel == 0
    assert splits in ((1, 2) if head_dim == 128 else (1,))
    assert segments >= 1
    assert segments * segment_chunks >= chunks, "every token is covered"
    assert (segments - 1) * segment_chunks < max(chunks, 1), "no segment is empty"
    assert segments == 1 or segments * batch * heads <= sms, "segments share one wave"
    assert segments == 1 or segment_chunks >= 4, "segments are worth their state"
    workspace = host.workspace_bytes(plan, batch, heads, head_dim)
    assert (workspace == 0) == (segments == 1)
    if workspace:
        pieces = batch * heads * segments
        assert workspace >= pieces * (head_dim * head_dim * 4 + 4)
        assert workspace % 256 == 0
    assert workspace <= host.library().host_max_workspace(batch, tokens, heads, head_dim, sms, 90)
    return plan


@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_length_is_covered_without_empty_segments(head_dim):
    for sms, heads, batch in itertools.product(SM_COUNTS, (1, 2, 7, 8, 64), (1, 2, 5)):
        for tokens in (*range(0, 1100, 7), 63, 64, 65, 8191, 8192, 8193):
            check(batch, tokens, heads, head_dim, sms)


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 4096),
    tokens=st.integers(0, 4 << 20),
    heads=st.integers(1, 128),
    head_dim=st.sampled_from([64, 128]),
    sms=st.integers(1, 200),
)
def test_any_shape(batch, tokens, heads, head_dim, sms):
    check(batch, tokens, heads, head_dim, sms)


@pytest.mark.parametrize("tokens", [2**31 - 1, 2**31 - 64, 2**30])
def test_the_longest_lengths_do_not_overflow(tokens):
    for heads in (1, 8, 64):
        _, _, segments, segment_chunks = check(1, tokens, heads, 128, 132)
        assert segment_chunks > 0
        assert segments == (1 if heads == 64 else 132 // heads)


def test_known_cases_on_an_h200():
    assert host.plan(1, 8192, 64, 128, 132) == (0, 2, 1, 128)  # P = 2: value halves
    assert host.plan(8, 4096, 64, 128, 132) == (0, 1, 1, 64)  # 512 CTAs: plain
    assert host.plan(1, 8192, 8, 128, 132) == (0, 1, 16, 8)  # one rank of eight: 16 segments of 8 chunks
    assert host.plan(1, 8192, 64, 128, 78) == (0, 1, 1, 128)  # H20: 64 of 78 multiprocessors are enough
    assert host.plan(1, 512, 8, 128, 132) == (0, 2, 1, 8)  # too short for segments
    assert host.plan(1, 0, 8, 128, 132) == (0, 1, 1, 0)


@pytest.mark.parametrize(
    "arguments", [(0, 100, 8, 128, 132), (-1, 100, 8, 128, 132), (1, -5, 8, 128, 132), (1, 100, 0, 128, 132)]
)
def test_senseless_arguments_give_the_plain_plan(arguments):
    assert host.plan(*arguments)[:3] == (0, 1, 1)


@pytest.mark.parametrize("heads", [1, 8, 64])
def test_the_reserved_workspace_is_monotone_and_bounds_every_smaller_launch(heads):
    def most(batch, tokens):
        return host.library().host_max_workspace(batch, tokens, heads, 128, 132, 90)

    for batch, tokens in itertools.product((1, 2, 3, 8, 40), (64, 1024, 8192, 131072)):
        assert most(batch, tokens) <= most(batch + 1, tokens)
        assert most(batch, tokens) <= most(batch, 2 * tokens)
        for smaller in range(1, batch + 1):
            for length in (tokens, tokens - 1, tokens // 2, tokens // 3):
                plan = host.plan(smaller, length, heads, 128, 132)
                assert host.workspace_bytes(plan, smaller, heads, 128) <= most(batch, tokens)


def test_decode_splits_only_small_grids():
    decode = host.library().host_plan_decode
    assert decode(1, 64, 128, 132) == 4
    assert decode(16, 64, 128, 132) == 1
    for batch, heads in itertools.product((1, 2, 8, 64, 2**20), (1, 8, 64)):
        splits = decode(batch, heads, 128, 132)
        assert splits in (1, 4)
        assert splits >= decode(batch + 1, heads, 128, 132)
