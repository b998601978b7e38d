"""Contestants as processes of their own: so that peak memory is each one's own and one's threads do not meet another's."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from mxcompile.errors import MxcompileError

SETUP_SECONDS = 3600.0  # reading hundreds of gigabytes takes long
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ContestantError(MxcompileError):
    """The process could not do a task; the message is its own."""

    exit_code = 3


class ContestantTimeout(ContestantError):
    """It took longer than allowed and was ended."""


class ContestantProcess:
    """One side in a process. Use as a context manager; `start` opens it, `ask` gives it a task."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """`setup`: what `worker.open_session` needs."""
        self.setup = setup
        self.ready: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> ContestantProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = SETUP_SECONDS) -> dict[str, Any]:
        """Open the side, again if it had ended. Raises ContestantError when it cannot."""
        self.stop()
        threads = dict.fromkeys(_THREAD_VARIABLES, str(self.setup["threads"]))
        root = str(Path(__file__).resolve().parents[2])  # the packages of this tree, wherever it is run from
        paths = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mxcompile.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | threads | {"PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its children
        )
        self.ready = self.ask(self.setup, timeout_s)
        return self.ready

    def ask(self, task: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to one task. Raises ContestantError with the process's own words, ContestantTimeout when it takes too long."""
        process = self._process
        if process is None or process.stdin is None or process.poll() is not None:
            raise ContestantError("its process is not running")
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
            line = self._line(timeout_s)
        except BrokenPipeError:
            line = b""
        if not line:
            code = process.wait()
            self.stop()
            signal = f"signal {-code}, often too little memory" if code < 0 else f"exit code {code}"
            raise ContestantError(f"its process ended ({signal})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def _line(self, timeout_s: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([pipe], [], [], timeout_s)[0]:
                self.stop()
                raise ContestantTimeout(f"took more than {timeout_s:g} s")
            part = os.read(pipe, 1 << 20)
            if not part:
                return b""
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def stop(self) -> None:
        """End the process, and its ranks if it has any."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()  # an idle worker ends by itself and takes its ranks with it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # its own session: nobody else is in this group
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
