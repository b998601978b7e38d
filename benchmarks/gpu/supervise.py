"""Runs GPU work in child processes that may crash or hang, and keeps what they finished.

A child works through keys (a test's name, a benchmark's case) and appends one JSON line at each start and end to a progress
file. One that crashes, or that shows no progress for too long, costs the key it was at: the rest goes on in a new process,
because a failed kernel leaves a process' CUDA context useless. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

POLL_SECONDS = 0.2
START_FACTOR = 3  # a child may take so many times `stall` until its first key (imports, the GPU's context)


@dataclass
class Supervised:
    """`records`: what each started key ended with, {"outcome": "crashed ..."} where its process did not survive it.

    `problem` is empty, or says why keys may be missing.
    """

    records: dict[str, dict[str, Any]]
    problem: str
    seconds: float


class Progress:
    """The child's side."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def start(self, key: str) -> None:
        self._write({"key": key, "event": "start"})

    def end(self, key: str, record: Mapping[str, Any]) -> None:
        self._write({"key": key, "event": "end", "record": dict(record)})

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as handle:
            handle.write(json.dumps(line) + "\n")


def read_progress(path: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """(keys started, records of those that ended); a line cut off by a crash is left out."""
    started: list[str] = []
    ended: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["event"] == "start":
            started.append(entry["key"])
        else:
            ended[entry["key"]] = entry["record"]
    return started, ended


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: left behind, the next child has its own
        child.wait(timeout=20)


def _watch(child: subprocess.Popen[bytes], progress: Path, deadline: float, stall: float) -> str:
    """Waits for the child's end; "" or why it was killed."""
    size, changed = -1, time.monotonic()
    while child.poll() is None:
        now = time.monotonic()
        current = progress.stat().st_size if progress.is_file() else 0
        if current != size:
            size, changed = current, now
        if now > deadline:
            _kill(child)
            return "out of time"
        allowed = stall if current else START_FACTOR * stall
        if now - changed > allowed:
            _kill(child)
            return f"hung: nothing for {allowed:.0f} s"
        time.sleep(POLL_SECONDS)
    return ""


def supervise(
    command_for: Callable[[set[str]], Sequence[str] | None],
    progress: Path,
    *,
    seconds: float,
    stall: float,
    log: IO[bytes],
    good_codes: Sequence[int] = (0,),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Supervised:
    """Runs `command_for(keys already done)` until it ends with a good code, has nothing left (None) or time is up."""
    records: dict[str, dict[str, Any]] = {}
    begun = time.monotonic()
    problem, barren = "", 0
    while (command := command_for(set(records))) is not None:
        progress.unlink(missing_ok=True)
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
        )
        killed = _watch(child, progress, begun + seconds, stall)
        started, ended = read_progress(progress)
        before = len(records)
        records |= ended
        what = killed or f"crashed: exit code {child.returncode}"
        records = {key: {"outcome": what} for key in started if key not in ended} | records
        barren = 0 if len(records) > before else barren + 1
        if not killed and child.returncode in good_codes:
            break
        if killed == "out of time":
            problem = f"out of time after {seconds:.0f} s"
            break
        if barren == 2:  # it dies before it is at a new key: it would for ever
            problem = f"{what} before any new result"
            break
    return Supervised(records, problem, round(time.monotonic() - begun, 1))
