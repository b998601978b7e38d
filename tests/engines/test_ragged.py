"""Ragged rows in runs, chunks and pieces, over a runtime that only remembers: whatever way the tokens went, every row saw its own,
in order, and got the logits that it asked for.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.config import EngineConfig, Limits, Port
from engines.errors import EngineError
from engines.interface import StepResult
from engines.plan import Run
from engines.ragged import RaggedSession

VOCABULARY, LONGEST = 50, 60


@dataclasses.dataclass
class Rows:
    """What each row has seen."""

    seen: list[list[int]]

    @property
    def batch_size(self) -> int:
        return len(self.seen)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.seen])

    def reserve(self, tokens: int) -> None:
        assert tokens <= LONGEST


class Remembering(RaggedSession):
    """Logits are a function of all that the row has seen up to the position; those of padding and idle rows are NaN."""

    def __init__(self, most_tokens: int | None = None, most_positions: int = 1) -> None:
        self._max_step_tokens, self._max_step_positions = most_tokens, most_positions
        self._config = EngineConfig(
            "1", "toy", {}, "float32", Limits(8, LONGEST, 16), [], [Port("logits", "float32", [VOCABULARY])], [], []
        )
        self._config = dataclasses.replace(self._config, taps=["tap"])

    def _own(self, state: Rows) -> Rows:
        return state

    def _step(self, run: Run, ids_BT, new_B, wanted_RP, state: Rows, taps: bool = False) -> StepResult:  # type: ignore[no-untyped-def]
        rows = range(run.first, run.end)
        assert wanted_RP.shape[0] == len(rows)
        if self._max_step_tokens is not None:
            assert run.tokens <= self._max_step_tokens
            assert wanted_RP.shape[1] <= self._max_step_positions
        logits = np.full((*wanted_RP.shape, VOCABULARY), np.nan, np.float32)
        tap = np.full((len(rows), run.tokens, 1), np.nan, np.float32)
        for index, row in enumerate(rows):
            before = len(state.seen[row])
            assert new_B[row] <= run.tokens
            state.seen[row] += ids_BT[row, : new_B[row]].tolist()
            for column in range(new_B[row]):
                tap[index, column] = mark(state.seen[row][: before + column + 1])[0]
            for place, position in enumerate(wanted_RP[index]):
                if position < new_B[row]:
                    logits[index, place] = mark(state.seen[row][: before + position + 1])
        return StepResult(logits, {"tap": tap} if taps else {})


def mark(seen: list[int]) -> np.ndarray:
    return np.random.default_rng(seen).random(VOCABULARY, np.float32) + 1


rows = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=20), min_size=1, max_size=5)
sessions = st.sampled_from([Remembering(), Remembering(7), Remembering(1), Remembering(4, 3)])


@settings(max_examples=80)
@given(sessions, rows, st.data(), st.integers(1, 24))
def test_prefill_gives_each_row_the_logits_of_its_last_token(session, prompts, data, chunk):
    """Rows that end in an earlier chunk, idle ones between others, and empty prompts too."""
    state = Rows([data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2)) for _ in prompts])
    expected = [before + prompt for before, prompt in zip(state.seen, prompts, strict=True)]
    logits = session.prefill(prompts, state, chunk)
    assert state.seen == expected
    for row, prompt in enumerate(prompts):
        assert (logits[row] == (mark(expected[row]) if prompt else 0)).all()


def test_a_row_that_ended_keeps_its_logits_while_its_neighbours_go_on():
    """Single tokens of the outer rows run together with the idle row between them."""
    prompts = [[1] * 17, [2] * 5, [], [3] * 17]
    logits = Remembering().prefill(prompts, Rows([[], [], [], []]), 16)
    assert (logits == [mark(row) if row else np.zeros(VOCABULARY) for row in prompts]).all()


@settings(max_examples=80)
@given(sessions, rows.filter(any), st.data())
def test_forward_gives_what_was_asked_for_and_zeros_at_padding(session, prompts, data):
    new = [len(prompt) for prompt in prompts]
    tokens = max(new) + data.draw(st.integers(0, 3))
    ids = np.full((len(prompts), tokens), -7)  # ids of padding are not looked at
    for row, prompt in enumerate(prompts):
        ids[row, : new[row]] = prompt
    column = st.integers(0, tokens - 1)
    some = data.draw(st.lists(st.lists(column, min_size=4, max_size=4), min_size=len(new), max_size=len(new)))
    for positions in ("last", "all", np.array(some)):
        state = Rows([[] for _ in prompts])
        found = session.forward(ids, new, state, positions, taps=True)
        assert state.seen == prompts
        for row, prompt in enumerate(prompts):
            marks = [mark(prompt[: i + 1]) for i in range(len(prompt))]
            full = np.array(marks + [np.zeros(VOCABULARY)] * (tokens - len(prompt)))
            asked = (
                some[row]
                if isinstance(positions, np.ndarray)
                else range(tokens)
                if positions == "all"
                else [new[row] - 1]
            )
            wanted = full[list(asked)] if prompt else np.zeros((len(asked), VOCABULARY))
            assert (found.logits[row] == wanted).all()
            assert (found.taps["tap"][row, :, 0] == full[:, 0]).all()


def test_a_row_that_would_pass_the_limit_is_named_before_anything_runs():
    state = Rows([[1], [2] * LONGEST])
    with pytest.raises(EngineError, match=f"row 1 holds {LONGEST} tokens and gets 1 more"):
        Remembering().prefill([[3], [4]], state)
    assert state.seen == [[1], [2] * LONGEST]
    Remembering().prefill([[3], []], state)  # a full row that gets nothing is in nobody's way
    assert state.seen[0] == [1, 3]


@pytest.mark.parametrize(
    ("ids", "new", "message"),
    [
        ([[1], [2, 3]], [1, 2], "pad rows on the right"),
        ([[1.0], [2.0]], [1, 1], "must be integers"),
        ([[1], [2]], [1, 2], "do not lie within 0 and the 1 tokens"),
        ([[1], [2]], [1], "one new length per row"),
        ([[1], [VOCABULARY]], [1, 1], "outside the vocabulary"),
    ],
)
def test_tokens_that_make_no_step_are_refused(ids, new, message):
    state = Rows([[], []])
    with pytest.raises(EngineError, match=message):
        Remembering().forward(ids, new, state)
    assert state.seen == [[], []]
