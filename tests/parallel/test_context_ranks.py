"""Engines whose ranks share the tokens of a prefill chunk, run for real: processes under MPI, against the engine of one rank."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines_on_ranks import Workshop
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_ranks import GREEDY_TOKENS, TOLERANCE, gone, rank_pids, walk

from engines import load
from engines.errors import EngineError
from engines.parallel.pieces import read

LIGHTNING, SOFTMAX = range(7), 7


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("segments"))


@pytest.fixture(scope="module")
def one(workshop: Workshop) -> Any:
    return load(workshop.engine(1, 1, 1), threads=1)


@pytest.fixture(scope="module")
def four(workshop: Workshop) -> Iterator[Any]:
    """Four ranks that share the tokens of a chunk."""
    with load(workshop.engine(1, 1, 1, 4), threads=1) as session:  # type: ignore[attr-defined]
        yield session


@pytest.fixture(scope="module")
def expected(one: Any) -> tuple[list[np.ndarray], list[list[int]], Any]:
    return walk(one)


def check_states(ours: Any, theirs: Any) -> None:
    assert np.array_equal(ours.lengths, theirs.lengths)
    for layer in LIGHTNING:
        scale = max(1.0, np.abs(theirs.recurrent(layer)).max())
        assert np.abs(ours.recurrent(layer) - theirs.recurrent(layer)).max() < TOLERANCE * scale
    assert np.abs(ours.key(SOFTMAX) - theirs.key(SOFTMAX)).max(initial=0) < TOLERANCE
    assert np.abs(ours.value(SOFTMAX) - theirs.value(SOFTMAX)).max(initial=0) < TOLERANCE


def check_copies(session: Any, state: Any) -> None:
    """All ranks hold the same states, bit for bit."""
    for what, layer in [*(("recurrent", layer) for layer in LIGHTNING), ("key", SOFTMAX), ("value", SOFTMAX)]:
        first, *others = (answer["part"] for answer in state._ask({"do": "part", "what": what, "layer": layer}))
        assert all(np.array_equal(first, other) for other in others), f"{what} of layer {layer}"


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (1, 1, 1, 4), (2, 1, 2, 2)])
def test_ranks_equal_one_rank(workshop: Workshop, expected, sizes: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    with load(workshop.engine(*sizes), threads=1) as session:  # type: ignore[attr-defined]
        logits, tokens, state = walk(session)
        assert len(tokens) == GREEDY_TOKENS
        assert tokens == expected[1]
        assert max(np.abs(a - b).max() for a, b in zip(logits, expected[0], strict=True)) < TOLERANCE
        check_states(state, expected[2])
        if sizes[0] == 1:
            check_copies(session, state)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 33), min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(0, 99),
)
@example(
    [[0, 1, 2], [3, 4, 5], [0, 0, 0], [33, 0, 7]], 64, 0
)  # fewer tokens than ranks, rows without any, no whole multiples
def test_any_lengths_and_chunks(one: Any, four: Any, steps: list[list[int]], chunk: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    ours, theirs = four.new_state(3), one.new_state(3)
    for lengths in steps:
        prompts = [random.integers(0, one.vocab_size, length).tolist() for length in lengths]
        # The one rank takes each prompt whole, so that chunks are compared with none.
        found, wanted = four.prefill(prompts, ours, chunk), one.prefill(prompts, theirs)
        assert np.abs(found - wanted).max() < TOLERANCE
        tokens = wanted.argmax(-1)
        assert np.abs(four.decode(tokens, ours) - one.decode(tokens, theirs)).max() < TOLERANCE
    check_states(ours, theirs)
    check_copies(four, ours)


def test_inner_values_and_all_logits(one: Any, four: Any) -> None:
    random = np.random.default_rng(3)
    ours, theirs = four.new_state(2), one.new_state(2)
    for new in ([10, 7], [1, 1], [3, 0]):
        ids = random.integers(0, one.vocab_size, (2, max(new)))
        found = four.forward(ids, new, ours, positions="all", taps=True)
        wanted = one.forward(ids, new, theirs, positions="all", taps=True)
        assert np.abs(found.logits - wanted.logits).max() < TOLERANCE
        assert list(found.taps) == list(wanted.taps)
        for name, value in found.taps.items():
            assert value.shape == wanted.taps[name].shape
            assert np.abs(value - wanted.taps[name]).max() < TOLERANCE, name


def test_rows_move_between_engines(one: Any, four: Any) -> None:
    ours, theirs = four.new_state(2), one.new_state(1)
    four.prefill([[5, 6, 7, 8, 9], [1]], ours)
    snapshot = ours.read_row(0)
    theirs.write_row(0, snapshot)
    ours.write_row(1, theirs.read_row(0))
    logits = four.decode([3, 3], ours)
    assert np.array_equal(logits[0], logits[1])
    assert np.abs(one.decode([3], theirs)[0] - logits[0]).max() < TOLERANCE
    check_copies(four, ours)


def test_a_prompt_up_to_the_last_position(workshop: Workshop, one: Any, four: Any) -> None:
    """Padding to a multiple of the ranks goes beyond the engine's longest sequence, and must not need more cache than there is."""
    limit = one.max_seq_len
    prompt = [np.random.default_rng(0).integers(0, one.vocab_size, limit).tolist()]
    ours, theirs = four.new_state(1), one.new_state(1)
    four.prefill([prompt[0][: limit - 3]], ours)
    one.prefill([prompt[0][: limit - 3]], theirs)
    found, wanted = four.prefill([prompt[0][-3:]], ours), one.prefill([prompt[0][-3:]], theirs)
    assert np.abs(found - wanted).max() < TOLERANCE
    check_states(ours, theirs)
    with pytest.raises(EngineError, match="max_seq_len"):
        four.prefill([[1]], ours)


def test_a_rank_killed_in_a_prefill_ends_the_run(workshop: Workshop) -> None:
    session: Any = load(workshop.engine(1, 1, 1, 2), threads=1)
    state, pids = session.new_state(1), rank_pids(session)
    threading.Timer(0.5, os.kill, (pids[1], signal.SIGKILL)).start()

    def forever() -> None:
        while True:
            session.prefill([list(range(50))], state)
            state.clear_row(0)

    with pytest.raises(EngineError, match="rank") as caught:
        forever()
    assert caught.value.exit_code == 3
    assert all(gone(pid) for pid in pids.values())


def test_weights_are_in_the_engine_once(workshop: Workshop) -> None:
    ours, theirs = workshop.engine(1, 1, 1, 4), workshop.engine(1, 1, 1)
    weights = [file.name for file in ours.iterdir() if file.name.endswith(".weights.bin")]
    assert weights == ["rank0.weights.bin"]
    assert (ours / weights[0]).stat().st_size == (theirs / weights[0]).stat().st_size


def test_a_file_with_a_group_of_ranks_that_are_not_there_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    data = (workshop.engine(2, 1, 2, 2) / "rank3.prefill.pieces").read_bytes()
    assert data.count(b'"group": [1, 3]') > 0
    (tmp_path / "pieces").write_bytes(data.replace(b'"group": [1, 3]', b'"group": [1, 4]'))
    with pytest.raises(EngineError, match="unknown exchange"):
        read(tmp_path / "pieces")
