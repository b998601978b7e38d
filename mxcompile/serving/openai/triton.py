"""Requests to Triton's generate endpoint, and what its errors mean."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx

_ENDED = "the engine server ended; try again in a moment"
_STATUS = {"limited": 429, "unavailable": 503, "internal": 500, "cancelled": 499}


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


class Answer:
    """A request that Triton is answering. Closing it early cancels the request."""

    def __init__(self, response: httpx.Response, ends: int = 1) -> None:
        """`ends`: how many answers it brings."""
        self._response, self._ends = response, ends
        stream = response.extensions.get("network_stream") if hasattr(socket, "TCP_QUICKACK") else None  # Linux
        self._socket = stream.get_extra_info("socket") if stream is not None else None  # slow: not for every token

    @classmethod
    async def ask(cls, client: httpx.AsyncClient, model: str, tensors: dict[str, Any]) -> Answer:
        """Send a request; returns when its first response is there. Raises ApiError when it is refused."""
        sent = client.build_request("POST", f"/v2/models/{model}/generate_stream", json=tensors)
        response = await client.send(sent, stream=True)
        if response.status_code == 200:
            return cls(response, tensors.get("n", 1))
        try:
            text = (await response.aread()).decode(errors="replace")
        finally:
            await response.aclose()
        raise _refusal(response.status_code, text)

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """The outputs of each response. Raises ApiError when the request fails."""
        rest, ends = b"", 0
        try:
            async for data in self._response.aiter_bytes():
                self._acknowledge()
                # Not httpx's lines: they also end at characters that text may hold, such as U+2028.
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    values: dict[str, Any] = json.loads(line[5:])
                    if "error" in values:
                        raise _refusal(500, line.decode())
                    ends += bool(values.get("finish_reason"))
                    yield values
        except httpx.TransportError:
            raise ApiError(503, _ENDED) from None
        if ends < self._ends:  # half an answer must not pass for a whole one
            raise ApiError(503, _ENDED)

    async def close(self) -> None:
        """Let Triton see that nobody listens any more."""
        await self._response.aclose()

    def _acknowledge(self) -> None:
        """Acknowledge what came at once. Triton leaves Nagle's algorithm on, which holds the next token back until
        then; the system would wait 40 ms. It forgets this option, so it is set each time.
        """
        if self._socket is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _refusal(status: int, text: str) -> ApiError:
    """The error in one of Triton's error bodies, with the status that its kind has (see triton/model.py: fail)."""
    try:
        message = str(json.loads(text.removeprefix("data:").strip())["error"])
    except (ValueError, KeyError, TypeError):
        return ApiError(status, text.strip()[:500] or "the engine server gave no reason")
    kind, _, rest = message.partition(": ")
    return ApiError(_STATUS[kind], rest) if kind in _STATUS else ApiError(status, message)
