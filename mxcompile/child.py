"""Child processes for work on what strangers send: a Python module of ours, and a connection to it."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from multiprocessing.connection import Connection


class Child:
    """`python -m module FD`, started when it is first needed, and again after it ended. Use it from one thread at a time."""

    def __init__(self, module: str, hello: bytes) -> None:
        """FD is the child's end of the connection; `hello` is the first message on it."""
        self._module, self._hello = module, hello
        self.process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def started(self) -> tuple[Connection, subprocess.Popen[bytes]]:
        """Our end, and the process that has the other."""
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None or self._connection is None:
            self.process, self._connection = _start(self._module)
            self._connection.send_bytes(self._hello)
        return self._connection, self.process

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self._connection = None


def limit(what: int, most: int) -> None:
    """Let this process take at most so much of a resource (`resource.RLIMIT_...`), or less where the machine allows less."""
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _start(module: str) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # nothing is multiplied there
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | one,
        )
    return process, Connection(ours.detach())
