"""A Triton Inference Server as a child process."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from mxcompile.errors import EnvironmentProblem
from mxcompile.serving.triton.environment import TritonInstallation, backend_directory

DRAIN_S = 30
SAVING_S = 90  # most that the engine process may take to write its sessions and to end
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""glibc's defaults are an arena for each of Triton's many threads, and large blocks out of them once large ones were freed. So
abandoned and large requests go on making it grow, by kilobytes each (tests/serving/soak.py finds that). With these it comes to rest.
"""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def _end_with_parent() -> None:
    """In the child: ask for SIGTERM when the thread that started it is gone, so that a killed parent leaves no server."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _running() -> Iterator[tuple[int, int, int]]:
    """All processes that run: number, that of the parent, and the group."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            state, parent, group = file.read_text(errors="replace").rsplit(")", 1)[1].split()[:3]
            if state not in "ZX":
                yield int(file.parent.name), int(parent), int(group)


def _children(pid: int) -> set[int]:
    """Processes that run and were started by this one."""
    return {number for number, parent, _ in _running() if parent == pid}


def _wait_for_group(group: int, seconds: float) -> None:
    """Return when no process of this group runs any more, at the latest after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(group == other for _, _, other in _running()):
        time.sleep(0.1)


class TritonServer:
    """Serves a model repository until it is stopped. Start it from a thread that stays, and use it in a with block."""

    def __init__(
        self,
        installation: TritonInstallation,
        repository: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        drain_s: int = DRAIN_S,
        log: IO[str] | None = None,
    ) -> None:
        """Start it. `drain_s`: seconds that running requests have to end once it is asked to stop."""
        self.host, self.http_port, self.grpc_port, self.metrics_port = host, http_port, grpc_port, metrics_port
        self._drain_s = drain_s
        self._stubs: set[int] = set()
        self._backends = backend_directory(installation)
        region = f"mxcompile_{os.getpid()}_{id(self):x}_"
        self._shared_memory = region
        command = [
            str(installation.server),
            f"--model-repository={repository}",
            f"--backend-directory={self._backends}",
            f"--backend-config=python,shm-region-prefix-name={region}",
            *(f"--{kind}-address={host}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={http_port}",
            f"--grpc-port={grpc_port}",
            f"--metrics-port={metrics_port}",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={drain_s}",
        ]
        own = {
            "PATH": f"{installation.python.parent}:{os.environ.get('PATH', '')}",
            "LD_LIBRARY_PATH": f"{installation.library_dir}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
        }
        environment = MALLOC | os.environ | own
        for name in ("PYTHONHOME", "VIRTUAL_ENV"):
            environment.pop(name, None)
        try:
            # A group of its own: Ctrl-C on the terminal must not reach it before this process has decided.
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            shutil.rmtree(self._backends, ignore_errors=True)
            raise EnvironmentProblem(f"{installation.server} cannot be started: {error.strerror}") from error

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the server process."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def lost(self) -> str | None:
        """What has ended by itself since the server was ready, if anything has. Triton does not start a lost Python
        process again, and yet calls itself ready.
        """
        if self.returncode is not None:
            return f"Triton ended by itself with {self.returncode}"
        return "Triton's Python process ended by itself" if self._stubs - _children(self.pid) else None

    def wait_ready(self, limit_s: float = 600.0, stop: threading.Event | None = None) -> None:
        """Return when it serves, or `stop` is set. Raises EnvironmentProblem when it ends before, or takes longer."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if stop is not None and stop.is_set():
                return
            if self.returncode is not None:
                raise EnvironmentProblem("Triton ended while it was starting; its messages above say why")
            if self.ready():
                self._stubs = _children(self.pid)
                return
            time.sleep(0.05)
        raise EnvironmentProblem(f"Triton was not ready after {limit_s:g} s")

    def ready(self) -> bool:
        """Whether it takes requests now."""
        connection = http.client.HTTPConnection(self.host, self.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready", headers={"Connection": "close"})
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self) -> int:
        """Let running requests end, then stop it; returns its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._drain_s + SAVING_S)
        if self._process.poll() is None or self._process.returncode != 0:
            if self._process.poll() is not None:
                self._let_engine_end()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # stubs and engine of a server that did not end itself
            self._process.wait()
        shutil.rmtree(self._backends, ignore_errors=True)
        for region in Path("/dev/shm").glob(f"{self._shared_memory}*"):  # what a killed server leaves
            region.unlink(missing_ok=True)
        return self._process.returncode

    def _let_engine_end(self) -> None:
        """Triton is gone and did not wait for the engine: requests took all the time, or it was killed. The engine process writes
        its sessions and ends once the Python process between them is gone, too.
        """
        for number, _, group in _running():
            if number in self._stubs and group == self._process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        if self._stubs:  # else it has never served
            _wait_for_group(self._process.pid, SAVING_S)
