"""Images in the scheduler: beside whatever else is served each answer is that of the engine alone, and nobody waits for a picture
longer than for a chunk of a prompt.
"""

from __future__ import annotations

import contextlib
import signal

import pytest
from pictures import encoded, picture
from served import until
from test_scheduler import Client

from engines.errors import EngineError
from engines.generation import GenerationConfig
from engines.onnxruntime.vision import TILES_AT_A_TIME
from mxcompile.serving.cache import MemoryBudget, SessionStore, StateCache
from mxcompile.serving.image_reader import ImageReader
from mxcompile.serving.images import PromptImage, place_images
from mxcompile.serving.requests import Failed, Finished, Limits, Request, RequestError
from mxcompile.serving.scheduler import Scheduler

LIMIT_S = 300
SMALL, WIDE, LARGE = (encoded(picture(*size, seed)) for seed, size in enumerate([(28, 28), (90, 30), (100, 300)]))


@pytest.fixture(scope="module")
def reader(vl_loaded):
    made = ImageReader(vl_loaded.config.vision)
    yield made
    made.close()


@pytest.fixture
def held(reader):
    """Nothing is decoded inside the block."""

    @contextlib.contextmanager
    def hold():
        if reader._child.process is None or reader._child.process.poll() is not None:
            reader._started()
        reader._child.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            reader._child.process.send_signal(signal.SIGCONT)

    return hold


@pytest.fixture
def make(vl_loaded, reader):
    def made(*, chunk=32, cache=0, **options):
        budget = MemoryBudget(cache)
        return Scheduler(
            vl_loaded.session,
            detokenizer=vl_loaded.tokenizer.detokenizer,
            cache=StateCache(budget, chunk, "engine") if cache else None,
            sessions=SessionStore(budget, "engine") if cache else None,
            images=reader,
            prefill_chunk=chunk,
            **options,
        )

    return made


def ask(scheduler, loaded, text, images=(), tokens=6, **options):
    """Submit a request; its events, and its ticket."""
    ids, placed = place_images(text, loaded.tokens(text), images, loaded.config.vision)
    client = Client()
    config = GenerationConfig(max_new_tokens=tokens)
    return client, scheduler.submit(Request(ids, config, client, images=placed, **options))


def alone(loaded, text, images=(), tokens=6, chunk=None):
    settings = dict(max_new_tokens=tokens, stop_token_ids=(), prefill_chunk=chunk)
    return loaded.generate([text], images=[list(images)], **settings)[0]


def run(scheduler):
    while not scheduler.idle:
        scheduler.step()
        if not scheduler.idle:
            scheduler.wait(LIMIT_S)


def step_until(scheduler, true):
    for _ in range(10_000):
        if true():
            return
        scheduler.step()
        if not true() and not scheduler.idle:
            scheduler.wait(LIMIT_S)
    raise AssertionError


@pytest.mark.parametrize("chunk", [1, 5, 16, 17, 64])
def test_prompts_are_cut_anywhere_also_within_images(make, vl_loaded, chunk):
    """Beside rows of text, in the same runs."""
    asked = [
        ("<image>", [SMALL]),
        ("only text", []),
        ("a <image><image> b", [WIDE, SMALL]),
        ("more text " * 9, []),
        ("<image> <image> <image>!", [SMALL, WIDE, SMALL]),
    ]
    scheduler = make(chunk=chunk, limits=Limits(prefill_budget=3 * chunk))
    found = [ask(scheduler, vl_loaded, *one)[0] for one in asked]
    run(scheduler)
    for client, one in zip(found, asked, strict=True):
        expected = alone(vl_loaded, *one, chunk=chunk)
        assert client.end.result.tokens == expected.tokens
        assert client.end.result.prompt_tokens == expected.prompt_tokens


def test_the_digest_decides_what_is_known(make, vl_loaded):
    """Pairs of prompts with the same tokens: the image, its neighbour, or the order of two differ."""
    others = [encoded(picture(28, 28, seed)) for seed in range(20, 24)]
    text = "<image> and right next to it <image> with words behind them, enough to fill some blocks of the cache"
    asked = [others[:2], others[:2], [others[2], others[1]], [others[0], others[3]], [others[1], others[0]], others[:2]]
    scheduler = make(chunk=8, cache=1 << 28)
    found = []
    for images in asked:
        client, _ = ask(scheduler, vl_loaded, text, images, tokens=24)
        run(scheduler)
        assert client.end.result.tokens == alone(vl_loaded, text, images, tokens=24, chunk=8).tokens
        found.append(client.end.cached_tokens)
    assert len({tuple(alone(vl_loaded, text, images, tokens=24).tokens) for images in asked}) == 4, "they look alike"
    ids, (_, second) = place_images(text, vl_loaded.tokens(text), asked[0], vl_loaded.config.vision)
    whole, first = (len(ids) - 1) // 8 * 8, second.start // 8 * 8
    assert found == [0, whole, 0, first, 0, whole]
    assert scheduler.metrics.counts["images_known_total"] == 2 + 2 + 1
    assert scheduler.metrics.counts["images_encoded_total"] == 2 * 6 - 5
    other = text.replace(" with", "?")  # within the block that the second image ends in, which is not the image's first
    assert second.end % 8
    client, _ = ask(scheduler, vl_loaded, other, asked[0], tokens=24)
    run(scheduler)
    assert client.end.cached_tokens == second.end // 8 * 8
    assert client.end.result.tokens == alone(vl_loaded, other, asked[0], tokens=24, chunk=8).tokens


def image(start, tokens, digest):
    return PromptImage("", b"", (1, 1), tokens, digest * 32, start)


def test_keys_of_blocks_are_those_of_what_is_in_them():
    cache = StateCache(MemoryBudget(1), 4, "engine")
    tokens = [1, 2, 9, 9, 9, 9, 9, 9, 3, 4, 5, 6, 7, 8, 9, 9]
    plain = cache.keys(tokens)

    def common(one, other):
        keys, others = cache.keys(tokens, one), cache.keys(tokens, other)
        assert len(keys) == len(others) == 4
        same = [a == b for a, b in zip(keys, others, strict=True)]
        assert same == sorted(same, reverse=True), "a key is of the whole prefix"
        return sum(same)

    here = image(2, 6, b"a")
    assert cache.keys(tokens, [here]) == cache.keys(tokens, [here])
    assert common([here], []) == common([here], [image(2, 6, b"b")]) == 0
    assert common([here, image(14, 2, b"a")], [here]) == 3
    assert common([here, image(14, 2, b"a")], [here, image(14, 2, b"b")]) == 3
    assert common([image(2, 2, b"a"), image(4, 4, b"b")], [image(2, 2, b"a"), image(4, 4, b"c")]) == 1
    assert common([image(2, 2, b"a"), image(4, 4, b"b")], [here]) == 0, "where one ends and the next begins"
    assert common([image(4, 4, b"a")], [image(5, 3, b"a")]) == 1, "only a part of it"
    assert common([image(4, 2, b"a")], [image(5, 2, b"a")]) == 1, "the same image one place further on"
    assert cache.keys(tokens[:4], [image(4, 4, b"a")]) == plain[:1], "what comes behind a block is not in its key"


def test_running_answers_go_on_while_an_image_is_decoded_and_encoded(make, vl_loaded, held):
    scheduler = make()
    beside, _ = ask(scheduler, vl_loaded, "go on", tokens=200)
    scheduler.step()
    with held():
        about, _ = ask(scheduler, vl_loaded, "<image>?", [LARGE])
        for count in range(2, 30):
            scheduler.step()
            assert len(beside.tokens) == count, "one token a step"
            assert not about.events
        (job,) = [job for job in scheduler._slots if job is not None and job.encoding is not None]
        assert job.blocked
    until(lambda: not job.blocked, "it is not decoded")
    steps, before = 0, len(beside.tokens)
    while job.encoding is not None:
        scheduler.step()
        steps += 1
        assert len(beside.tokens) == before + steps, "a run of the vision graph takes no more than a chunk's turn"
    tiles = scheduler.metrics.counts["image_tiles_total"]
    assert steps == -(-tiles // TILES_AT_A_TIME) > 2
    run(scheduler)
    assert about.end.result.tokens == alone(vl_loaded, "<image>?", [LARGE]).tokens
    assert beside.end.result.tokens == alone(vl_loaded, "go on", tokens=200).tokens


def test_images_and_prompts_take_turns(make, vl_loaded, held, monkeypatch):
    """One client's many images delay another's prompt by no more than a turn, and running answers by no more than one at a time."""
    scheduler = make()
    runs, steps_of = 0, vl_loaded.session.image_steps

    def counted(image):
        nonlocal runs
        steps, result = steps_of(image), None
        while result is None:
            runs += 1
            try:
                next(steps)
            except StopIteration as end:
                result = end.value
            else:
                yield
        return result

    monkeypatch.setattr(vl_loaded.session, "image_steps", counted)
    with held():
        first = [ask(scheduler, vl_loaded, "<image>" * 2, [LARGE, LARGE], client="many")[0] for _ in range(4)]
        scheduler.step()
    jobs = [job for job in scheduler._slots if job is not None]
    until(lambda: all(not job.blocked for job in jobs), "they are not decoded")
    scheduler.step()
    assert runs == 1
    other, _ = ask(scheduler, vl_loaded, "x" * 200, client="other")
    prompt = -(-len(vl_loaded.tokens("x" * 200)) // 32)
    for _ in range(2 * prompt + 1):
        assert not other.events
        before = runs
        scheduler.step()
        assert runs <= before + 1
        if other.events:
            break
    assert other.events
    assert runs > 1
    assert not any(client.ended for client in first)
    run(scheduler)
    expected = alone(vl_loaded, "<image>" * 2, [LARGE, LARGE]).tokens
    assert all(client.end.result.tokens == expected for client in first)


@pytest.mark.parametrize("when", ["waiting", "decoding", "encoding", "reading"])
def test_a_request_with_images_can_be_cancelled_at_any_time(make, vl_loaded, held, when):
    scheduler = make()
    with held() if when in ("waiting", "decoding") else contextlib.nullcontext():
        gone, ticket = ask(scheduler, vl_loaded, "<image><image>", [LARGE, WIDE])
        if when != "waiting":
            scheduler.step()
            (job,) = [job for job in scheduler._slots if job is not None]
        if when == "encoding":
            step_until(scheduler, lambda: job.encoding._steps is not None)
        if when == "reading":
            step_until(scheduler, lambda: job.encoding is None)
            assert scheduler._state.images
        scheduler.cancel(ticket)
        scheduler.wait(LIMIT_S)  # returns: there is something to do
        scheduler.step()
        assert when != "decoding" or job.encoding._reading.dropped
        assert gone.end == Failed("cancelled", "the request was cancelled")
        assert scheduler.idle
        text, _ = ask(scheduler, vl_loaded, "only text")
        run(scheduler)
        assert text.end.result.tokens == alone(vl_loaded, "only text").tokens
    assert not scheduler._state.images, "no features stay behind in the slot"
    again, _ = ask(scheduler, vl_loaded, "<image><image>", [LARGE, WIDE])
    run(scheduler)
    assert again.end.result.tokens == alone(vl_loaded, "<image><image>", [LARGE, WIDE]).tokens


def test_waiting_requests_are_refused_in_time_while_images_hold_the_slots(make, vl_loaded, held):
    now = [0.0]
    scheduler = make(limits=Limits(max_wait_s=10.0), clock=lambda: now[0])
    with held():
        slots = [ask(scheduler, vl_loaded, "<image>", [SMALL])[0] for _ in range(8)]
        late, _ = ask(scheduler, vl_loaded, "text")
        scheduler.step()
        now[0] = 11.0
        scheduler.step()
        assert isinstance(late.end, Failed)
        assert late.end.kind == "unavailable"
    run(scheduler)
    assert all(isinstance(client.end, Finished) for client in slots)


def test_a_damaged_image_fails_its_request_alone(make, vl_loaded):
    damaged = WIDE[: len(WIDE) - 60]
    scheduler = make(cache=1 << 26)
    bad, _ = ask(scheduler, vl_loaded, "<image><image>", [SMALL, damaged], session="album", session_start=True)
    good, _ = ask(scheduler, vl_loaded, "<image>", [SMALL])
    run(scheduler)
    assert bad.end.kind == "invalid"
    assert bad.end.message.startswith("images.1: the image is damaged")
    assert good.end.result.tokens == alone(vl_loaded, "<image>", [SMALL]).tokens
    assert scheduler.metrics.ends["invalid"] == 1
    with pytest.raises(RequestError, match="is not known"):  # it was never begun, and is busy no more
        ask(scheduler, vl_loaded, "text", session="album")


def test_a_failing_vision_graph_fails_its_request_alone(make, vl_loaded, monkeypatch):
    scheduler = make()
    beside, _ = ask(scheduler, vl_loaded, "go on", tokens=30)

    def fails(image):
        raise EngineError("ONNX Runtime failed on an image: no memory", exit_code=3)
        yield

    with monkeypatch.context() as broken:
        broken.setattr(vl_loaded.session, "image_steps", fails)
        bad, _ = ask(scheduler, vl_loaded, "<image>", [SMALL])
        step_until(scheduler, lambda: bad.ended)
    assert bad.end == Failed("internal", "ONNX Runtime failed on an image: no memory")
    run(scheduler)
    assert beside.end.result.tokens == alone(vl_loaded, "go on", tokens=30).tokens


def test_image_files_that_wait_have_a_limit(make, vl_loaded, held):
    scheduler = make(limits=Limits(max_image_bytes=3 * len(LARGE)))
    with held():
        for _ in range(8 + 3):
            ask(scheduler, vl_loaded, "<image>", [LARGE])
            scheduler.step()
        with pytest.raises(RequestError, match="bytes of images are waiting already; try again later") as refused:
            ask(scheduler, vl_loaded, "<image>", [SMALL])
        assert refused.value.kind == "unavailable"
        ask(scheduler, vl_loaded, "text")
    run(scheduler)


def test_a_session_keeps_no_image_that_failed(make, vl_loaded):
    """A turn with a damaged image leaves the session as it was."""
    scheduler = make(cache=1 << 26)
    first, _ = ask(scheduler, vl_loaded, "<image>", [SMALL], tokens=2, session="album", session_start=True)
    run(scheduler)
    assert vl_loaded.config.vision.image_token_id not in first.tokens, "else the run alone takes it for an image"
    bad, _ = ask(scheduler, vl_loaded, "<image>", [WIDE[:-60]], session="album")
    run(scheduler)
    assert bad.end.kind == "invalid"
    second, _ = ask(scheduler, vl_loaded, " and <image>", [WIDE], session="album")
    run(scheduler)
    ids = [*vl_loaded.tokens("<image>"), *first.end.result.tokens, *vl_loaded.tokens(" and <image>")]
    expected = vl_loaded.generate([ids], images=[[SMALL, WIDE]], max_new_tokens=6, stop_token_ids=())[0]
    assert second.end.result.tokens == expected.tokens


def test_a_server_without_a_reader_takes_no_images(vl_loaded):
    scheduler = Scheduler(vl_loaded.session)
    with pytest.raises(RequestError, match="reads no images"):
        ask(scheduler, vl_loaded, "<image>", [SMALL])
