"""What the soak watches from outside: memory and descriptors of the server's processes, readiness, and the kills."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from served import LIMIT_S, Served

SAMPLE_S = 1.0
LEAK_BYTES = 256
"""Most that the memory of a process may grow per request, over the second half of the time. Fixed before measuring: any part that
keeps something of every request keeps at least a dictionary with one entry (232 bytes in CPython) and what it holds. Growth of
the first half is not judged: caches and allocators fill then.
"""
LEAST_REQUESTS, LEAST_S = 5000, 60.0
"""Requests and seconds in that half below which memory is not judged: a megabyte that an allocator takes at once must not look like
a leak, on however fast a machine.
"""
SPARE_DESCRIPTORS = 64
"""Open descriptors that may remain more than at the start, when no client is there: pools and pollers of threads keep some. Far below one
in a hundred of the connections that a soak makes."""
ROLES = {
    "front": lambda line: "serve" in line and "mxcompile" in line,
    "tritonserver": lambda line: line[0].endswith("tritonserver"),
    "stub": lambda line: line[0].endswith("triton_python_backend_stub"),
    "engine": lambda line: "mxcompile.serving.worker" in line,
}


def processes(server: Served) -> dict[str, psutil.Process]:
    """The server's processes by what they do."""
    main = psutil.Process(server.process.pid)
    found = {}
    for process in [main, *main.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            found |= {role: process for role, fits in ROLES.items() if line and fits(line) and role not in found}
    return found


class Memory:
    """Resident memory of each process against the requests that have ended, sampled until the with block is left."""

    def __init__(self, server: Served, requests: Any) -> None:
        """`requests()`: how many have ended."""
        self._server, self._processes, self._requests = server, processes(server), requests
        self.samples: list[tuple[float, int, dict[str, int]]] = []
        self.descriptors = self._descriptors()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Memory:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def report(self) -> dict[str, Any]:
        """Sizes in MiB, slopes over the second half, and whether they are within the limit."""
        half = [sample for sample in self.samples if sample[0] >= self.samples[-1][0] / 2]
        asked = half[-1][1] - half[0][1]
        judged = asked >= LEAST_REQUESTS and half[-1][0] - half[0][0] >= LEAST_S
        values: dict[str, Any] = {"requests_in_second_half": asked, "judged": judged}
        for role in self._processes:
            sizes = np.array([sample[2][role] for sample in half], np.float64)
            slope = float(np.polyfit([sample[1] for sample in half], sizes, 1)[0]) if asked else 0.0
            every = max(1, len(self.samples) // 60)
            values[role] = {
                "start_mib": round(self.samples[0][2][role] / 2**20, 1),
                "half_mib": round(sizes[0] / 2**20, 1),
                "end_mib": round(sizes[-1] / 2**20, 1),
                "bytes_per_request": round(slope, 1),
                "flat": slope <= LEAK_BYTES,
                "every_s": round(self.samples[-1][0] / len(self.samples) * every, 1),
                "mib": [round(sample[2][role] / 2**20, 1) for sample in self.samples[::every]],
            }
        return values

    def faults(self) -> list[str]:
        """What leaks, once the clients are gone."""
        found = []
        server, report = self._server, self.report()
        if report["judged"]:
            found += [
                f"{role} grew by {report[role]['bytes_per_request']} bytes per request"
                for role in self._processes
                if not report[role]["flat"]
            ]
        end = time.monotonic() + LIMIT_S
        while True:
            ready(server)  # a pool closes what has idled at its next request only
            now = self._descriptors()
            more = {role: now[role] - before for role, before in self.descriptors.items()}
            if max(more.values()) <= SPARE_DESCRIPTORS or time.monotonic() > end:
                break
            time.sleep(0.5)
        return found + [f"{role} holds {n} more descriptors" for role, n in more.items() if n > SPARE_DESCRIPTORS]

    def _descriptors(self) -> dict[str, int]:
        return {role: process.num_fds() for role, process in self._processes.items()}

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            with contextlib.suppress(psutil.Error):
                sizes = {role: process.memory_info().rss for role, process in self._processes.items()}
                self.samples.append((time.monotonic() - self._start, self._requests(), sizes))


def ready(server: Served) -> bool:
    """What a load balancer is told."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.openai}/health/ready", timeout=LIMIT_S) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError:
        return False


@dataclass
class Killer:
    """Kills a rank, or now and then the engine process, and watches the server come back."""

    server: Served
    faults: list[str]
    outages_s: list[float] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)

    def run(self, seed: int, end: float, every_s: float) -> None:
        """Until `end` (monotonic)."""
        source = random.Random(seed)
        while time.monotonic() + every_s < end:
            time.sleep(every_s * source.uniform(0.5, 1.0))
            try:
                self.kill("engine process" if len(self.killed) % 4 == 3 else "rank", source)
            except Exception as error:  # nobody else would see it
                self.faults.append(f"no more kills: {type(error).__name__}: {error}")
                return

    def kill(self, what: str, source: random.Random) -> None:
        """Return when the server has noticed and serves again."""
        engine, restarts = self.server.engine_process(), self.server.metric("engine_restarts_total")
        (engine if what == "engine process" else source.choice(self._ranks(engine))).kill()
        self.killed.append(what)
        start = time.monotonic()
        # Not that it is not ready, which may be over before anybody has looked.
        while self.server.metric("engine_restarts_total") == restarts or not ready(self.server):
            if time.monotonic() - start > LIMIT_S:
                self.faults.append(f"not ready again {LIMIT_S} s after a killed {what}")
                return
            time.sleep(0.02)
        self.outages_s.append(round(time.monotonic() - start, 2))

    def _ranks(self, engine: psutil.Process) -> list[psutil.Process]:
        found = []
        for process in engine.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "engines.parallel.worker" in process.cmdline() and process.name().startswith("python"):
                    found.append(process)
        return found
