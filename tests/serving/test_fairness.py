"""Who is served next: clients by what they got so far, each client's own requests in order; and several answers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import PROMPTS, Client, alone, ask, plain, run
from toy_session import ToySession, logits_of

from engines.generation import GenerationConfig
from mxcompile.serving.cache import MemoryBudget, StateCache
from mxcompile.serving.fair_queue import FairQueue
from mxcompile.serving.requests import Finished, Limits, PromptRead, Request, RequestError
from mxcompile.serving.scheduler import Scheduler

LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=4, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, LENGTHS, st.integers(1, 3))
def test_backlogged_clients_get_the_same(heavy, light, slots):
    """While both wait, what two clients got differs by no more than the running batch and one prompt can hold."""
    scheduler = Scheduler(ToySession(max_batch_size=slots))
    for name, lengths in (("a", heavy), ("b", light)):
        for prompt, new in lengths:
            ask(scheduler, [1] * prompt, GenerationConfig(max_new_tokens=new), client=name)
    queue = scheduler._queue  # the only place where service can be seen before a request ends
    bound = 2 * max(20, slots * 20) + 20
    while queue.waiting_of("a") and queue.waiting_of("b"):
        scheduler.step()
        assert abs(queue.served("a") - queue.served("b")) <= bound
    run(scheduler)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_hundred_waiting_requests_do_not_starve_another_client(slots):
    scheduler = Scheduler(ToySession(max_batch_size=slots))
    order: list[str] = []

    def note(name):
        return lambda event: order.append(name) if isinstance(event, Finished) else None

    for index in range(100):
        config = GenerationConfig(max_new_tokens=3)
        scheduler.submit(Request([1, 2], config, note(f"many {index}"), client="many"))
    for _ in range(9):
        scheduler.step()
    before = len(order)
    for index in range(2):
        scheduler.submit(Request([3, 4], GenerationConfig(max_new_tokens=3), note(f"few {index}"), client="few"))
    run(scheduler)
    assert order.index("few 0") <= before + slots, "only those that were running may end before it"
    assert order.index("few 1") <= before + 2 * slots + 1
    many = [name for name in order if name.startswith("many")]
    assert many == [f"many {index}" for index in range(100)], "first come first served within a client"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.booleans()), max_size=60))
def test_the_queue_keeps_each_clients_order_and_loses_nothing(actions):
    queue: FairQueue[SimpleNamespace] = FairQueue()
    pushed, popped, running = [], [], []
    for number, (client, tokens, push) in enumerate(actions):
        if push:
            queue.push(SimpleNamespace(client=client, number=number))
            pushed.append((client, number))
        elif len(queue):
            taken = queue.pop()
            queue.charge(taken.client, tokens)
            popped.append((taken.client, taken.number))
            running.append(taken.client)
        elif running:
            queue.ended(running.pop())
    left = [(item.client, item.number) for item in queue]
    assert sorted(popped + left) == sorted(pushed)
    for client in "abc":
        assert [n for c, n in popped + left if c == client] == [n for c, n in pushed if c == client]


def test_who_was_away_has_no_claim():
    queue: FairQueue[SimpleNamespace] = FairQueue()
    for _ in range(3):
        queue.push(SimpleNamespace(client="old"))
    queue.pop()
    queue.charge("old", 1000)
    queue.push(SimpleNamespace(client="new"))
    assert queue.served("new") == 1000
    assert queue.pop().client == "old", "of equals the one that came first"
    queue.charge("old", 1)
    assert queue.pop().client == "new"


def test_one_client_may_not_fill_the_queue():
    limits = Limits(max_queue=4, max_queue_per_client=2)
    scheduler = Scheduler(ToySession(max_batch_size=1), limits=limits)
    ask(scheduler, [1], client="a")
    scheduler.step()
    for _ in range(2):
        ask(scheduler, [1], client="a")
    with pytest.raises(RequestError, match="2 requests of this client") as refused:
        ask(scheduler, [1], client="a")
    assert refused.value.kind == "limited"
    for _ in range(2):
        ask(scheduler, [1], client="b")
    with pytest.raises(RequestError, match="4 requests are waiting") as refused:
        ask(scheduler, [1], client="c")
    assert refused.value.kind == "unavailable"
    run(scheduler)


class Watched(ToySession):
    """Notes what each run was for: the number of prompt tokens that it read, or 0 for a decode step."""

    runs: list[int]

    def forward(self, ids_BT, new_lengths_B, state, positions="last", taps=False):
        begun = [bool(state.history[row]) for row in range(state.batch_size)]
        is_decode = ids_BT.shape[1] == 1 and all(begun[row] for row, new in enumerate(new_lengths_B) if new)
        self.runs.append(0 if is_decode else int(sum(new_lengths_B)))
        return super().forward(ids_BT, new_lengths_B, state, positions, taps)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(9, 40), min_size=1, max_size=6), st.sampled_from([None, 3, 9, 16]))
def test_prompts_never_hold_an_answer_up_by_more_than_the_budget(lengths, budget):
    session = Watched(max_batch_size=4, max_seq_len=64)
    session.runs = []
    scheduler = Scheduler(session, limits=Limits(prefill_budget=budget))
    talker, _ = ask(scheduler, [2], GenerationConfig(max_new_tokens=60))
    scheduler.step()
    session.runs.clear()
    for length in lengths:
        # Lengths whose last chunk has one token look like a decode step to `Watched`.
        ask(scheduler, [1] * (length + (length % 4 == 1)), GenerationConfig(max_new_tokens=1))
    read = 0
    while not talker.ended:
        before = len(talker.tokens)
        session.runs.clear()
        scheduler.step()
        assert len(talker.tokens) == before + 1, "one token in every step"
        assert sum(session.runs) <= max(4, budget or 4)
        read += sum(session.runs)
    run(scheduler)
    assert read > 0


def test_clients_take_turns_in_reading_prompts():
    """Five chunks of one client take ten turns beside six slots of another, not thirty."""
    scheduler = Scheduler(ToySession(max_batch_size=7))
    for _ in range(6):
        ask(scheduler, [1] * 40, GenerationConfig(max_new_tokens=1), client="many")
    scheduler.step()
    single, _ = ask(scheduler, [2] * 20, GenerationConfig(max_new_tokens=1), client="one")
    steps = 0
    while not single.ended:
        scheduler.step()
        steps += 1
    assert steps <= 10
    run(scheduler)


@settings(max_examples=80, deadline=None)
@given(
    PROMPTS,
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.9]),
    st.integers(1, 9),
    st.none() | st.integers(0, 12),
)
def test_several_answers_are_single_answers_and_read_the_prompt_once(prompt, count, slots, temperature, new, leave):
    scheduler = Scheduler(ToySession(max_batch_size=slots))
    configs = [GenerationConfig(max_new_tokens=new, temperature=temperature, seed=seed) for seed in range(count)]
    clients = [Client() for _ in configs]
    others = tuple(zip(configs[1:], clients[1:], strict=True))
    beside, _ = ask(scheduler, [5, 6, 7], client="beside")
    ticket = scheduler.submit(Request(prompt, configs[0], clients[0], others=others))
    for _ in range(1000 if leave is None else leave):
        scheduler.step()
    if leave is not None:
        scheduler.cancel(ticket)
        run(scheduler)
    for client, config in zip(clients, configs, strict=True):
        if isinstance(client.end, Finished):
            assert plain(client.end.result) == alone(prompt, config)
        else:
            assert leave is not None
            assert client.end.kind == "cancelled"
    assert plain(beside.end.result) == alone([5, 6, 7], GenerationConfig(max_new_tokens=4))
    assert scheduler.idle
    assert scheduler.metrics.counts["prompt_tokens_total"] <= len(prompt) + 3
    if leave is None:
        assert scheduler.metrics.counts["prompt_tokens_total"] == len(prompt) + 3
        assert scheduler.metrics.ends["finished"] == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(PROMPTS, min_size=1, max_size=4), st.integers(1, 3), st.sampled_from([None, 3, 40]))
def test_the_logprobs_of_prompts_are_by_definition(prompts, slots, budget):
    """Beside other requests, with chunks longer and shorter than what is scored at once, and further answers."""
    cache = StateCache(MemoryBudget(10**6), 24, "engine")
    session = ToySession(max_batch_size=slots, chunk=24)
    scheduler = Scheduler(session, limits=Limits(prefill_budget=budget), cache=cache)
    config, asked = GenerationConfig(max_new_tokens=2), []
    for index, prompt in enumerate(prompts * 2):
        first, other = Client(), Client()
        scheduler.submit(Request(prompt, config, first, others=((config, other),), prompt_logprobs=index % 3))
        asked.append((prompt, first, other, ask(scheduler, prompt, config)[0], index % 3))
    run(scheduler)
    for prompt, first, other, plain_one, top in asked:
        read = first.events[0]
        assert isinstance(read, PromptRead)
        assert read.tokens == prompt
        for at, entry in enumerate(read.logprobs, start=1):
            scores = logits_of(prompt[:at]).astype(np.float64)
            scores -= np.log(np.exp(scores).sum())
            assert entry.chosen == pytest.approx(scores[prompt[at]])
            assert [value for _, value in entry.top] == pytest.approx(sorted(scores, reverse=True)[:top])
        assert len(read.logprobs) == len(prompt) - 1
        for client in (first, other, plain_one):
            assert plain(client.end.result) == alone(prompt, config)
        assert not any(isinstance(event, PromptRead) for event in other.events + plain_one.events)


def test_several_answers_have_limits():
    scheduler = Scheduler(ToySession())
    more = tuple((GenerationConfig(), Client()) for _ in range(128))
    with pytest.raises(RequestError, match="129 answers were asked for; at most 128"):
        ask(scheduler, [1], others=more)
