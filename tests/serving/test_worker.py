"""The engine process's own part, without a server around it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_session import VOCABULARY, ToySession

from engines.errors import EngineError
from engines.generation import ConstraintError, TokenEvent
from mxcompile.guides import GuideError
from mxcompile.serving import wire, worker
from mxcompile.serving.state_file import StateFileError
from mxcompile.serving.wire import Wire
from mxcompile.serving.worker import Settings, Worker

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0


@pytest.fixture
def ends(loaded):
    """A worker, and the other end of its wire."""
    ours, theirs = socket.socketpair()
    yield Worker(loaded, Settings("", cache_bytes=0), Wire(theirs)), Wire(ours)
    ours.close()
    theirs.close()


class Toy(ToySession):
    """A toy engine of which a rank is lost, in a run or at rest, when `lost` is set."""

    lost = False

    def check_alive(self):
        if self.lost:
            raise EngineError("rank 1 ended unexpectedly", exit_code=3)

    def forward(self, *args, **settings):
        self.check_alive()
        return super().forward(*args, **settings)


class Served:
    """A worker with a toy engine that runs in a thread; `front` is the other end of its wire."""

    def __init__(self, monkeypatch, **settings):
        self.session = Toy(max_batch_size=2)
        engine = SimpleNamespace(
            session=self.session,
            config=self.session.config,
            tokenizer=None,
            eos_token_ids=(),
            max_seq_len=48,
            max_batch_size=2,
            tokens=lambda ids: ids,
        )
        monkeypatch.setattr(worker, "engine_digest", lambda config: "toy")
        ours, self.theirs = socket.socketpair()
        ours.settimeout(LIMIT_S)
        self.front, self.ours = Wire(ours), ours
        self.worker = Worker(engine, Settings("", **settings), Wire(self.theirs))
        self.raised: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()

    def ask(self, number, **fields):
        self.front.send([{"do": "generate", "id": number, "input_ids": [number], "max_tokens": 4} | fields])

    def until(self, *ended):
        """The messages up to and with the ends of these requests, without metrics."""
        found, missing = [], set(ended)
        while missing:
            messages = [message for message in self.front.receive() if message["is"] != "metrics"]
            found += messages
            missing -= {m["id"] for m in messages if m["is"] == "failed" or m.get("final")}
        return found

    def ended(self):
        """Return when the worker has ended."""
        self._thread.join(LIMIT_S)
        assert not self._thread.is_alive()

    def _run(self):
        try:
            self.worker.run()
        except BaseException as error:
            self.raised = error


def test_an_answer_too_long_to_send_fails_alone(ends, monkeypatch):
    worker, front = ends
    monkeypatch.setattr(wire, "LARGEST_FRAME", 2000)
    asked = {"input_ids": [1, 2, 3], "max_tokens": 40, "end_id": -1}
    worker._generate({"id": 1, **asked, "top_log_probs": 20})
    worker._generate({"id": 2, **asked})
    while not worker._scheduler.idle:
        worker._scheduler.step()
    worker._flush()
    first, second = front.receive(), front.receive()
    assert [first[0]["is"], first[0]["id"]] == ["failed", 1]
    assert "too long to send; ask for fewer" in first[0]["message"]
    assert [second[0]["is"], second[0]["id"], second[0]["output_tokens"]] == ["end", 2, 40]


def test_tokens_keep_their_order_beside_a_refusal(monkeypatch):
    """The thread that listens sends a refusal, and with it the token that is waiting; the next token must not pass that one."""
    served = Served(monkeypatch, cache_bytes=0)
    sending, go_on = threading.Event(), threading.Event()
    send = served.worker._wire.send

    def slowly(messages):
        if threading.current_thread() is not threading.main_thread():
            sending.set()
            assert go_on.wait(LIMIT_S)
        send(messages)

    monkeypatch.setattr(served.worker._wire, "send", slowly)
    served.worker._generate({"id": 1, "input_ids": [1], "max_tokens": 3, "stream": True})
    served.worker._scheduler.step()  # the first token waits to be sent
    refusing = threading.Thread(target=served.worker._generate, args=({"id": 2, "input_ids": []},))
    refusing.start()
    assert sending.wait(LIMIT_S)
    served.worker._scheduler.step()
    release = threading.Timer(0.2, go_on.set)  # whoever passes has done so by then; a correct order does not hang on it
    release.start()
    served.worker._flush()
    refusing.join()
    served.worker._scheduler.step()
    served.worker._flush()
    messages = served.until(1)
    assert [m["is"] for m in messages if m["id"] == 1] == ["token", "token", "end"]
    assert [m["is"] for m in messages if m["id"] == 2] == ["failed"]
    expected = [event.token for event in _alone([1], 3)]
    assert [token for m in messages if m["id"] == 1 for token in m["ids"]] == expected


def _alone(prompt, count):
    from engines.generation import Generation, GenerationConfig

    events = Generation(ToySession(), [prompt], GenerationConfig(max_new_tokens=count))
    return [event for event in events if isinstance(event, TokenEvent)]


def test_a_lost_engine_is_told_to_all_and_sessions_at_rest_are_written(monkeypatch, tmp_path):
    served = Served(monkeypatch, state_dir=str(tmp_path))
    served.start()
    served.ask(1, session_id="rests", session_start=True)
    assert served.until(1)[-1]["is"] == "end"
    served.session.lost = True  # noticed at rest
    served.ended()
    assert isinstance(served.raised, EngineError)
    served.ask(2)  # between this and the end of the process
    (told,) = served.until(2)
    assert (told["kind"], told["message"]) == (
        "unavailable",
        "the engine failed; try again when it has been started anew",
    )
    assert len(list(tmp_path.glob("*.state"))) == 1


@pytest.mark.parametrize("lost", [False, True])
def test_sessions_at_rest_are_written_when_nobody_listens_any_more(monkeypatch, tmp_path, lost):
    """A front that was killed before it had read everything leaves a reset connection, not a broken pipe; also when a rank is
    lost with it.
    """
    served = Served(monkeypatch, state_dir=str(tmp_path))
    served.worker._generate({"id": 1, "input_ids": [1], "max_tokens": 4, "session_id": "rests", "session_start": True})
    while not served.worker._scheduler.idle:
        served.worker._scheduler.step()
    served.worker._generate({"id": 2, "input_ids": [1], "max_tokens": 4})
    served.session.lost = lost

    def gone(messages):
        raise ConnectionResetError

    monkeypatch.setattr(served.worker._wire, "send", gone)
    with pytest.raises(EngineError) if lost else contextlib.nullcontext():
        served.worker.run()
    assert len(list(tmp_path.glob("*.state"))) == 1


def test_a_request_that_breaks_something_fails_alone(monkeypatch):
    served = Served(monkeypatch)

    def broken(name):
        raise StateFileError("unforeseen") if name == "known" else RuntimeError("unforeseen")

    monkeypatch.setattr(served.worker._sessions, "load", broken)
    served.start()
    served.ask(1, session_id="odd")
    (told,) = served.until(1)
    assert (told["kind"], told["message"]) == (
        "internal",
        "the engine process failed on this request; its log says why",
    )
    served.ask(2)
    assert served.until(2)[-1]["is"] == "end"
    served.front.close()
    served.ended()


@pytest.mark.parametrize("told", [False, True])
def test_an_engine_process_whose_front_ends_while_it_starts_ends_too(engine, told):
    """Before it was told what to load, and once it was: in silence."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "mxcompile.serving.worker", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    if told:
        Wire(ours).send([{"engine": str(engine), "threads": 1}])
    ours.close()
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert said == ""


def test_an_engine_process_whose_front_ends_does_not_load_to_the_end():
    """It would hold memory that the next server needs."""
    code = (
        "import json, socket, sys, time\n"
        "from mxcompile.serving import worker\n"
        "worker.load = lambda *a, **k: (print('loading', flush=True), time.sleep(600))\n"
        "sys.exit(worker.main())\n"
    )
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    Wire(ours).send([{"engine": "any"}])
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    ours.close()
    assert process.wait(LIMIT_S) == 0


def guided(number):
    return {"guided_decoding_guide_type": "regex", "guided_decoding_guide": f"a{number}"}


def test_a_guide_that_is_being_compiled_holds_up_nobody_and_is_waited_for_at_the_end(monkeypatch):
    served, go_on = Served(monkeypatch, cache_bytes=0), threading.Event()

    def compiled(guide):
        assert go_on.wait(LIMIT_S)
        raise GuideError(f"{guide.kind}: no {guide.text}")

    monkeypatch.setattr(served.worker._engine, "guides", SimpleNamespace(compile=compiled), raising=False)
    served.start()
    served.ask(1, **guided(1))
    served.ask(2, **guided(2))
    served.ask(3)
    assert [message["is"] for message in served.until(3)] == ["end"]
    served.front.send([{"do": "cancel", "id": 2}, {"do": "drain"}])
    assert [(message["id"], message["kind"]) for message in served.until(2)] == [(2, "cancelled")]
    go_on.set()
    (failed,) = served.until(1)
    assert (failed["kind"], failed["message"]) == ("invalid", "regex: no a1")
    served.ended()
    assert served.raised is None


def test_an_answer_that_can_no_longer_follow_its_guide_fails_alone(monkeypatch):
    class Lost:
        steps = 0

        def allowed(self):
            self.steps += 1
            if self.steps == 3:
                raise ConstraintError("the grammar is too much")
            return np.ones(VOCABULARY, bool), True

        def accept(self, token):
            pass

    served = Served(monkeypatch, cache_bytes=0)
    made = SimpleNamespace(compile=lambda guide: Lost)
    monkeypatch.setattr(served.worker._engine, "guides", made, raising=False)
    served.start()
    served.ask(1, stream=True, end_id=-1, **guided(1))
    served.ask(2)
    messages = served.until(1, 2)
    assert [message["is"] for message in messages if message["id"] == 2] == ["end"]
    (failed,) = (message for message in messages if message["is"] == "failed")
    assert (failed["id"], failed["kind"], failed["message"]) == (1, "invalid", "the grammar is too much")
