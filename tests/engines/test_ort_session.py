"""The ONNX Runtime session against a token-by-token fp64 model.

Tolerances, fixed beforehand: logits 2e-4 absolute at a logit scale of about 8 (fp32 keeps 1e-7 relative per
operation, some tens of operations deep), states 1e-4 of their largest value. A near tie between the second and the
third expert may flip in fp32 and change everything after it, so prompts with a gap below 1e-4 are not used.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
import small_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_engine import MAX_SEQ_LEN, SmallEngine
from small_graph import KINDS, N, Sequence64

from engines.errors import EngineError
from engines.interface import Session, State
from engines.onnxruntime.session import OrtSession, load
from engines.onnxruntime.state import FIRST_CAPACITY

LOGITS, STATES, SAFE_GAP = 2e-4, 1e-4, 1e-4


@pytest.fixture(scope="module")
def session(small_engine: SmallEngine) -> OrtSession:
    return load(small_engine.path, threads=2)


@lru_cache(maxsize=64)
def oracle(seed: int, length: int) -> tuple[np.ndarray, np.ndarray, Sequence64]:
    """Tokens, logits after each, and the fp64 model at their end; tokens chosen clear of expert ties."""
    for attempt in range(100):
        tokens = np.random.default_rng((seed, attempt)).integers(0, N, length)
        sequence = Sequence64(small_graph.random_weights())
        logits = sequence.push_all(tokens)
        if sequence.closest_choice > SAFE_GAP:
            return tokens, logits, sequence
    raise AssertionError("no prompt without an expert tie")


def check_row(state: State, row: int, sequence: Sequence64) -> None:
    assert state.lengths[row] == sequence.length
    for layer, kind in enumerate(KINDS):
        if kind == "lightning":
            pairs = [(state.recurrent(layer)[row], sequence.recurrent[layer])]
        else:
            pairs = [
                (state.key(layer)[row, :, : sequence.length], np.stack(sequence.keys[layer], 1)),
                (state.value(layer)[row, :, : sequence.length], np.stack(sequence.values[layer], 1)),
            ]
        for found, expected in pairs:
            assert np.abs(found - expected).max() <= STATES * np.abs(expected).max()


def content(state: State, row: int) -> list[bytes]:
    snapshot = state.read_row(row)
    return [a.tobytes() for part in (snapshot.recurrent, snapshot.key, snapshot.value) for a in part.values()]


def test_session_and_state_satisfy_the_interface(session: OrtSession) -> None:
    assert isinstance(session, Session)
    assert isinstance(session.new_state(1), State)
    assert (session.max_seq_len, session.max_batch_size, session.vocab_size) == (MAX_SEQ_LEN, 6, N)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 300])
@pytest.mark.parametrize("chunk", [None, 1000])
def test_prefill_and_decode_match_the_oracle(session: OrtSession, length: int, chunk: int | None) -> None:
    tokens, logits, sequence = oracle(1, length + 3)
    state = session.new_state(1)
    found = [session.prefill([tokens[:length]], state, chunk)]
    found += [session.decode([token], state) for token in tokens[length:]]
    assert np.abs(np.concatenate(found) - logits[length - 1 :]).max() < LOGITS
    check_row(state, 0, sequence)


def test_token_by_token_equals_prefill(session: OrtSession) -> None:
    tokens, logits, sequence = oracle(2, 40)
    state = session.new_state(1)
    found = np.concatenate([session.decode([token], state) for token in tokens])
    assert np.abs(found - logits).max() < LOGITS
    check_row(state, 0, sequence)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.lists(st.integers(0, 23), min_size=3, max_size=3), min_size=1, max_size=4),
    chunk=st.sampled_from([1, 5, 16, 100]),
)
def test_ragged_rows_match_single_rows(session: OrtSession, pieces: list[list[int]], chunk: int) -> None:
    """Three rows that grow by different amounts, some by nothing: each equals a sequence of its own."""
    rows = [oracle(10 + row, 24 * 4) for row in range(3)]
    state = session.new_state(3)
    for new in pieces:
        past = state.lengths.copy()
        prompts = [rows[b][0][past[b] : past[b] + new[b]] for b in range(3)]
        before = [content(state, b) for b in range(3)]
        found = session.prefill(prompts, state, chunk)
        for b in range(3):
            if new[b]:
                assert np.abs(found[b] - rows[b][1][past[b] + new[b] - 1]).max() < LOGITS
            else:
                assert not found[b].any()
                assert content(state, b) == before[b]  # bit for bit
    assert state.lengths.tolist() == np.sum(pieces, axis=0).tolist()
    for b in range(3):
        sequence = Sequence64(small_graph.random_weights())
        sequence.push_all(rows[b][0][: state.lengths[b]])
        if sequence.length:
            check_row(state, b, sequence)


@pytest.mark.parametrize("fresh", [True, False])
def test_forward_gives_logits_where_asked(session: OrtSession, fresh: bool) -> None:
    rows = [oracle(20 + b, 24) for b in range(3)]
    start = 0 if fresh else 4
    new = np.array([12, 20, 9])
    ids = np.full((3, 20), 7)
    for b in range(3):
        ids[b, : new[b]] = rows[b][0][start : start + new[b]]

    def ready() -> State:
        state = session.new_state(3)
        session.prefill([rows[b][0][:start] for b in range(3)], state)
        return state

    every = session.forward(ids, new, ready(), "all").logits
    last = session.forward(ids, new, ready(), "last").logits
    chosen = np.array([[0, 5], [19, 3], [8, 9]])  # 9 is padding in the last row
    some = session.forward(ids, new, ready(), chosen).logits
    for b in range(3):
        expected = rows[b][1][start : start + new[b]]
        assert np.abs(every[b, : new[b]] - expected).max() < LOGITS
        assert not every[b, new[b] :].any()
        assert np.abs(last[b, 0] - expected[-1]).max() < LOGITS
        assert np.abs(some[b, 0] - expected[chosen[b, 0]]).max() < LOGITS
    assert np.abs(some[1, 1] - rows[1][1][start + 3]).max() < LOGITS
    assert not some[2, 1].any()


def test_idle_rows_in_a_single_token_step_keep_their_states(session: OrtSession) -> None:
    rows = [oracle(30 + b, 12) for b in range(4)]
    state = session.new_state(4)
    session.prefill([r[0][:11] for r in rows], state)
    before = [content(state, b) for b in range(4)]
    ids = np.array([[r[0][11]] for r in rows])
    found = session.forward(ids, [0, 1, 0, 1], state).logits
    for b in (0, 2):
        assert content(state, b) == before[b]
        assert not found[b].any()
    for b in (1, 3):
        assert np.abs(found[b, 0] - rows[b][1][11]).max() < LOGITS
    assert state.lengths.tolist() == [11, 12, 11, 12]
    # What the idle rows' slots hold beyond their ends must not matter to their next step.
    found = session.forward(ids, [1, 0, 1, 0], state).logits
    for b in (0, 2):
        assert np.abs(found[b, 0] - rows[b][1][11]).max() < LOGITS


def test_taps_give_inside_values(session: OrtSession) -> None:
    rows = [oracle(40 + b, 9) for b in range(2)]
    state, plain = session.new_state(2), session.new_state(2)
    ids = np.stack([r[0] for r in rows])
    result = session.forward(ids, [9, 6], state, "all", taps=True)
    assert set(result.taps) == set(small_graph.TAPS)
    for name, found in result.taps.items():
        for b, length in ((0, 9), (1, 6)):
            expected = np.array(rows[b][2].taps[name])[:length]
            assert np.abs(found[b, :length] - expected).max() <= STATES * max(1.0, np.abs(expected).max())
            assert not found[b, length:].any()
    without = session.forward(ids, [9, 6], plain, "all")
    assert without.taps == {}
    assert np.abs(without.logits - result.logits).max() < LOGITS
    assert state.lengths.tolist() == [9, 6]


def test_states_are_updated_in_place(session: OrtSession) -> None:
    tokens, _, _ = oracle(1, 64)
    state = session.new_state(2)
    places = {(spec.layer, spec.role): state.buffer_address(spec.layer, spec.role) for spec in session.config.states}
    views = {name: value.data_ptr() for name, value in state.values((0, 2)).items()}
    for spec in session.config.states:
        assert views[spec.past] == places[spec.layer, spec.role]  # the runtime got this very buffer
    total = state.nbytes
    session.prefill([tokens[:40], tokens[:7]], state)
    session.decode(tokens[40:42], state)
    assert all(state.recurrent(layer).any() for layer in session.config.layers("lightning"))
    assert all(state.key(layer).any() for layer in session.config.layers("softmax"))
    assert places == {key: state.buffer_address(*key) for key in places}  # and no copy took its place
    assert state.nbytes == total


def test_a_row_of_the_buffer_is_bound_in_place(session: OrtSession) -> None:
    state = session.new_state(3)
    whole, last = state.values((0, 3)), state.values((2, 3))
    for spec in session.config.states:
        row_bytes = int(np.prod(whole[spec.past].shape()[1:])) * 4
        assert last[spec.past].data_ptr() - whole[spec.past].data_ptr() == 2 * row_bytes


def test_capacity_grows_and_keeps_what_was_there(session: OrtSession) -> None:
    tokens, logits, sequence = oracle(3, FIRST_CAPACITY + 6)
    state = session.new_state(2)
    assert state.capacity == FIRST_CAPACITY
    session.prefill([tokens[: FIRST_CAPACITY - 2], tokens[:5]], state)
    assert state.capacity == FIRST_CAPACITY
    for position in range(FIRST_CAPACITY - 2, len(tokens)):
        ids = np.array([[tokens[position]], [0]])
        found = session.forward(ids, [1, 0], state).logits[0, 0]
        assert np.abs(found - logits[position]).max() < LOGITS
    assert FIRST_CAPACITY < state.capacity <= MAX_SEQ_LEN + 1
    check_row(state, 0, sequence)


def test_a_full_row_does_not_stop_the_others(session: OrtSession) -> None:
    tokens, logits, _ = oracle(4, 30)
    state = session.new_state(2)
    session.prefill([np.resize(tokens, MAX_SEQ_LEN), tokens[:20]], state)
    before = content(state, 0)
    found = session.forward(np.array([[0], [tokens[20]]]), [0, 1], state).logits
    assert np.abs(found[1, 0] - logits[20]).max() < LOGITS
    session.prefill([[], tokens[21:30]], state, chunk=4)
    assert content(state, 0) == before
    with pytest.raises(
        EngineError, match=f"row 0 holds {MAX_SEQ_LEN} tokens and gets 1 more.*max_seq_len {MAX_SEQ_LEN}"
    ):
        session.decode(tokens[:2], state)
    assert state.lengths.tolist() == [MAX_SEQ_LEN, 30]


def test_rows_can_be_saved_moved_and_cleared(session: OrtSession) -> None:
    tokens, logits, sequence = oracle(5, 50)
    state = session.new_state(2)
    session.prefill([tokens[:30], tokens[:10]], state)
    snapshot = state.read_row(0)
    assert snapshot.length == 30
    assert snapshot.nbytes == sum(len(part) for part in content(state, 0))
    part = state.read_row(0, 12)
    assert part.length == 30
    for layer, array in snapshot.recurrent.items():
        assert np.array_equal(part.recurrent[layer], array)
    for layer in snapshot.key:
        assert np.array_equal(part.key[layer], snapshot.key[layer][:, 12:])
        assert np.array_equal(part.value[layer], snapshot.value[layer][:, 12:])
    with pytest.raises(EngineError, match="a row of 30 tokens cannot be read from token 31 on"):
        state.read_row(0, 31)
    session.decode(tokens[:2], state)  # the snapshot is a copy
    other = session.new_state(3)
    other.write_row(2, snapshot)
    found = session.prefill([[], [], tokens[30:]], other)
    assert np.abs(found[2] - logits[-1]).max() < LOGITS
    check_row(other, 2, sequence)
    other.clear_row(2)
    assert other.lengths.tolist() == [0, 0, 0]
    found = session.prefill([[], [], tokens[:20]], other)
    assert np.abs(found[2] - logits[19]).max() < LOGITS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": MAX_SEQ_LEN + 1}, "max_seq_len"),
        ({"length": 7}, "this engine needs"),
        ({"recurrent": {}}, "recurrent_state of layer 0 is none"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(session: OrtSession, change: dict, message: str) -> None:
    from dataclasses import replace

    state = session.new_state(1)
    session.prefill([[1, 2, 3]], state)
    before = content(state, 0)
    with pytest.raises(EngineError, match=message):
        state.write_row(0, replace(state.read_row(0), **change))
    assert content(state, 0) == before


def _bad_calls() -> Iterator[tuple]:
    yield "outside the vocabulary", lambda s, state: s.prefill([[N], [1]], state)
    yield "outside the vocabulary", lambda s, state: s.decode([-1, 0], state)
    yield "must be integers", lambda s, state: s.decode([0.5, 0.5], state)
    yield "must be integers", lambda s, state: s.prefill([[0.5], [1]], state)
    yield "must be integers", lambda s, state: s.forward([[1], [1]], [0.5, 1], state)
    yield "2 rows", lambda s, state: s.prefill([[1]], state)
    yield "one token for each", lambda s, state: s.decode([1, 2, 3], state)
    yield "at least 1 token", lambda s, state: s.prefill([[1], [1]], state, chunk=0)
    yield "exceeds the engine's max_seq_len", lambda s, state: s.prefill([[1] * (MAX_SEQ_LEN - 2), [1]], state)
    yield "do not lie within", lambda s, state: s.forward(np.zeros((2, 3), int), [4, 1], state)
    yield "do not lie within", lambda s, state: s.forward(np.zeros((2, 3), int), [-1, 1], state)
    yield "forward takes ids", lambda s, state: s.forward(np.zeros((3, 3), int), [1, 1, 1], state)
    yield "positions must lie", lambda s, state: s.forward(np.zeros((2, 3), int), [1, 1], state, np.array([[3], [0]]))
    yield "positions must be", lambda s, state: s.forward(np.zeros((2, 3), int), [1, 1], state, "first")
    yield "another session", lambda s, state: s.decode([1, 2], object())
    yield "max_batch_size", lambda s, state: s.new_state(7)
    yield "max_batch_size", lambda s, state: s.new_state(0)
    yield "row 2 does not exist", lambda s, state: state.clear_row(2)
    yield "layer 1 has no recurrent_state", lambda s, state: state.recurrent(1)


@pytest.mark.parametrize(("message", "call"), list(_bad_calls()))
def test_bad_calls_are_refused_and_change_nothing(session: OrtSession, message: str, call) -> None:
    state = session.new_state(2)
    session.prefill([[1, 2, 3], [4]], state)
    before = [content(state, 0), content(state, 1)]
    with pytest.raises(EngineError, match=message) as caught:
        call(session, state)
    assert caught.value.exit_code == 2
    assert state.lengths.tolist() == [3, 1]
    assert [content(state, 0), content(state, 1)] == before


def test_decode_results_are_the_callers_to_keep(session: OrtSession) -> None:
    state = session.new_state(1)
    first = session.decode([1], state)
    kept = first.copy()
    session.decode([2], state)
    assert np.array_equal(first, kept)
    with pytest.raises(ValueError, match="read-only"):
        state.lengths[0] = 5


def test_weights_need_not_be_packed(small_engine: SmallEngine, session: OrtSession) -> None:
    tokens, logits, _ = oracle(1, 35)
    plain = load(small_engine.path, threads=1, prepack=False)
    assert np.abs(plain.prefill([tokens], plain.new_state(1))[0] - logits[-1]).max() < LOGITS


def test_loading_and_running_needs_neither_onnx_nor_torch(small_engine: SmallEngine) -> None:
    script = (
        "import sys\n"
        "for name in ('onnx', 'onnx_ir', 'onnxscript', 'torch', 'transformers', 'safetensors'): sys.modules[name] = None\n"
        "import engines\n"
        f"s = engines.load({str(small_engine.path)!r})\n"
        "state = s.new_state(2)\n"
        "s.prefill([[1, 2, 3], [4]], state)\n"
        "s.decode([5, 6], state)\n"
        "print(state.lengths.tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[4, 2]", "")
