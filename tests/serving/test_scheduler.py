"""The scheduler against single runs: whatever arrives when, each request gets what it would get alone."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_session import VOCABULARY, ToySession

from engines.generation import GenerationConfig, TokenEvent, generate
from mxcompile.serving.cache import MemoryBudget, SessionStore, StateCache
from mxcompile.serving.requests import Failed, Finished, Limits, Request, RequestError
from mxcompile.serving.scheduler import Scheduler

PROMPTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)
CONFIGS = st.builds(
    GenerationConfig,
    max_new_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.sampled_from([(), (3,), (4, 9)]),
    logprobs=st.sampled_from([None, 2]),
)
# Arrival step, prompt, settings, and the step after which the client leaves.
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 12), PROMPTS, CONFIGS, st.none() | st.integers(0, 15)), min_size=1, max_size=10
)


class Client:
    """Collects one request's events and checks their order."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        assert not self.ended, "nothing may follow the end"
        self.events.append(event)

    @property
    def ended(self):
        return bool(self.events) and isinstance(self.events[-1], Finished | Failed)

    @property
    def end(self):
        assert self.ended, self.events
        return self.events[-1]

    @property
    def tokens(self):
        return [event.token for event in self.events if isinstance(event, TokenEvent)]


def run(scheduler, steps=5000):
    for _ in range(steps):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def plain(result):
    """A result without its durations."""
    values = result.to_dict()
    return {name: value for name, value in values.items() if not name.endswith(("_s",))}


def alone(prompt, config):
    return plain(generate(ToySession(), [prompt], config)[0])


def ask(scheduler, prompt, config=None, **options):
    client = Client()
    ticket = scheduler.submit(Request(prompt, config or GenerationConfig(max_new_tokens=4), client, **options))
    return client, ticket


@settings(max_examples=150, deadline=None)
@given(ARRIVALS, st.integers(1, 3), st.sampled_from([None, 3, 9]), st.booleans())
def test_every_request_gets_what_it_gets_alone(arrivals, slots, budget, cached):
    session = ToySession(max_batch_size=slots)
    cache = StateCache(MemoryBudget(600), 4, "engine") if cached else None
    scheduler = Scheduler(session, limits=Limits(prefill_budget=budget), cache=cache)
    clients, leaving = {}, []
    for step in range(max(a[0] for a in arrivals) + 1):
        for index, (arrival, prompt, config, leave) in enumerate(arrivals):
            if arrival == step:
                clients[index], ticket = ask(scheduler, prompt, config)
                if leave is not None:
                    leaving.append((step + leave, ticket))
        for when, ticket in leaving:
            if when == step:
                scheduler.cancel(ticket)
        scheduler.step()
    run(scheduler)
    assert scheduler.active == 0
    assert scheduler.waiting == 0
    for index, (_, prompt, config, leave) in enumerate(arrivals):
        expected = alone(prompt, config)
        end = clients[index].end
        if isinstance(end, Finished):
            assert plain(end.result) == expected
            assert clients[index].tokens[: len(expected["tokens"])] == expected["tokens"]
        else:
            assert leave is not None
            assert end.kind == "cancelled"
            streamed = clients[index].tokens
            assert streamed[: len(expected["tokens"])] == expected["tokens"][: len(streamed)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.integers(1, 5)), min_size=2, max_size=4), st.sampled_from([1, 300, 10**6]))
def test_a_session_continues_as_if_everything_were_read_again(tmp_path_factory, turns, memory):
    session = ToySession(max_seq_len=200)
    budget = MemoryBudget(memory)
    store = SessionStore(budget, "engine", tmp_path_factory.mktemp("states"))
    scheduler = Scheduler(session, sessions=store)
    said: list[int] = []
    for turn, (prompt, length) in enumerate(turns):
        said += prompt
        config = GenerationConfig(max_new_tokens=length)
        client, _ = ask(scheduler, prompt, config, session="talk", session_start=turn == 0)
        run(scheduler)
        assert isinstance(client.end, Finished)
        assert client.end.result.tokens == generate(ToySession(max_seq_len=200), [said], config)[0].tokens
        assert client.end.cached_tokens == (len(said) - len(prompt) - 1 if turn else 0)
        said += client.end.result.tokens
    assert budget.used <= memory


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), PROMPTS), min_size=2, max_size=12), st.integers(16, 800))
def test_shared_prefixes_within_any_budget(asked, memory):
    """Prompts that share prefixes: same tokens as a full prefill, and the budget holds after each."""
    prefixes = [[1] * 8, [1] * 8 + [2] * 8, [5] * 12, []]
    budget = MemoryBudget(memory)
    scheduler = Scheduler(ToySession(), cache=StateCache(budget, 4, "engine"))
    config = GenerationConfig(max_new_tokens=3, temperature=1.0, seed=4)
    for which, rest in asked:
        client, _ = ask(scheduler, prefixes[which] + rest, config)
        run(scheduler)
        assert plain(client.end.result) == alone(prefixes[which] + rest, config)
        assert budget.used <= memory


def test_a_known_prefix_is_not_read_again():
    session = ToySession()
    scheduler = Scheduler(session, cache=StateCache(MemoryBudget(10**6), 4, "engine"))
    first, _ = ask(scheduler, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    run(scheduler)
    second, _ = ask(scheduler, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    run(scheduler)
    third, _ = ask(scheduler, [1, 2, 3, 4, 5, 6, 7, 8])  # the last token must be read to have logits
    run(scheduler)
    assert [client.end.cached_tokens for client in (first, second, third)] == [0, 8, 4]


def test_short_prompts_pass_a_long_one():
    scheduler = Scheduler(ToySession(max_seq_len=48))
    long, _ = ask(scheduler, [1] * 40, GenerationConfig(max_new_tokens=1))
    short, _ = ask(scheduler, [2], GenerationConfig(max_new_tokens=1))
    for _ in range(3):
        scheduler.step()
    assert short.ended
    assert not long.ended


def test_decoding_goes_on_while_a_prompt_is_read():
    scheduler = Scheduler(ToySession(max_seq_len=48))
    talker, _ = ask(scheduler, [2], GenerationConfig(max_new_tokens=30))
    scheduler.step()
    ask(scheduler, [1] * 40, GenerationConfig(max_new_tokens=1))
    before = len(talker.tokens)
    for _ in range(5):
        scheduler.step()
    assert len(talker.tokens) == before + 5


def test_first_come_first_served():
    scheduler = Scheduler(ToySession(max_batch_size=1))
    order = []
    for name in range(5):
        config = GenerationConfig(max_new_tokens=2)
        scheduler.submit(Request([name], config, lambda e, name=name: isinstance(e, Finished) and order.append(name)))
    run(scheduler)
    assert order == [0, 1, 2, 3, 4]


def test_a_full_queue_refuses_and_an_old_request_gives_up():
    now = [0.0]
    scheduler = Scheduler(ToySession(max_batch_size=1), limits=Limits(max_queue=2, max_wait_s=5), clock=lambda: now[0])
    ask(scheduler, [1], GenerationConfig(max_new_tokens=40))
    scheduler.step()
    waiting = [ask(scheduler, [1])[0] for _ in range(2)]
    with pytest.raises(RequestError, match="2 requests are waiting") as refused:
        ask(scheduler, [1])
    assert refused.value.kind == "unavailable"
    now[0] = 6.0
    scheduler.step()
    assert [client.end.kind for client in waiting] == ["unavailable"] * 2
    run(scheduler)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(prompt=[]), "the prompt is empty"),
        (dict(prompt=[1] * 49), "the prompt has 49 tokens, but the engine holds at most 48"),
        (dict(prompt=[1] * 31), "this server takes at most 30"),
        (dict(prompt=[VOCABULARY]), "vocabulary is 0 to 22"),
        (dict(prompt=[-1]), "vocabulary is 0 to 22"),
        (dict(prompt=[1], session="a"), "keeps no sessions"),
        (dict(prompt=[1], config=GenerationConfig(stop_strings=("x",))), "need a tokenizer"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(request_, message):
    limits = Limits(max_prompt_tokens=30) if len(request_["prompt"]) == 31 else Limits()
    scheduler = Scheduler(ToySession(), limits=limits)
    with pytest.raises(RequestError, match=message):
        ask(scheduler, **request_)
    assert scheduler.idle


def test_sessions_are_named_exactly():
    scheduler = Scheduler(ToySession(), sessions=SessionStore(MemoryBudget(10**6), "engine"))
    with pytest.raises(RequestError, match="session 'a' is not known"):
        ask(scheduler, [1], session="a")
    ask(scheduler, [1], session="a", session_start=True)
    with pytest.raises(RequestError, match="still answering"):
        ask(scheduler, [1], session="a")
    run(scheduler)
    held = ask(scheduler, [1], session="a")[0]
    run(scheduler)
    assert isinstance(held.end, Finished)


def test_a_cancelled_turn_leaves_the_session_as_it_was():
    def third_turn(cancelled):
        scheduler = Scheduler(ToySession(), sessions=SessionStore(MemoryBudget(10**6), "engine"))
        ask(scheduler, [1, 2], session="a", session_start=True)
        run(scheduler)
        if cancelled:
            client, ticket = ask(scheduler, [9] * 6, session="a")
            for _ in range(3):
                scheduler.step()
            scheduler.cancel(ticket)
            run(scheduler)
            assert client.end.kind == "cancelled"
        client, _ = ask(scheduler, [3], session="a")
        run(scheduler)
        return client.end.result.tokens

    assert third_turn(cancelled=True) == third_turn(cancelled=False)


def test_draining_serves_what_was_let_in():
    scheduler = Scheduler(ToySession(max_batch_size=1))
    clients = [ask(scheduler, [1])[0] for _ in range(3)]
    scheduler.drain()
    with pytest.raises(RequestError, match="shutting down"):
        ask(scheduler, [1])
    run(scheduler)
    assert all(isinstance(client.end, Finished) for client in clients)


def test_a_request_after_the_engine_is_gone_is_told_so_and_not_that_the_server_ends():
    scheduler = Scheduler(ToySession(max_batch_size=1))
    clients = [ask(scheduler, [1])[0] for _ in range(2)]
    scheduler.step()
    scheduler.fail_all("the engine failed")
    assert [client.end for client in clients] == [Failed("unavailable", "the engine failed")] * 2
    with pytest.raises(RequestError, match=r"^the engine failed$"):
        ask(scheduler, [1])


def test_many_threads_submit_and_cancel_while_one_steps():
    scheduler = Scheduler(ToySession(max_batch_size=2))
    clients, lock = [], threading.Lock()

    def submit(seed):
        for turn in range(10):
            prompt, config = [seed, turn], GenerationConfig(max_new_tokens=5, temperature=1.0, seed=seed)
            client, ticket = ask(scheduler, prompt, config)
            with lock:
                clients.append((client, prompt, config))
            if turn % 3 == 2:
                scheduler.cancel(ticket)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        scheduler.step()
    run(scheduler)
    assert len(clients) == 80
    for client, prompt, config in clients:
        if isinstance(client.end, Finished):
            assert plain(client.end.result) == alone(prompt, config)
        else:
            assert client.end.kind == "cancelled"
    assert scheduler.active == 0
