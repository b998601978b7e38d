"""Starts one process per rank, supervises them, and ends them all when one of them is lost.

The ranks are started by MPI's launcher (`mpirun`) in a session of their own, so that Ctrl-C reaches only this process. Each rank
connects back through a socket in a private folder. A rank is lost when its socket closes, when the launcher ends, when it says so,
or when it makes no progress for `stall_limit` seconds in the middle of a call.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from engines.errors import ENVIRONMENT, USAGE, EngineError
from engines.parallel.join import Launch
from engines.parallel.message import Message, decode, encode
from engines.parallel.worker import OPTIONS, SOCKET, TICKS, log_name

POLL_S = 0.2
GRACE_S = 2.0  # for an orderly end
PATIENCE_S = 20.0  # for what follows from another process' doing at once, unless the machine is very busy
_BLAMED = re.compile(
    r"process rank (\d+) with PID|Process name: \[[^\]]*,(\d+)\]"
)  # in the words of Open MPI's launcher


class RankProcesses:
    """All ranks of one engine. Any failure closes them; later calls then repeat what happened."""

    def __init__(
        self,
        ranks: int,
        options: dict[str, Any],
        *,
        threads: int,
        start_limit: float,
        stall_limit: float,
        launcher: Sequence[str] | None = None,
        joined: Launch | None = None,
    ) -> None:
        """`joined`: the other ranks have been started already, and connect by themselves."""
        self.ranks, self._stall_limit, self._joined = ranks, stall_limit, joined
        self._failure: EngineError | None = None
        self._forgotten: list[int] = []
        self._pids: dict[int, int] = {}
        self._connections: dict[int, Connection] = {}
        self._lifelines: list[Connection] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="mxcompile-")) if joined is None else joined.make_folder()
        options = options | {"joined": None if joined is None else joined.exchange}
        try:
            (self._folder / OPTIONS).write_text(json.dumps(options))
            (self._folder / TICKS).write_bytes(bytes(8 * ranks))
            with (self._folder / TICKS).open("r+b") as file:
                self._ticks = np.frombuffer(mmap.mmap(file.fileno(), 0), np.int64)
            listener = Listener(str(self._folder / SOCKET), backlog=2 * ranks)
            try:
                command = [] if joined is not None else [*(launcher or find_launcher()), "-n", str(ranks)]
                self._start(options, threads, command)
                self._accept(listener, start_limit)
            finally:
                with contextlib.suppress(FileNotFoundError):  # a failed start has removed the folder already
                    listener.close()
            self._collect("load its part of the engine", max(start_limit, stall_limit))
        except EngineError:
            self._end()
            raise
        except BaseException:
            self.close(orderly=False)
            raise

    def ask(self, message: Message | Sequence[Message]) -> list[Message]:
        """Send a message to all ranks (or one each) and return their answers by rank.

        Raises EngineError: with exit code 2 what all ranks refused, and nothing has changed; else a rank is lost, and
        all are ended.
        """
        if self._failure is not None:
            raise self._failure
        forgotten, self._forgotten = self._forgotten, []
        messages = [message] * self.ranks if isinstance(message, dict) else message
        messages = [one | {"forget": forgotten} for one in messages]
        try:
            with _interrupts_wait():
                for rank, connection in self._connections.items():
                    connection.send_bytes(encode(messages[rank]))
                return self._answers("compute")
        except OSError:
            self._lost()
        except EngineError as error:
            if error.exit_code != USAGE:
                self._end()
            raise
        except _SecondInterrupt:
            self.close(orderly=False)
            raise

    def check_alive(self) -> None:
        """Raise EngineError when a rank was lost since the last call, which nobody would notice before the next."""
        if self._failure is None and self._process is not None and self._process.poll() is not None:
            self._lost()
        if self._failure is not None:
            raise self._failure

    def forget(self, state: int) -> None:
        """Have the ranks drop a state with the next call; called from the garbage collector, at any moment."""
        self._forgotten.append(state)

    def close(self, *, orderly: bool = True) -> None:
        """End all ranks; safe to call again."""
        if self._failure is None:
            self._failure = EngineError("the session is closed; load the engine again")
        process, self._process = self._process, None
        if process is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        if orderly:
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    connection.send_bytes(encode({"do": "stop"}))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        for line in [*self._connections.values(), *self._lifelines]:
            line.close()
        if process.poll() is None or (self._joined is not None and not orderly):
            for pid in self._pids.values():  # a rank that is stopped or hangs does not see its lifeline close
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, options: dict[str, Any], threads: int, launcher: Sequence[str]) -> None:
        arguments = [sys.executable, "-m", "engines.parallel.worker", str(self._folder), json.dumps(options)]
        with (self._folder / "launcher.log").open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    [*launcher, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=(_outside() if self._joined is None else dict(os.environ)) | _environment(threads),
                )
            except OSError as error:
                raise EngineError(
                    f"{[*launcher, sys.executable][0]}: cannot be started ({error.strerror})", exit_code=ENVIRONMENT
                ) from error

    def _accept(self, listener: Listener, limit: float) -> None:
        """Two connections from every rank."""
        until = time.monotonic() + limit
        socket = listener._listener._socket  # type: ignore[attr-defined]
        while len(self._connections) + len(self._lifelines) < 2 * self.ranks:
            if wait([socket], POLL_S):
                connection = listener.accept()
                try:
                    # A process that is there says hello or dies, however long the machine keeps it waiting.
                    patience = max(PATIENCE_S, until - time.monotonic())
                    hello = decode(connection.recv_bytes()) if connection.poll(patience) else {}
                except (EOFError, OSError):
                    continue  # the process died between two steps; the launcher's end will tell
                if "lifeline" in hello:
                    self._lifelines.append(connection)
                elif hello.get("rank") in range(self.ranks):
                    self._connections[hello["rank"]], self._pids[hello["rank"]] = connection, hello["pid"]
                continue
            assert self._process is not None
            if self._process.poll() is not None:
                self._fail(None, "ended before it was ready")
            if time.monotonic() > until:
                missing = [rank for rank in range(self.ranks) if rank not in self._connections]
                self._fail(missing[0] if missing else None, f"did not start within {limit:.0f} s")
        self._connections = dict(sorted(self._connections.items()))

    def _collect(self, doing: str, limit: float) -> None:
        saved, self._stall_limit = self._stall_limit, limit
        self._answers(doing)
        self._stall_limit = saved

    def _answers(self, doing: str) -> list[Message]:
        """One message from every rank."""
        answers: dict[int, Message] = {}
        ticks, moved = self._ticks.copy(), time.monotonic()
        while len(answers) < self.ranks:
            waiting = {connection: rank for rank, connection in self._connections.items() if rank not in answers}
            ready = wait(list(waiting), POLL_S)
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answers[rank] = decode(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self._lost(rank)
                if "fatal" in answers[rank]:
                    self._fail_with(rank, answers[rank])
            now = time.monotonic()
            if ready or (self._ticks != ticks).any():
                ticks, moved = self._ticks.copy(), now
            elif answers and any("error" in answer for answer in answers.values()) and now - moved > PATIENCE_S:
                self._fail(min(waiting.values()), "does not answer where others refused a call")
            elif now - moved > self._stall_limit:
                behind = min(waiting.values(), key=lambda rank: (self._ticks[rank], rank))
                self._fail(behind, f"hangs: no progress for {self._stall_limit:.0f} s while it should {doing}")
        errors = [answers[rank]["error"] for rank in range(self.ranks) if "error" in answers[rank]]
        if len(errors) == self.ranks:
            raise EngineError(errors[0])
        if errors:
            self._fail(None, f"disagree about a call: {errors[0]}")
        return [answers[rank] for rank in range(self.ranks)]

    def _lost(self, seen: int | None = None) -> NoReturn:
        """A rank's socket is closed, `seen` among others: name the one that failed first, and what it said.

        The launcher ends all ranks when one has ended, so by now any number of sockets may be closed, in any order.
        """
        time.sleep(POLL_S / 4)
        gone = [rank for rank, pid in self._pids.items() if not _alive(pid)]
        if self._process is not None and self._joined is None:
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # the launcher tells which one it was, and how it ended
                self._process.wait(PATIENCE_S)
        said = {rank: words for rank, line in self._connections.items() if (words := _fatal(line)) is not None}
        blamed = self._blamed()
        if blamed is None:
            blamed = next(iter(said)) if said else gone[0] if len(gone) == 1 else seen
        if blamed in said:
            self._fail_with(blamed, said[blamed])
        self._fail(blamed)

    def _blamed(self) -> int | None:
        """The rank that the launcher says has ended first."""
        with contextlib.suppress(OSError):
            found = _BLAMED.search((self._folder / "launcher.log").read_text(errors="replace"))
            rank = int(found[1] or found[2]) if found else -1
            return rank if rank in range(self.ranks) else None
        return None

    def _fail(
        self,
        rank: int | None,
        what: str = "ended unexpectedly",
        *,
        exit_code: int = ENVIRONMENT,
        launcher: bool = True,
    ) -> NoReturn:
        """End all ranks and raise EngineError with the last words of the one at fault, or of the `launcher`."""
        who = "the ranks" if rank is None else f"rank {rank}"
        words = self._last_words(rank, launcher)
        words = "" if what in words else words
        self._failure = EngineError(f"{who} {what}{words}", exit_code=exit_code)
        self._end()
        raise self._failure

    def _end(self) -> None:
        """End all ranks after a failure. Where somebody else's launcher has started them, with this process: such a launcher ends
        this one, too, as soon as a rank has ended, and the error must be told before.
        """
        if self._joined is None:
            self.close(orderly=False)
        else:
            atexit.register(self.close, orderly=False)

    def _fail_with(self, rank: int, said: Message) -> NoReturn:
        """The same with what the rank itself said; the launcher may or may not have noticed yet, and adds nothing."""
        self._fail(rank, said["fatal"], exit_code=said["exit_code"], launcher=False)

    def _last_words(self, rank: int | None, launcher: bool) -> str:
        names = [log_name(rank)] if rank is not None else [log_name(each) for each in range(self.ranks)]
        for name in [*names, "launcher.log"] if launcher else names:
            with contextlib.suppress(OSError):
                text = (self._folder / name).read_text(errors="replace")
                lines = [line.strip() for line in text.splitlines() if set(line.strip()) - set("-=*")]
                telling = [line for line in lines if "signal" in line.lower() or "error" in line.lower()] or lines[-1:]
                if telling:
                    return f"; last words: {telling[-1][:300]}"
        return ""


class _SecondInterrupt(KeyboardInterrupt):
    """Ctrl-C again, while the ranks finish the step in which the first one came."""


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, so that no answer stays behind and the session remains usable; a second one is not
    held back. Only the main thread gets interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        if came:
            raise _SecondInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def find_launcher() -> list[str]:
    """MPI's launcher: beside this Python, where pip puts it, or on the path."""
    if importlib.util.find_spec("mpi4py") is not None:
        found = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
        if found is not None:
            return [found]
    raise EngineError(
        "running an engine of several ranks needs MPI; install it with: pip install 'mxcompile[mpi]'",
        exit_code=ENVIRONMENT,
    )


def _outside() -> dict[str, str]:
    """The environment without what would make a launcher believe that it runs inside another one."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_COMM_", "PMIX_", "PMI_"))}


def _environment(threads: int) -> dict[str, str]:
    variables = {
        "OMP_NUM_THREADS": str(threads),
        # Ranks share the cores of one machine; ONNX Runtime places its own threads.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        # A rank that waits lets others run: spinning ranks starve each other as soon as anything else runs on the machine.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])),
    }
    if os.geteuid() == 0:  # Open MPI's launcher otherwise refuses to run as root, as in containers
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables


def _fatal(connection: Connection) -> Message | None:
    """What a rank said when it failed, if that is waiting to be read."""
    with contextlib.suppress(EOFError, OSError):
        while connection.poll(0):
            message = decode(connection.recv_bytes())
            if "fatal" in message:
                return message
    return None


def _alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"
