"""Clients of the soak: one request each, to its end or until the client breaks off; answers of all protocols in one form."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import queue
import socket
import struct
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from served import PATH, Served, listed
from soak_questions import Body

DEADLINE_S = 300.0  # of one request: a hang, on however slow a machine
MAX_WAIT_S = 240  # for a slot, after which the server gives a request up
GRPC_CLIENT = Path(__file__).with_name("grpc_client.py")


@dataclass
class Reply:
    """`error`: what the server said instead of an answer. `tokens` is None where the protocol has only text."""

    status: int = 200
    error: str | None = None
    text: str = ""
    tokens: list[int] | None = None
    log_probs: list[float] = field(default_factory=list)
    finish: str | None = None
    prompt_tokens: int = -1
    output_tokens: int = -1
    cached_tokens: int = -1


class Broken(Exception):
    """The server closed a connection without an answer or a reason."""


def triton_http(server: Served, body: Body | bytes, *, stream: bool) -> Reply:
    """Triton's generate endpoints."""
    connection, response = server.open("generate_stream" if stream else "generate", _streamed(body, stream))
    with contextlib.closing(connection):
        text = response.read().decode()
    if not stream or response.status != 200:
        return _of_events(response.status, [json.loads(text.strip().removeprefix("data:"))])
    return _of_events(200, [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")])


def raw(port: int, path: str, data: bytes) -> Reply:
    """Any bytes as a request's body; the error is its whole answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request("POST", path, data, {"Connection": "close", "Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    return Reply(response.status, text if response.status >= 400 or '"error"' in text else None, text)


def openai(server: Served, asked: Body, *, chat: bool) -> Reply:
    """The OpenAI-compatible API; `asked` is its body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.openai, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        path = "/v1/chat/completions" if chat else "/v1/completions"
        connection.request("POST", path, json.dumps(asked), {"Connection": "close", "Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    if response.status != 200:
        return Reply(response.status, json.loads(text)["error"]["message"])
    if not asked.get("stream"):
        values = json.loads(text)
        choice, usage = values["choices"][0], values["usage"]
        said = choice["message"]["content"] if chat else choice["text"]
        return _with_usage(Reply(text=said, finish=choice["finish_reason"]), usage)
    reply = Reply()
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    for line in lines:
        if line == "[DONE]":
            return reply
        values = json.loads(line)
        if "error" in values:
            return Reply(500, values["error"]["message"])
        if values.get("usage"):
            _with_usage(reply, values["usage"])
        for choice in values["choices"]:
            reply.text += (choice["delta"].get("content") or "") if chat else choice["text"]
            reply.finish = choice["finish_reason"] or reply.finish
    raise Broken(f"a stream ended without [DONE] after {lines[-1:]}")


def break_off(port: int, path: str, data: bytes, *, after: int, reset: bool) -> None:
    """Send a request and leave: `after` -1 within the request, 0 before the answer, else after that many bytes of it.

    `reset` kills the connection, as a client that crashes does; else it is closed.
    """
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.sendall(head.encode() + (data[: len(data) // 2] if after < 0 else data))
        if after > 0:
            connection.recv(after)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class GrpcClients:
    """A process of gRPC clients; requests from any thread. `kill` ends it in the middle of whatever runs."""

    def __init__(self, python: Path, port: int) -> None:
        self._process = subprocess.Popen(
            [python, GRPC_CLIENT, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.Queue[dict[str, Any] | None]] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, inputs: Body, *, leave_after: int | None = None, types: dict[str, str] | None = None) -> Reply:
        """One request; the reply of one that leaves is what came until then."""
        answer: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = answer
            line = json.dumps({"id": number, "inputs": inputs, "leave_after": leave_after, "types": types or {}})
            assert self._process.stdin is not None
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        found = answer.get(timeout=DEADLINE_S)
        if found is None:
            raise Broken("the client process ended")
        if found["error"] is not None:
            return Reply(500, found["error"])
        if leave_after is not None:
            return Reply()
        plain = ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "num_cached_tokens")
        return _of_events(
            200, [{k: v[0] if k in plain and v else v for k, v in one.items()} for one in found["responses"]]
        )

    def kill(self) -> None:
        """End it at once: every connection that it holds is lost."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def close(self) -> None:
        """Let running requests end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(DEADLINE_S)
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # half a line of a killed process
                found = json.loads(line)
                with self._lock:
                    waiting = self._waiting.pop(found["id"])
                waiting.put(found)
        with self._lock:
            lost, self._waiting = self._waiting, {}
        for waiting in lost.values():
            waiting.put(None)


def openai_body(body: Body, stream: bool, messages: list[dict[str, str]] | None = None) -> Body:
    """Triton's fields as the OpenAI API has them; `messages` make it a chat."""
    asked = {
        key: body[key]
        for key in ("temperature", "top_k", "top_p", "seed", "session_id", "session_start")
        if key in body
    }
    asked |= {"model": "mxcompile", "max_tokens": body["max_tokens"], "stream": stream}
    asked.setdefault("temperature", 0)
    if "stop_words" in body:
        asked["stop"] = body["stop_words"]
    if stream:
        asked["stream_options"] = {"include_usage": True}
    return asked | ({"messages": messages} if messages else {"prompt": body.get("input_ids", body.get("text_input"))})


def path_of(kind: str) -> str:
    """Of a Triton endpoint."""
    return f"{PATH}/{kind}"


def _streamed(body: Body | bytes, stream: bool) -> Body | bytes:
    return body if isinstance(body, bytes) else body | {"stream": stream}


def _of_events(status: int, events: list[dict[str, Any]]) -> Reply:
    """Triton's responses put together."""
    if not events:
        raise Broken("a stream ended without any event")
    last = events[-1]
    if "error" in last:
        return Reply(status if status != 200 else 500, str(last["error"]))
    if "finish_reason" not in last:
        raise Broken(f"a stream ended without its last response: {last}")

    def joined(name: str) -> list[Any]:
        return [value for event in events for value in listed(event.get(name, []))]

    return Reply(
        status,
        None,
        "".join(event["text_output"] for event in events),
        joined("output_ids"),
        joined("output_log_probs"),
        last["finish_reason"],
        last["num_input_tokens"],
        last["num_output_tokens"],
        last["num_cached_tokens"],
    )


def _with_usage(reply: Reply, usage: dict[str, Any]) -> Reply:
    reply.prompt_tokens, reply.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    return reply
