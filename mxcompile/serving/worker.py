"""The engine process of a server: `python -m mxcompile.serving.worker FD` serves one front over an inherited socket.

Messages in, after a first one with the settings: {"do": "generate", "id", ...}, {"do": "cancel", "id"},
{"do": "drain"}. Messages out: "ready" or "no_start" first; then "token", "end" or "failed" per request id, "metrics" once
a second, "drained" last. The process ends when its front is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from engines.generation import GenerationError
from engines.interface import ImageSession
from mxcompile.errors import MxcompileError
from mxcompile.loading import LoadedEngine, load
from mxcompile.serving.cache import MemoryBudget, SessionStore, StateCache
from mxcompile.serving.guided import KIND, Compiling
from mxcompile.serving.image_reader import ImageReader
from mxcompile.serving.images import MOST_BYTES, NO_VISION
from mxcompile.serving.messages import read_request
from mxcompile.serving.relay import Relay
from mxcompile.serving.requests import Limits, RequestError
from mxcompile.serving.scheduler import Scheduler, Ticket
from mxcompile.serving.state_file import engine_digest
from mxcompile.serving.wire import Wire, WireError

logger = logging.getLogger("mxcompile.serving")
METRICS_EVERY_S = 1.0
_LOOK_FOR_FRONT_S = 0.5
_TEXT_BYTES_PER_TOKEN = 64  # more than a prompt that fits can have, so that a longer one is refused unread


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server sets. `cache_bytes` 0 keeps neither prefixes nor sessions. `state_dir_bytes`: what session files
    may take in `state_dir`.
    """

    engine: str
    threads: int | None = None
    checkpoint: str | None = None
    prefill_chunk: int | None = None
    cache_bytes: int = 1 << 30
    state_dir: str | None = None
    max_queue: int = 256
    max_wait_s: float = 60.0
    max_prompt_tokens: int | None = None
    prefill_budget: int | None = None
    max_queue_per_client: int | None = None
    state_dir_bytes: int | None = None


class Worker:
    """Joins a scheduler and a wire."""

    def __init__(self, engine: LoadedEngine, settings: Settings, wire: Wire) -> None:
        self._engine, self._wire = engine, wire
        self._chunk = settings.prefill_chunk or engine.config.limits.prefill_chunk
        self._sessions = self._budget = cache = None
        if settings.cache_bytes > 0:
            self._budget, digest = MemoryBudget(settings.cache_bytes), engine_digest(engine.config)
            folder = Path(settings.state_dir) if settings.state_dir else None
            self._sessions = SessionStore(self._budget, digest, folder, settings.state_dir_bytes)
            cache = StateCache(self._budget, self._chunk, digest)
        self._scheduler = Scheduler(
            engine.session,
            limits=Limits(
                settings.max_queue,
                settings.max_wait_s,
                settings.max_prompt_tokens,
                settings.prefill_budget,
                settings.max_queue_per_client,
            ),
            detokenizer=engine.tokenizer.detokenizer if engine.tokenizer is not None else None,
            cache=cache,
            sessions=self._sessions,
            images=self._image_reader(),
            prefill_chunk=self._chunk,
        )
        self._out: list[dict[str, Any]] = []  # of the scheduler's thread, sent after each step
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        self._leaving = threading.Lock()  # held while messages leave: those of one answer must keep their order
        self._draining = False
        self._compiling = Compiling(self._generate, self._refuse, self._cancel)
        self._check_alive = getattr(engine.session, "check_alive", None)

    def _image_reader(self) -> ImageReader | None:
        vision = self._engine.config.vision
        if vision is None:
            return None
        # Opens the vision graph: at the first image, running answers would wait for that.
        cast(ImageSession, self._engine.session).image_features(())
        return ImageReader(vision)

    def describe(self) -> dict[str, Any]:
        """The message that says what this engine takes."""
        return {
            "is": "ready",
            "max_seq_len": self._engine.max_seq_len,
            "max_batch_size": self._engine.max_batch_size,
            "vocab_size": self._engine.session.vocab_size,
            "tokenizer": self._engine.tokenizer is not None,
            "max_text_bytes": self._engine.max_seq_len * _TEXT_BYTES_PER_TOKEN,
            "max_image_bytes": MOST_BYTES,
            "no_images": NO_VISION if self._engine.config.vision is None else "",
        }

    def run(self) -> None:
        """Serve until the front is gone or has asked to drain. Raises what the engine raises."""
        threading.Thread(target=self._listen, daemon=True).start()
        reported = 0.0
        try:
            while not (self._draining and self._compiling.idle and self._scheduler.idle):
                self._scheduler.wait(METRICS_EVERY_S / 2)
                if self._scheduler.idle and self._check_alive is not None:
                    self._check_alive()  # before a client finds out
                self._scheduler.step()
                if time.monotonic() - reported > METRICS_EVERY_S:
                    self._count_states()
                    self._out.append({"is": "metrics"} | self._scheduler.metrics.snapshot())
                    reported = time.monotonic()
                self._flush()
        except ConnectionError:
            pass  # the front is gone
        except BaseException:
            self._scheduler.fail_all("the engine failed; try again when it has been started anew")
            with contextlib.suppress(ConnectionError):
                self._flush()
            if self._sessions is not None:
                self._sessions.flush()  # a session at rest is not the lost engine's
            raise
        if self._sessions is not None:
            self._sessions.flush()
        self._out.append({"is": "drained"})
        with contextlib.suppress(ConnectionError):
            self._flush()

    def _count_states(self) -> None:
        metrics = self._scheduler.metrics
        if self._budget is not None:
            metrics.gauges["cache_bytes"] = self._budget.used
            metrics.counts["cache_evictions_total"] = self._budget.evicted
        if self._sessions is not None and (files := self._sessions.files) is not None:
            metrics.gauges["state_dir_bytes"] = files.nbytes
            for what, count in files.counts.items():
                metrics.counts[f"state_files_{what}_total"] = count

    def _flush(self) -> None:
        with self._leaving:
            with self._lock:
                out, self._out = self._out, []
            if not out:
                return
            try:
                self._wire.send(out)
            except WireError:  # too long together: details of very many tokens
                for message in out:
                    self._send_alone(message)

    def _send_alone(self, message: dict[str, Any]) -> None:
        try:
            self._wire.send([message])
        except WireError:
            text = "the answer with all its details is too long to send; ask for fewer alternatives, or stream it"
            self._wire.send([{"is": "failed", "id": message["id"], "kind": "invalid", "message": text}])

    def _listen(self) -> None:
        try:
            while (messages := self._wire.receive()) is not None:
                for message in messages:
                    match message["do"]:
                        case "generate" if KIND in message:
                            self._compiling.put(message)
                        case "generate":
                            self._generate(message)
                        case "cancel":
                            self._cancel(message["id"])
                        case "drain":
                            self._draining = True
                            self._scheduler.drain()
        except ConnectionError:
            pass  # a refusal that nobody reads any more
        finally:  # a process that hears nothing must not go on
            self._draining = True
            self._scheduler.drain()
            for ticket in list(self._tickets.values()):
                self._scheduler.cancel(ticket)

    def _cancel(self, number: int) -> None:
        if not self._compiling.drop(number) and (ticket := self._tickets.get(number)) is not None:
            self._scheduler.cancel(ticket)

    def _refuse(self, message: dict[str, Any], kind: str, reason: str) -> None:
        Relay(message["id"], self._emit, **_named(message)).refuse(kind, reason)

    def _generate(self, message: dict[str, Any]) -> None:
        named = _named(message)
        relay = Relay(message["id"], self._emit, **named)
        try:
            relay, request = read_request(message, self._engine, self._emit, named)
            # A request may end before its ticket is noted: only `emit`, which drops the note, needs the same lock.
            with self._lock:
                self._tickets[message["id"]] = self._scheduler.submit(request)
        except (RequestError, GenerationError, MxcompileError) as error:
            kind = error.kind if isinstance(error, RequestError) else "invalid"
            relay.refuse(kind, str(error).replace("max_new_tokens", "max_tokens").replace("stop_strings", "stop_words"))
        except Exception as error:  # of this request: others are not to suffer
            logger.exception(json.dumps({"event": "request_failed", "id": message["id"], "message": repr(error)}))
            relay.refuse("internal", "the engine process failed on this request; its log says why")

    def _emit(self, messages: list[dict[str, Any]]) -> None:
        with self._lock:
            self._out += messages
            for message in messages:
                if message["is"] == "failed" or message.get("final"):
                    self._tickets.pop(message["id"], None)
        if threading.current_thread() is not threading.main_thread():
            self._flush()  # a refusal: the scheduler may be asleep


def _named(message: dict[str, Any]) -> dict[str, Any]:
    return {"request_id": message.get("request_id", ""), "client": message.get("client_id", "")}


@contextlib.contextmanager
def _ends_with_front(connection: socket.socket) -> Iterator[None]:
    """While the block runs, in which nobody reads the connection, end this process as soon as the other end is closed: a large
    engine takes minutes to load, and memory that the next server needs.
    """
    poller, done = select.poll(), threading.Event()
    poller.register(connection, select.POLLRDHUP)

    def watch() -> None:
        while not done.wait(_LOOK_FOR_FRONT_S):
            if poller.poll(0):
                os._exit(0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main() -> int:
    """Serve the front at the other end of the socket whose descriptor is the first argument."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    connection = socket.socket(fileno=int(sys.argv[1]))
    wire = Wire(connection)
    first = wire.receive()
    if not first:
        return 0
    try:
        with _ends_with_front(connection):
            settings = Settings(**first[0])
            engine = load(settings.engine, threads=settings.threads, checkpoint=settings.checkpoint)
            engine.guides.prepare()  # at the first guide, running answers would wait for that
            worker = Worker(engine, settings, wire)
    except Exception as error:  # whatever it is, the front must hear of it
        with contextlib.suppress(ConnectionError):
            wire.send([{"is": "no_start", "message": str(error) if hasattr(error, "exit_code") else repr(error)}])
        return 3
    try:
        wire.send([worker.describe()])
    except ConnectionError:
        return 0  # the front is gone
    try:
        worker.run()
    except Exception as error:
        logger.error(json.dumps({"event": "engine_failed", "message": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
