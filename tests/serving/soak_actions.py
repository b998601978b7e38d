"""What a client of the soak may do, and whether the server took it as it must."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from served import Served
from soak_clients import (
    DEADLINE_S,
    GrpcClients,
    Reply,
    break_off,
    openai,
    openai_body,
    path_of,
    raw,
    triton_http,
)
from soak_questions import Body, Question, Questions

BUSY = re.compile(r"^(unavailable: )?\d+ requests are waiting already; try again later$")
DOWN = re.compile(
    r"^(unavailable: )?(the engine process ended; it is being started again, try again in a moment"
    r"|the engine is being started again; try again in a moment"
    r"|the engine failed; try again when it has been started anew)$"
)
ANSWERING = re.compile(r"session '[^']*' is still answering another request$")
UNKNOWN = re.compile(r"session '[^']*' is not known")
LONG = {"max_tokens": 250, "end_id": -1}
LOG_PROBS = 1e-3  # absolute; logits were seen to move by 2e-5 beside others
BURST = 60  # requests at once: more than slots and queue hold
MAX_QUEUE = 40
LEAST_ACTIONS = 6  # of each client: on a slow machine, a short soak is longer

# data, what the error must say; for both generate endpoints
MALFORMED: list[tuple[bytes | Body, str]] = [
    (b"", "."),
    (b"{", "JSON"),
    (b"[]", "."),
    (b"\xff\xfe{}", "."),
    (b'{"text_input": ["a", "b"]}', "."),
    (b'{"text_input": {"a": 1}}', "."),
    (b'{"text_input": "a", "max_tokens": "x"}', "."),
    (b'{"input_ids": [1.5]}', "."),
    ({}, "either text_input or input_ids"),
    ({"max_tokens": 3}, "either text_input or input_ids"),
    ({"text_input": "a", "input_ids": [1]}, "either text_input or input_ids"),
    ({"text_input": ""}, "empty"),
    ({"input_ids": [512]}, "vocabulary is 0 to 511"),
    ({"input_ids": [-1]}, "vocabulary is 0 to 511"),
    ({"input_ids": [1] * 321}, "321 tokens, but the engine holds at most 320"),
    ({"input_ids": [1] * 100_000}, "too long"),
    ({"text_input": "x" * 100_000}, "too long"),
    ({"text_input": "a", "max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
    ({"text_input": "a", "temperature": -1}, "temperature"),
    ({"text_input": "a", "top_p": 2}, "top_p"),
    ({"text_input": "a", "stop_words": [""]}, "stop string"),
    ({"text_input": "a", "temprature": 1}, "unknown field 'temprature'"),
    ({"text_input": "a", "session_id": "never started"}, "is not known"),
]
INFER = {"inputs": [{"name": "max_tokens", "datatype": "FP64", "shape": [1], "data": [1.5]}]}
GRPC_MALFORMED: list[tuple[Body, dict[str, str], str]] = [
    ({"text_input": "a", "max_tokens": 3}, {"max_tokens": "FP32"}, "FP32"),
    ({"text_input": "a", "maximum": 3}, {}, "maximum"),
    ({"max_tokens": 3}, {}, "either text_input or input_ids"),
    ({"text_input": "a", "max_tokens": [3, 4]}, {}, "max_tokens"),
    ({"input_ids": [1] * 400}, {}, "400 tokens, but the engine holds at most 320"),
    ({"input_ids": [7000]}, {}, "vocabulary is 0 to 511"),
]
OPENAI_MALFORMED: list[tuple[bytes | Body, int, str]] = [
    (b"{", 400, "."),
    ({"prompt": "a"}, 400, "model"),
    ({"model": "other", "prompt": "a"}, 404, "no model 'other'"),
    ({"model": "mxcompile", "prompt": "a", "temperature": -1}, 400, "temperature"),
    ({"model": "mxcompile", "prompt": [1] * 400}, 400, "400 tokens, but the engine holds at most 320"),
    ({"model": "mxcompile", "prompt": [1] * 400, "stream": True}, 400, "400 tokens, but the engine holds at most 320"),
    ({"model": "mxcompile", "prompt": "a", "wibble": 1}, 400, "wibble"),
]


@dataclass
class Tally:
    """What happened. `wrong` holds one line for everything that must not happen."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def fault(self, what: str) -> None:
        with self.lock:
            self.wrong.append(f"{time.strftime('%H:%M:%S')} {what[:600]}")

    def took(self, action: str, seconds: float) -> None:
        with self.lock:
            self.slowest_s = max(self.slowest_s, seconds)
        if seconds > DEADLINE_S:
            self.fault(f"{action} took {seconds:.0f} s")


class Clients:
    """Clients of one server. `may_fail`: ranks are being killed, so a request may end in `DOWN`."""

    def __init__(
        self, server: Served, grpc: GrpcClients, questions: Questions, tally: Tally, *, may_fail: bool = False
    ) -> None:
        self._server, self._grpc, self._questions = server, grpc, questions
        self._tally, self._may_fail = tally, may_fail
        self._actions: list[tuple[int, Callable[[random.Random, str], None]]] = [
            (300, self.finish),
            (40, self.converse),
            (60, self.leave),
            (40, self.malformed),
            (2, self.burst),
        ]

    def run(self, seed: int, end: float) -> None:
        """One client's life until the time `end` (monotonic), and for some actions at least."""
        source, done = random.Random(seed), 0
        weights, actions = zip(*self._actions, strict=True)
        while time.monotonic() < end or done < LEAST_ACTIONS:
            done += 1
            action = source.choices(actions, weights)[0]
            start = time.monotonic()
            try:
                action(source, f"client {seed}")
            except Exception as error:  # the soak goes on, and fails at its end
                self._tally.fault(f"{action.__name__}: {type(error).__name__}: {error}")
            self._tally.took(action.__name__, time.monotonic() - start)

    def finish(self, source: random.Random, name: str) -> None:
        """A request that stays to its end, over any protocol."""
        question = source.choice(self._questions.single)
        reply, how = self._ask(question, source)
        self._check(reply, question, how, "answer")

    def converse(self, source: random.Random, name: str) -> None:
        """A session of some turns; before a turn, a client may break off the same turn, or ask for too much."""
        turns = source.choice(self._questions.conversations)
        session = {"session_id": name, "session_start": True}
        said = 0
        for turn in turns:
            asked = Question(turn.body | session, turn.answer)
            if said and source.randrange(4) == 0:
                refused = triton_http(self._server, turn.body | session | {"input_ids": [1] * 320}, stream=False)
                if refused.error is None:
                    self._tally.fault(f"a turn beyond the engine's length was answered: {refused}")
            end = time.monotonic() + DEADLINE_S
            while True:
                reply, how = self._ask(asked, source)
                if reply.error is None or not ANSWERING.search(reply.error) or time.monotonic() > end:
                    break
                time.sleep(0.02)
            if self._may_fail and said and reply.error is not None and UNKNOWN.search(reply.error):
                self._tally.count("sessions lost with the engine")
                return
            if not self._check(reply, asked, how, "turn", whole_prompt=False):
                return
            if said and reply.cached_tokens not in (-1, said - 1):
                self._tally.fault(f"{how}: a session of {said} tokens remembered {reply.cached_tokens}")
            said += len(turn.body["input_ids"]) + len(turn.answer.tokens) + isinstance(turn.answer.stop_reason, int)
            session["session_start"] = False
        if source.randrange(2):  # leaves in the middle of a turn: the next conversation starts this session anew
            body = {"input_ids": [5]} | LONG | session | {"stream": True}
            break_off(self._server.http, path_of("generate_stream"), json.dumps(body).encode(), after=1, reset=True)

    def leave(self, source: random.Random, name: str) -> None:
        """Break off: closed or reset connections, within the request, before the first token, among the tokens."""
        long = {"input_ids": [source.randrange(3, 500) for _ in range(source.choice([1, 40, 200]))]} | LONG
        long["max_tokens"] = 320 - len(long["input_ids"])
        several = {"n": 4} if source.randrange(4) == 0 else {}
        reset, after = bool(source.randrange(2)), source.choice([-1, 0, 1, 200, 2000])
        match source.randrange(4):
            case 0:
                reply = self._grpc.ask(long | several | {"stream": True}, leave_after=source.choice([1, 2, 20]))
                if reply.error is not None:
                    self._refusal(reply, "gRPC, leaving")
                    return
            case 1:
                data = json.dumps(openai_body(long, stream=bool(source.randrange(3))) | several).encode()
                break_off(self._server.openai, "/v1/completions", data, after=after, reset=reset)
            case _:
                stream = bool(source.randrange(3))
                kind = "generate_stream" if stream else "generate"
                data = json.dumps(long | {"stream": stream}).encode()
                break_off(self._server.http, path_of(kind), data, after=after if stream else min(after, 0), reset=reset)
        self._tally.count("left")

    def malformed(self, source: random.Random, name: str) -> None:
        """A request that nothing can answer, and the reason that must come back."""
        server = self._server
        match source.randrange(6):
            case 0:
                body, types, expected = source.choice(GRPC_MALFORMED)
                reply = self._grpc.ask(body, types=types)
            case 1 | 2:
                data, status, expected = source.choice(OPENAI_MALFORMED)
                reply = raw(
                    server.openai, "/v1/completions", data if isinstance(data, bytes) else json.dumps(data).encode()
                )
                if reply.status != status and not (self._may_fail and reply.status == 503):
                    self._tally.fault(f"status {reply.status} instead of {status} for {data!r:.200}: {reply.error}")
            case 3:
                reply = raw(server.http, path_of("infer"), json.dumps(INFER).encode())
                expected = "."
            case _:
                given, expected = source.choice(MALFORMED)
                data = given if isinstance(given, bytes) else json.dumps(given).encode()
                reply = raw(server.http, path_of(source.choice(["generate", "generate_stream"])), data)
        error = reply.error or ""
        if self._may_fail and DOWN.match(_message(error)):
            self._tally.count("refused: engine down")
        elif not error or not re.search(expected, error) or "Traceback" in error or 'File "' in error:
            self._tally.fault(f"not refused clearly, should say {expected!r}: {reply}")
        else:
            self._tally.count("malformed, refused")

    def burst(self, source: random.Random, name: str) -> None:
        """More at once than there is room for: each is answered right, or told to come again."""
        question = source.choice([q for q in self._questions.single if "stop_words" not in q.body])
        data = json.dumps(question.body | {"stream": False}).encode()
        head = f"POST {path_of('generate')} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        connections = [
            socket.create_connection(("127.0.0.1", self._server.http), timeout=DEADLINE_S) for _ in range(BURST)
        ]
        try:
            for connection in connections:
                connection.sendall(head.encode() + data)
            for connection in connections:
                response = http.client.HTTPResponse(connection)
                response.begin()  # raises when the connection was closed without an answer
                values = json.loads(response.read())
                if "error" in values:
                    self._refusal(Reply(400, values["error"]), "burst")
                elif values["text_output"] != question.answer.text:
                    self._tally.fault(
                        f"burst: {values['text_output']!r} is not {question.answer.text!r} of {question.body}"
                    )
                else:
                    self._tally.count("right: burst")
        finally:
            for connection in connections:
                connection.close()

    def _ask(self, question: Question, source: random.Random) -> tuple[Reply, str]:
        """Ask over any protocol; the reply, and how it was asked."""
        body, stream = question.body, bool(source.randrange(3))
        match source.randrange(4):
            case 0:
                return self._grpc.ask(body | {"stream": stream}), f"gRPC stream={stream}"
            case 1:
                chat = question.messages is not None and bool(source.randrange(2))
                asked = openai_body(body, stream, question.messages if chat else None)
                return openai(self._server, asked, chat=chat), f"OpenAI chat={chat} stream={stream}"
            case _:
                logs = {"return_log_probs": True} if source.randrange(4) == 0 else {}
                return triton_http(self._server, body | logs, stream=stream), f"HTTP stream={stream}"

    def _check(self, reply: Reply, question: Question, how: str, what: str, *, whole_prompt: bool = True) -> bool:
        """Whether it is an answer; that it is the engine's own, to the last token, is noted."""
        if reply.error is not None:
            self._refusal(reply, how)
            return False
        right = question.answer
        found: list[object] = [reply.text, reply.finish, reply.output_tokens]
        expected: list[object] = [right.text, right.finish_reason, len(right.tokens)]
        if whole_prompt:
            found.append(reply.prompt_tokens)
            expected.append(right.prompt_tokens)
        if reply.tokens is not None:
            found.append(reply.tokens)
            expected.append(right.tokens)
        if reply.log_probs:
            expected_logs = [entry.chosen for entry in right.logprobs]
            close = len(reply.log_probs) == len(expected_logs) and all(
                abs(a - b) <= LOG_PROBS for a, b in zip(reply.log_probs, expected_logs, strict=True)
            )
            found.append(close)
            expected.append(True)
        if found != expected:
            self._tally.fault(f"{how}: {found} instead of {expected} for {question.body}")
        else:
            self._tally.count(f"right: {what} over {how.split()[0]}")
        return True

    def _refusal(self, reply: Reply, how: str) -> None:
        error = reply.error or ""
        if BUSY.match(error):
            self._tally.count("refused: queue full")
        elif self._may_fail and DOWN.match(error):
            self._tally.count("refused: engine down")
        else:
            self._tally.fault(f"{how}: refused with {reply.status} {error!r}")


def _message(error: str) -> str:
    """What an error's body says, in either API's form; the text itself where it is no such body."""
    try:
        said = json.loads(error.removeprefix("data:"))["error"]
    except (ValueError, KeyError, TypeError):
        return error
    return str(said["message"] if isinstance(said, dict) else said)
