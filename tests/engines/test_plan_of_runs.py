"""How a ragged step is cut into runs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.plan import MAX_PADDING, MAX_TOKENS, Run, cut_columns, plan

rows = st.lists(st.tuples(st.integers(0, 600), st.sampled_from([0, 0, 1, 50])), min_size=1, max_size=12)


@settings(deadline=None)
@given(rows)
def test_runs_cover_each_active_row_once_within_the_kernels_limits(drawn: list[tuple[int, int]]) -> None:
    new, past = (np.array(column) for column in zip(*drawn, strict=True))
    runs = plan(new, past)
    covered = [row for run in runs for row in range(run.first, run.end)]
    assert len(covered) == len(set(covered))
    assert set(covered) >= set(np.flatnonzero(new))
    for run in runs:
        inside, pasts = new[run.first : run.end], past[run.first : run.end]
        assert run.tokens == inside.max()
        if run.tokens > 1:
            assert inside.all()
            if len(inside) > 1:
                assert not pasts.any()  # the attention kernel takes no batch of several tokens on a past
                assert run.tokens * len(inside) <= MAX_TOKENS
                assert run.tokens * len(inside) - inside.sum() <= MAX_PADDING * run.tokens * len(inside)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(0, 9))
def test_single_tokens_are_one_run(new: list[int], past: int) -> None:
    runs = plan(np.array(new), np.full(len(new), past))
    if not any(new):
        assert runs == []
    else:
        assert runs == [Run(new.index(1), len(new) - new[::-1].index(1), 1)]


def test_equal_prompts_run_together() -> None:
    assert plan(np.array([100] * 4), np.zeros(4, int)) == [Run(0, 4, 100)]
    assert plan(np.array([100] * 4), np.array([0, 0, 5, 0])) == [Run(0, 2, 100), Run(2, 3, 100), Run(3, 4, 100)]


@given(st.data(), st.integers(1, 40), st.integers(1, 12), st.integers(1, 5))
def test_cut_columns_covers_every_token_once_within_the_limits(
    data: st.DataObject, tokens: int, most_tokens: int, most_wanted: int
) -> None:
    rows = data.draw(st.integers(1, 3))
    flat = data.draw(st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens))
    wanted_RT = np.array(flat).reshape(rows, tokens)
    pieces = cut_columns(tokens, wanted_RT, most_tokens, most_wanted)
    assert [column for start, end in pieces for column in range(start, end)] == list(range(tokens))
    for start, end in pieces:
        assert 1 <= end - start <= most_tokens
        assert wanted_RT[:, start:end].sum(axis=1).max() <= most_wanted
