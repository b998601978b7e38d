"""The prefix cache: what it gives back is what a row would remember, what it holds is what it counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_session import ToySession

from engines.interface import RowSnapshot
from mxcompile.serving.cache import MemoryBudget, Saved, SessionStore, StateCache, _End, _Part

BLOCK = 4
PART, END = 2 * BLOCK * 4, 1000  # bytes of one block's keys and values, and of the states at its end


class Row:
    """A state of one row that has read `tokens`; its recurrent state is large, as the real one is."""

    def __init__(self, tokens):
        self.tokens = np.array(tokens, np.float32)

    def read_row(self, row, start=0):
        states = np.full((1, END // 4), self.tokens @ np.arange(1, len(self.tokens) + 1), np.float32)[None]
        own = self.tokens[start:].reshape(1, -1, 1)  # views, as a session may give them
        return RowSnapshot(len(self.tokens), {0: states}, {1: own}, {1: own + 1})


def read(cache, prompt):
    """Read `prompt` as the scheduler does; returns how many tokens were known."""
    keys = cache.keys(prompt)
    found = cache.find(keys[: (len(prompt) - 1) // BLOCK])
    known = found.length if found else 0
    if found is not None:
        expected = Row(prompt[:known]).read_row(0)
        for which in ("recurrent", "key", "value"):
            for layer, array in getattr(expected, which).items():
                assert np.array_equal(getattr(found, which)[layer], array)
    for end in range(known + BLOCK, len(prompt) + 1, BLOCK):
        cache.store(keys[: end // BLOCK], Row(prompt[:end]), 0)
    return known


def held(budget):
    """Bytes that the entries really keep alive: of whole arrays, not of views."""
    arrays = {}
    for _, value in budget.items():
        parts = {_Part: ("key", "value"), _End: ("recurrent",)}[type(value)]
        for array in (a for part in parts for a in getattr(value, part).values()):
            assert array.base is None, "a view keeps what it shows alive"
            arrays[id(array)] = array.nbytes
    return sum(arrays.values())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(0, 20_000),
)
def test_any_prompts_within_any_budget(asked, limit):
    budget = MemoryBudget(limit)
    cache = StateCache(budget, BLOCK, "engine")
    common = list(range(40))
    prompts = [common[:shared] + [100 + which] * own for shared, own, which in asked]
    for prompt in prompts:
        if prompt:
            assert read(cache, prompt) <= len(prompt) - 1
        assert budget.used == held(budget) <= limit
        for other in prompts:
            keys = cache.keys(other)
            parts = [budget.look(("part", key)) is not None for key in keys]
            assert parts == sorted(parts, reverse=True), "a block without the one before is of no use"
            ends = [budget.look(("end", key)) is not None for key in keys]
            assert all(part for part, end in zip(parts, ends, strict=True) if end)


@pytest.mark.parametrize("blocks", [1, 5, 20])
def test_memory_grows_with_the_tokens_and_not_with_the_slot(blocks):
    budget = MemoryBudget(10**9)
    read(StateCache(budget, BLOCK, "engine"), list(range(blocks * BLOCK)))
    assert budget.used == blocks * (PART + END)
    session = ToySession(max_seq_len=10**6)
    state = session.new_state(1)
    session.prefill([list(range(20))[: blocks * BLOCK]], state)
    assert state.read_row(0).nbytes == 4 + 8 * min(20, blocks * BLOCK), "a session's likewise"


def test_a_long_prompt_keeps_its_end_when_room_is_short():
    budget = MemoryBudget(20 * PART + 3 * END)
    cache = StateCache(budget, BLOCK, "engine")
    prompt = list(range(16 * BLOCK + 1))
    read(cache, prompt)
    assert read(cache, prompt) == 16 * BLOCK


def test_where_prompts_part_is_kept_when_room_is_short():
    budget = MemoryBudget(60 * PART + 4 * END)
    cache = StateCache(budget, BLOCK, "engine")
    common = list(range(8 * BLOCK))
    found = [read(cache, common + [100 + which] * 8 * BLOCK) for which in range(5)]
    # The first leaves nothing there; the second finds that they part there, and all others profit.
    assert found[2:] == [8 * BLOCK] * 3


def test_one_long_prompt_does_not_push_the_others_out():
    budget = MemoryBudget(200 * PART + 6 * END)
    cache = StateCache(budget, BLOCK, "engine")
    short = [[which] * (BLOCK + 1) for which in range(3)]
    for prompt in short * 2:
        read(cache, prompt)
    read(cache, list(range(10, 10 + 100 * BLOCK)))
    assert [read(cache, prompt) for prompt in short] == [BLOCK] * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 30)), max_size=20), st.integers(100, 1500))
def test_sessions_leave_in_order_of_last_use(actions, limit):
    budget = MemoryBudget(limit)
    store = SessionStore(budget, "engine")
    model: dict[str, int] = {}
    for name, tokens in actions:
        array = np.ones((1, tokens, 4), np.float32)
        store.save(name, RowSnapshot(tokens, {}, {0: array}, {}), [])
        model.pop(name, None)
        if array.nbytes <= limit:
            while sum(model.values()) + array.nbytes > limit:
                model.pop(next(iter(model)))
            model[name] = array.nbytes
        assert [key[1] for key, value in budget.items() if isinstance(value, Saved)] == list(model)
        assert budget.used == sum(model.values())
