"""Child processes for work on what strangers send: a Python module of ours, and a connection to it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection


def start_child(module: str) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start `python -m module FD`; FD is the other end of the connection, which this process no longer has."""
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
