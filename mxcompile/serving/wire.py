"""Messages between the serving front (Triton's Python process) and the engine process, over a socket.

A frame is four bytes of length (big-endian) and a JSON list of messages. Standard library only: this file is copied
into model repositories, where a Python without this package reads it.
"""

import contextlib
import json
import socket
import threading

LARGEST_FRAME = 1 << 28  # bytes


class WireError(Exception):
    """The other side sent something that is no frame, or too long a one."""


class Wire:
    """One end. `send` from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._stream = connection.makefile("rb")

    def send(self, messages: list[dict]) -> None:
        """Send messages in one frame. Raises ConnectionError when the other side is gone."""
        data = json.dumps(messages, separators=(",", ":")).encode()
        if len(data) > LARGEST_FRAME:
            raise WireError(f"a frame of {len(data)} bytes is too long")
        with self._lock:
            try:
                self._connection.sendall(len(data).to_bytes(4, "big") + data)
            except ConnectionError:  # of whichever kind: a reset, where the other side had not read everything
                raise
            except OSError as error:  # closed by this side
                raise ConnectionError(*error.args) from error

    def receive(self) -> list[dict] | None:
        """The next frame's messages; None when the other side is gone."""
        try:
            head = self._stream.read(4)
            size = int.from_bytes(head, "big")
            if size > LARGEST_FRAME:
                raise WireError(f"a frame of {size} bytes is too long")
            data = self._stream.read(size) if len(head) == 4 else b""
        except (OSError, ValueError):  # ValueError: closed by this side
            return None
        return json.loads(data) if data and len(data) == size else None

    def close(self) -> None:
        """Let the other side see the end."""
        with contextlib.suppress(OSError):  # already gone
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
