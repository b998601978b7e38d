"""Triton's side of an engine (model.py) with a toy Triton and a toy engine process: what is told whenever that process dies."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import psutil
import pytest

SERVING = Path(__file__).resolve().parents[2] / "mxcompile" / "serving"
LIMIT_S = 300.0
ENDED = "unavailable: the engine process ended; it is being started again, try again in a moment"
STARTING = "unavailable: the engine is being started again; try again in a moment"
ANSWER = {"is": "end", "final": True, "text": "x", "ids": [1], "log_probs": [], "finish_reason": "length"}
ANSWER |= {"prompt_tokens": 1, "output_tokens": 1, "cached_tokens": 0}

# Answers each request at once, but: text "hold" is never answered, "die" ends the process, "odd" is answered nonsense. It starts
# when the file `gate` is there, and dies when it is to drain if `fragile` is. `started` gets its process id.
ENGINE = """#!{python}
import os, socket, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from wire import Wire
folder = Path({folder!r})
wire = Wire(socket.socket(fileno=int(sys.argv[3])))
with (folder / "started").open("a") as file:
    file.write(f"{{os.getpid()}}\\n")
wire.receive()
while not (folder / "gate").exists():
    time.sleep(0.01)
wire.send([{{"is": "ready", "max_seq_len": 100, "max_text_bytes": 1000}}])
while (messages := wire.receive()) is not None:
    for message in messages:
        if message["do"] == "drain" and (folder / "fragile").exists():
            os._exit(9)
        elif message["do"] == "drain":
            wire.send([{{"is": "drained"}}])
            sys.exit()
        elif message["do"] == "generate" and message["text_input"] == "die":
            os._exit(9)
        elif message["do"] == "generate" and message["text_input"] == "odd":
            wire.send([{{"is": "end", "id": message["id"], "final": True}}])
        elif message["do"] == "generate" and message["text_input"] != "hold":
            wire.send([{answer!r} | {{"id": message["id"]}}])
"""


def until(true):
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


class Sender:
    """One request's way back: what it was told. Nothing may follow its last response."""

    def __init__(self):
        self.said, self._final = [], threading.Event()

    def send(self, response, flags=0):
        assert not self._final.is_set()
        self.said.append(str(response.error) if response.error else response.texts())
        if flags:
            self._final.set()

    def is_cancelled(self):
        return False

    def ended(self):
        assert self._final.wait(LIMIT_S)
        return self.said


class Response:
    def __init__(self, output_tensors, error=None):
        self.tensors, self.error = output_tensors, error

    def texts(self):
        return [tensor.array[0].decode() for tensor in self.tensors if tensor.name == "text_output"]


class Metric:
    def __init__(self, values, name):
        self._values, self._name = values, name

    def set(self, value):
        self._values[self._name] = value

    def increment(self, value):
        self._values[self._name] = self._values.get(self._name, 0) + value


def toy_triton(metrics):
    """The module that Triton puts into its Python processes."""

    class MetricFamily:
        COUNTER, GAUGE = "counter", "gauge"

        def __init__(self, name, description, kind):
            self._name = name

        def Metric(self, labels):
            return Metric(metrics, self._name)

    class TritonError(Exception):
        INVALID_ARG = UNAVAILABLE = CANCELLED = INTERNAL = None

        def __init__(self, message, code):
            super().__init__(message)

    module = ModuleType("triton_python_backend_utils")
    module.Tensor = lambda name, array: SimpleNamespace(name=name, array=array)
    module.InferenceResponse, module.TritonError, module.MetricFamily = Response, TritonError, MetricFamily
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.TritonModelException = RuntimeError
    module.Logger = SimpleNamespace(log_error=lambda text: None, log_warn=lambda text: None)
    return module


class Front:
    """A model that has been initialized, and its engine processes."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.metrics = folder, {}
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", toy_triton(self.metrics))
        for name in ("wire.py", "triton/request_tensors.py", "triton/model.py"):
            shutil.copy(SERVING / name, folder)
        program = folder / "engine"
        program.write_text(ENGINE.format(python=sys.executable, folder=str(folder), answer=ANSWER))
        program.chmod(0o700)
        (folder / "gate").touch()
        spec = importlib.util.spec_from_file_location("model_under_test", folder / "model.py")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.model = self.module.TritonPythonModel()
        parameters = {"python": str(program), "engine": json.dumps("engine")}
        config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
        self.model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": "toy",
            }
        )

    def pids(self):
        return [int(line) for line in (self.folder / "started").read_text().split()]

    def ask(self, text):
        sender = Sender()
        tensor = SimpleNamespace(name=lambda: "text_input", as_numpy=lambda: np.array([text.encode()], np.object_))
        request = SimpleNamespace(
            get_response_sender=lambda: sender,
            parameters=lambda: "",
            inputs=lambda: [tensor],
            request_id=lambda: "",
            correlation_id=lambda: 0,
        )
        self.model.execute([request])
        return sender

    def hold_starts(self):
        """Engine processes do not get ready from now on."""
        (self.folder / "gate").unlink()

    def let_start(self):
        (self.folder / "gate").touch()


@pytest.fixture
def front(tmp_path, monkeypatch):
    made = Front(tmp_path, monkeypatch)
    yield made
    made.let_start()
    made.model.finalize()
    assert not any(psutil.pid_exists(pid) for pid in made.pids())


def test_whoever_runs_when_the_engine_dies_is_told_once_and_the_next_is_answered(front):
    assert front.ask("a").ended() == [["x"]]
    held = [front.ask("hold") for _ in range(3)]
    held.append(front.ask("die"))
    assert [sender.ended() for sender in held] == [[ENDED]] * 4
    until(lambda: front.metrics.get("mxcompile_engine_restarts_total") == 1 and front.metrics["mxcompile_engine_ready"])
    assert front.ask("a").ended() == [["x"]]
    assert len(front.pids()) == 2


def test_while_the_engine_is_started_again_requests_are_refused(front):
    front.hold_starts()
    front.ask("die").ended()
    until(lambda: front.metrics["mxcompile_engine_ready"] == 0)
    assert front.ask("a").ended() == [STARTING]
    front.let_start()
    until(lambda: front.metrics["mxcompile_engine_ready"] == 1)
    assert front.ask("a").ended() == [["x"]]


def test_a_request_between_the_engines_end_and_its_discovery_is_told(front, monkeypatch):
    """The socket is closed already, and the thread that listens does not know yet."""
    monkeypatch.setattr(front.model, "_restart", lambda: time.sleep(LIMIT_S))
    psutil.Process(front.pids()[0]).kill()
    until(lambda: psutil.Process(front.pids()[0]).status() == psutil.STATUS_ZOMBIE)
    assert front.ask("a").ended() == [STARTING]


def test_a_stop_while_the_engine_is_started_again_leaves_no_process(front):
    front.hold_starts()
    front.ask("die").ended()
    until(lambda: len(front.pids()) == 2)
    front.model.finalize()
    assert not psutil.pid_exists(front.pids()[1])


def test_an_engine_that_dies_while_it_drains_is_not_waited_for(front, monkeypatch):
    monkeypatch.setattr(front.module, "DRAIN_LIMIT_S", float("inf"))
    (front.folder / "fragile").touch()
    front.model.finalize()
    assert len(front.pids()) == 1, "and not started again"


def test_what_cannot_be_read_or_sent_fails_alone(front, monkeypatch):
    """It is told so, and neither waits for ever nor stops the others."""
    failed = f"internal: {front.module.FAILED}"
    assert front.ask("odd").ended() == [failed]
    with monkeypatch.context() as broken:
        broken.setattr(front.module, "read", lambda request, engine: {}["missing"])
        assert front.ask("a").ended() == [failed]
    assert front.ask("a").ended() == [["x"]]
    assert front.model._live == {}
