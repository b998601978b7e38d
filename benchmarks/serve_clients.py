"""Cheap clients of a server under load: many streamed requests in one thread, so that little of the machine is theirs.

Bytes are counted, not parsed: a token's event holds a mark that nothing else on the line can hold. A connection is made anew for
each request, as clients without a pool do.
"""

from __future__ import annotations

import collections
import json
import re
import selectors
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT_S = 600.0
GRPC_CLIENT = Path(__file__).with_name("serve_grpc_client.py")


@dataclass
class Load:
    """Times of many requests in seconds: whole load, first tokens, between two tokens of one request, whole requests."""

    wall: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.wall


@dataclass(frozen=True)
class Protocol:
    """A streamed request on the wire. `mark`: in every event of an answer once, and nowhere else. `usage`: finds the number of tokens;
    None where every token has an event.
    """

    path: str
    mark: bytes
    usage: re.Pattern[bytes] | None = None

    def request(self, prompt: Sequence[int], tokens: int) -> bytes:
        """The whole HTTP request for exactly `tokens` greedy tokens."""
        body: dict[str, Any] = {"max_tokens": tokens, "stream": True}
        if self.usage is None:
            body |= {"input_ids": list(prompt), "end_id": -1}
        else:
            body |= {"model": "mxcompile", "prompt": list(prompt), "temperature": 0, "ignore_eos": True}
            body["stream_options"] = {"include_usage": True}
        data = json.dumps(body).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


TRITON_HTTP = Protocol("/v2/models/mxcompile/generate_stream", b'"model_name":"')
OPENAI = Protocol("/v1/completions", b'"finish_reason": ', re.compile(rb'"completion_tokens": (\d+)'))


class _Stream:
    """One request on its way."""

    def __init__(self, port: int, protocol: Protocol, prompt: Sequence[int], tokens: int) -> None:
        self._protocol, self._tokens = protocol, tokens
        self._start = self._last = time.perf_counter()
        self._seen, self._text = 0, b""
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(protocol.request(prompt, tokens))

    def read(self, load: Load) -> bool:
        """Take what is there; False at the end."""
        data = self.socket.recv(1 << 16)
        now = time.perf_counter()
        # Triton leaves Nagle's algorithm on: without quick acknowledgements tokens come in bursts 40 ms apart.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        keep = len(self._protocol.mark) - 1
        before, self._text = self._text, self._text + data
        for _ in range(self._text.count(self._protocol.mark) - before.count(self._protocol.mark)):
            (load.between if self._seen else load.first).append(now - self._last)
            self._last, self._seen = now, self._seen + 1
        if data:
            self._text = self._text[-max(keep, 400) :] if len(self._text) > 4000 else self._text
            return True
        made = self._seen
        if self._protocol.usage is not None:
            found = self._protocol.usage.search(self._text)
            made = int(found[1]) if found else -1
        if made != self._tokens:
            raise RuntimeError(f"{made} of {self._tokens} tokens came: {self._text[-500:]!r}")
        load.tokens += made
        load.whole.append(self._last - self._start)
        return False


def drive(port: int, protocol: Protocol, prompts: Sequence[Sequence[int]], tokens: int, clients: int) -> Load:
    """`clients` requests at a time until all prompts are answered. Raises RuntimeError for an answer that is not whole."""
    load, waiting = Load(), collections.deque(prompts)
    start = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        while waiting or selector.get_map():
            while waiting and len(selector.get_map()) < clients:
                stream = _Stream(port, protocol, waiting.popleft(), tokens)
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            ready = selector.select(LIMIT_S)
            if not ready:
                raise RuntimeError(f"nothing came for {LIMIT_S:g} s")
            for key, _ in ready:
                if not key.data.read(load):
                    selector.unregister(key.fileobj)
                    key.data.socket.close()
    load.wall = time.perf_counter() - start
    return load


class Driver:
    """A process that answers one line {"prompts", "tokens", "clients"} with one line of a Load's fields."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        # A session of its own, as the server has: Linux shares the processor between sessions first.
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def drive(self, prompts: Sequence[Sequence[int]], tokens: int, clients: int) -> Load:
        """As the function of that name."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"prompts": [list(prompt) for prompt in prompts], "tokens": tokens, "clients": clients}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args}: ended with {self._process.wait()}")
        return Load(**json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
