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
from typing import Any

from engines.generation import GenerationConfig, GenerationError
from mxcompile.errors import MxcompileError
from mxcompile.loading import LoadedEngine, load
from mxcompile.serving.cache import MemoryBudget, SessionStore, StateCache
from mxcompile.serving.relay import Relay
from mxcompile.serving.requests import MOST_ANSWERS, Limits, Request, RequestError
from mxcompile.serving.scheduler import Scheduler, Ticket
from mxcompile.serving.state_file import engine_digest
from mxcompile.serving.wire import Wire, WireError

logger = logging.getLogger("mxcompile.serving")
METRICS_EVERY_S = 1.0
_LOOK_FOR_FRONT_S = 0.5
MOST_LOGPROBS = 20  # alternatives to a token, as in OpenAI's API
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
            prefill_chunk=self._chunk,
        )
        self._out: list[dict[str, Any]] = []  # of the scheduler's thread, sent after each step
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        self._leaving = threading.Lock()  # held while messages leave: those of one answer must keep their order
        self._draining = False
        self._check_alive = getattr(engine.session, "check_alive", None)

    def describe(self) -> dict[str, Any]:
        """The message that says what this engine takes."""
        return {
            "is": "ready",
            "max_seq_len": self._engine.max_seq_len,
            "max_batch_size": self._engine.max_batch_size,
            "vocab_size": self._engine.session.vocab_size,
            "tokenizer": self._engine.tokenizer is not None,
            "max_text_bytes": self._engine.max_seq_len * _TEXT_BYTES_PER_TOKEN,
        }

    def run(self) -> None:
        """Serve until the front is gone or has asked to drain. Raises what the engine raises."""
        threading.Thread(target=self._listen, daemon=True).start()
        reported = 0.0
        try:
            while not (self._draining and self._scheduler.idle):
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
                        case "generate":
                            self._generate(message)
                        case "cancel" if (ticket := self._tickets.get(message["id"])) is not None:
                            self._scheduler.cancel(ticket)
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

    def _generate(self, message: dict[str, Any]) -> None:
        named = {"request_id": message.get("request_id", ""), "client": message.get("client_id", "")}
        relay = Relay(message["id"], self._emit, **named)
        try:
            relay, request = self._request(message, named)
            # A request may end before its ticket is noted: only `emit`, which drops the note, needs the same lock.
            with self._lock:
                self._tickets[message["id"]] = self._scheduler.submit(request)
        except (RequestError, GenerationError, MxcompileError) as error:
            kind = error.kind if isinstance(error, RequestError) else "invalid"
            relay.refuse(kind, str(error).replace("max_new_tokens", "max_tokens").replace("stop_strings", "stop_words"))
        except Exception as error:  # of this request: others are not to suffer
            logger.exception(json.dumps({"event": "request_failed", "id": message["id"], "message": repr(error)}))
            relay.refuse("internal", "the engine process failed on this request; its log says why")

    def _request(self, message: dict[str, Any], named: dict[str, str]) -> tuple[Relay, Request]:
        text, ids = message.get("text_input"), message.get("input_ids")
        given = [value for value in (text, ids) if value is not None]
        if len(given) != 1:
            raise RequestError("give either text_input or input_ids")
        answers = message.get("n", 1)
        if not 1 <= answers <= MOST_ANSWERS:
            raise RequestError(f"n must be between 1 and {MOST_ANSWERS}, not {answers}")
        top = message.get("top_log_probs")
        if top is not None and not 0 <= top <= MOST_LOGPROBS:
            raise RequestError(f"top_log_probs must be between 0 and {MOST_LOGPROBS}, not {top}")
        stops = [] if message.get("end_id") == -1 else [message["end_id"]] if "end_id" in message else None
        config = GenerationConfig(
            max_new_tokens=message.get("max_tokens", 128),
            temperature=message.get("temperature", 0.0),
            top_k=message.get("top_k", 0),
            top_p=message.get("top_p", 1.0),
            repetition_penalty=message.get("repetition_penalty", 1.0),
            presence_penalty=message.get("presence_penalty", 0.0),
            frequency_penalty=message.get("frequency_penalty", 0.0),
            seed=message.get("seed", 0),
            stop_token_ids=self._engine.eos_token_ids if stops is None else tuple(stops),
            stop_strings=tuple(message.get("stop_words", ())),
            logprobs=top if top is not None else 0 if message.get("return_log_probs") else None,
        )
        scores = bool(message.get("prompt_log_probs"))
        if scores and top is None:
            raise RequestError("prompt_log_probs needs top_log_probs, the number of likeliest tokens to tell")
        tokenizer = self._engine.tokenizer
        prompt = self._engine.tokens(given[0])
        prefix = ""
        if message.get("echo"):
            if tokenizer is None:
                raise RequestError("echo needs a tokenizer, which this engine was built without")
            prefix = text if text is not None else tokenizer.decode(prompt)
        relay = Relay(
            message["id"],
            self._emit,
            stream=bool(message.get("stream")),
            answers=answers,
            details=False if top is None else tokenizer or True,
            prefix=prefix,
            **named,
        )
        request = Request(
            prompt,
            config,
            relay.of(0),
            session=message.get("session_id"),
            session_start=bool(message.get("session_start")),
            client=named["client"],
            prompt_logprobs=top if scores else None,
            # Each further answer has the next seed, so that it can be had alone.
            others=tuple(
                (dataclasses.replace(config, seed=(config.seed + index) % 2**64), relay.of(index))
                for index in range(1, answers)
            ),
        )
        return relay, request

    def _emit(self, messages: list[dict[str, Any]]) -> None:
        with self._lock:
            self._out += messages
            for message in messages:
                if message["is"] == "failed" or message.get("final"):
                    self._tickets.pop(message["id"], None)
        if threading.current_thread() is not threading.main_thread():
            self._flush()  # a refusal: the scheduler may be asleep


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
