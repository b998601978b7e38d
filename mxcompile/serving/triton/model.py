"""Triton's side of an mxcompile engine: turns requests into messages for the engine process, and its answers back.

Runs in the server's own Python, which needs numpy below 2 and nothing else; the engine runs in a process of its own,
with the Python that the parameter `python` names. When that process dies, every live request is answered UNAVAILABLE and
it is started again.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from request_tensors import Refused, read
from wire import Wire

# Names in pb_utils.TritonError, which exists only once the model is initialized.
CODES = {
    "invalid": "INVALID_ARG",
    "limited": "UNAVAILABLE",
    "unavailable": "UNAVAILABLE",
    "cancelled": "CANCELLED",
    "internal": "INTERNAL",
}
POLL_CANCELLED_S = 0.05
POLL_EACH_S = 0.002  # asking takes a thirtieth of this, in which no token leaves
START_LIMIT_S = 600.0
DRAIN_LIMIT_S = 60.0
LOOK_S = 0.1
LONGEST_PAUSE_S = 30.0
# Of the environment, what is not for the engine process.
SERVERS_OWN = ("PYTHONHOME", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
FAILED = "the server failed on this request; its log says why"
READY, RESTARTS = ("engine_ready", ()), ("engine_restarts_total", ())


class TritonPythonModel:
    """See https://github.com/triton-inference-server/python_backend for when each method is called."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = os.path.join(args["model_repository"], args["model_version"])
        self._python = os.environ.get("MXCOMPILE_PYTHON") or given.pop("python")
        given.pop("python", None)
        self._settings = {name: json.loads(value) for name, value in given.items()}
        self._settings["engine"] = os.path.join(folder, self._settings["engine"])
        self._lock = threading.Lock()
        self._live = {}  # id -> response sender
        self._number = 0
        self._closing = False
        self._wire: Wire | None = None
        self._drained = threading.Event()
        self._metrics = Metrics(args["model_name"])
        self._process = None  # the engine process, also while it starts
        self._wire, self._engine = self._start()
        self._metrics.ready(True)
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            number = None
            try:
                message = read(request, self._engine)
                with self._lock:
                    wire = self._wire
                    if wire is None:
                        raise ConnectionError
                    self._number += 1
                    number = self._number
                    self._live[number] = sender
                wire.send([{"do": "generate", "id": number, **message}])
            except Refused as error:
                fail(sender, "invalid", str(error))
            except OSError:
                self._give_up(number, sender, "unavailable", "the engine is being started again; try again in a moment")
            except Exception as error:  # a request that is not answered would wait for ever
                pb_utils.Logger.log_error(f"request {number}: {error!r}")
                self._give_up(number, sender, "internal", FAILED)
        return None

    def _give_up(self, number, sender, kind, message):
        """Fail a request, unless whoever found the engine gone has done so."""
        with self._lock:
            still = number is None or self._live.pop(number, None) is not None
        if still:
            fail(sender, kind, message)

    def finalize(self):
        self._closing = True
        wire = self._wire
        try:
            if wire is not None:
                wire.send([{"do": "drain"}])
                end = time.monotonic() + DRAIN_LIMIT_S
                # Unless it ends instead: then nobody will say that it has.
                while self._wire is wire and time.monotonic() < end and not self._drained.wait(LOOK_S):
                    pass
        except OSError:
            pass  # it is gone already
        stop(self._process)

    def _start(self):
        """Start the engine process; returns its wire, and what it says of itself."""
        ours, theirs = socket.socketpair()
        process = self._process = subprocess.Popen(
            [self._python, "-m", "mxcompile.serving.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name not in SERVERS_OWN},
        )
        theirs.close()
        wire = Wire(ours)
        limit = threading.Timer(START_LIMIT_S, process.kill)
        limit.start()
        try:
            wire.send([self._settings])
            first = wire.receive()
        except OSError:
            first = None
        finally:
            limit.cancel()
        if not first or first[0]["is"] != "ready":
            stop(process)
            why = (
                first[0]["message"] if first else f"it ended with {process.returncode} (is mxcompile installed there?)"
            )
            raise pb_utils.TritonModelException(f"the engine process ({self._python}) did not start: {why}")
        return wire, first[0]

    def _listen(self):
        """Answer with what the engine says; start it again when it is gone."""
        while True:
            assert self._wire is not None  # only this thread takes it away, and puts a new one
            messages = self._wire.receive()
            if messages is None:
                if not self._closing:
                    self._restart()
                if self._closing:
                    self._drained.set()
                    return
                continue
            for message in messages:
                if message["is"] == "metrics":
                    self._metrics.update(message)
                elif message["is"] == "drained":
                    self._drained.set()
                    return
                else:
                    try:
                        self._answer(message)
                    except Exception as error:  # of this request: others are not to suffer
                        pb_utils.Logger.log_error(f"request {message['id']}: {error!r}")
                        with self._lock:
                            sender = self._live.get(message["id"])
                        if sender is not None:
                            self._give_up(message["id"], sender, "internal", FAILED)
                            self._cancel(message["id"])

    def _restart(self):
        with self._lock:
            self._wire = None
            lost, self._live = self._live, {}
        self._metrics.ready(False)
        for sender in lost.values():
            fail(sender, "unavailable", "the engine process ended; it is being started again, try again in a moment")
        stop(self._process)
        pause = 0.5
        while not self._closing:
            try:
                wire, engine = self._start()
            except Exception as error:
                pb_utils.Logger.log_error(f"{error}; next attempt in {pause:g} s")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                with self._lock:
                    self._wire, self._engine = wire, engine
                self._metrics.restarted()
                self._metrics.ready(True)
                return

    def _answer(self, message):
        number, ended = message["id"], message["is"] == "end"
        final = ended and message["final"]  # of several answers only the last one to end is
        if message["is"] == "failed":
            with self._lock:
                sender = self._live.pop(number, None)
            if sender is not None:
                fail(sender, message["kind"], message["message"])
            return
        tensors = [
            pb_utils.Tensor("text_output", np.array([message["text"].encode()], np.object_)),
            pb_utils.Tensor("output_ids", np.array(message["ids"], np.int32)),
        ]
        if message["log_probs"]:
            tensors.append(pb_utils.Tensor("output_log_probs", np.array(message["log_probs"], np.float32)))
        if message.get("details"):
            details = [detail.encode() for detail in message["details"]]
            tensors.append(pb_utils.Tensor("token_details", np.array(details, np.object_)))
        if "choice" in message:
            tensors.append(pb_utils.Tensor("choice_index", np.array([message["choice"]], np.int32)))
        if ended:
            tensors.append(pb_utils.Tensor("finish_reason", np.array([message["finish_reason"].encode()], np.object_)))
            for name, key in (
                ("num_input_tokens", "prompt_tokens"),
                ("num_output_tokens", "output_tokens"),
                ("num_cached_tokens", "cached_tokens"),
            ):
                tensors.append(pb_utils.Tensor(name, np.array([message[key]], np.int32)))
        response = pb_utils.InferenceResponse(output_tensors=tensors)
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        with self._lock:
            sender = self._live.pop(number, None) if final else self._live.get(number)
            if sender is None:
                return
            try:
                sender.send(response, flags=flags)
                return
            except Exception as error:  # the client's end only: others are not to suffer
                pb_utils.Logger.log_warn(f"request {number}: {error}")
        self._cancel(number)

    def _watch(self):
        """Cancel what clients have left: only polling tells."""
        live: list = []
        while not self._closing:
            time.sleep(max(POLL_CANCELLED_S, POLL_EACH_S * len(live)))
            with self._lock:
                live = list(self._live)
            for number in live:
                # Under the lock: the server crashes when it is asked about a sender whose last response was sent.
                with self._lock:
                    left = number in self._live and self._live[number].is_cancelled()
                if left:
                    self._cancel(number)

    def _cancel(self, number):
        wire = self._wire
        try:
            if wire is not None:
                wire.send([{"do": "cancel", "id": number}])
        except OSError:
            pass  # it ends with the process


class Metrics:
    """The engine process's numbers among Triton's own."""

    def __init__(self, model):
        self._model = model
        self._values = {}  # (name, labels) -> (metric, value)
        self._families = {}  # must stay referenced
        self._past = {}  # counters of engine processes that ended

    def update(self, message):
        for kind in ("counter", "gauge"):
            for name, labels, value in message[kind]:
                key = (name, tuple(sorted(labels.items())))
                metric, before = self._metric(kind, name, labels, key)
                if kind == "gauge":
                    metric.set(value)
                elif value + self._past.get(key, 0) > before:
                    metric.increment(value + self._past.get(key, 0) - before)
                    self._values[key] = (metric, value + self._past.get(key, 0))

    def restarted(self):
        """Counters of the new engine process start at 0."""
        self._past = {key: value for key, (_, value) in self._values.items()}
        metric, before = self._metric("counter", "engine_restarts_total", {}, RESTARTS)
        metric.increment(1)
        self._values[RESTARTS] = (metric, before + 1)

    def ready(self, is_ready):
        """Triton cannot be told that a model does not answer for a while: this gauge tells it."""
        self._metric("gauge", "engine_ready", {}, READY)[0].set(int(is_ready))
        if not is_ready:
            for name in ("active_requests", "waiting_requests"):  # they ended with the process
                self._metric("gauge", name, {}, (name, ()))[0].set(0)

    def _metric(self, kind, name, labels, key):
        if key not in self._values:
            if name not in self._families:
                self._families[name] = pb_utils.MetricFamily(
                    name=f"mxcompile_{name}",
                    description=name.replace("_", " "),
                    kind=getattr(pb_utils.MetricFamily, kind.upper()),
                )
            metric = self._families[name].Metric(labels={"model": self._model, **labels})
            self._values[key] = (metric, 0)
        return self._values[key]


def fail(sender, kind, message):
    """End a request with an error.

    The generate endpoints answer every error with status 400, and gRPC streams carry text only: so the text tells.
    """
    message = message if kind == "invalid" else f"{kind}: {message}"
    error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, CODES[kind]))
    try:
        sender.send(
            pb_utils.InferenceResponse(output_tensors=[], error=error),
            flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
        )
    except Exception as problem:
        pb_utils.Logger.log_warn(f"an error could not be sent: {problem}")


def stop(process):
    """End the engine process, whatever it does."""
    if process is None:  # there was none yet
        return
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
