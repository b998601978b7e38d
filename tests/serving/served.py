"""A running `mxcompile serve`, and plain clients for it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PATH = "/v2/models/mxcompile"
LIMIT_S = 300  # for what takes seconds: only a hang takes that long, on any machine


@dataclass
class Served:
    process: subprocess.Popen
    log: Path
    openai: int
    http: int
    grpc: int
    metrics: int
    expected: int = 0  # exit status

    def open(self, path: str, body: dict | bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """POST to Triton; the caller closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=LIMIT_S)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", f"{PATH}/{path}", data, {"Connection": "close"})
        return connection, connection.getresponse()

    def post(self, path: str, body: dict | bytes) -> tuple[int, dict]:
        """Status and JSON of a plain request."""
        connection, response = self.open(path, body)
        with contextlib.closing(connection):
            return response.status, json.loads(response.read())

    def stream(self, body: dict) -> list[dict]:
        """All events of a streamed request."""
        connection, response = self.open("generate_stream", body | {"stream": True})
        with contextlib.closing(connection):
            lines = response.read().decode().splitlines()
        return [json.loads(line[5:]) for line in lines if line.startswith("data:")]

    def generate(self, body: dict, *, stream: bool) -> dict:
        """Tokens, text and closing values of a request, put together when it streams."""
        if not stream:
            status, values = self.post("generate", body)
            assert status == 200, values
            return values | {"output_ids": listed(values["output_ids"])}
        events = self.stream(body)
        assert "error" not in events[-1], events
        return events[-1] | {
            "output_ids": [token for event in events for token in listed(event.get("output_ids", []))],
            "text_output": "".join(event["text_output"] for event in events),
        }

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric of ours over the series that have these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=LIMIT_S) as response:
            lines = response.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(f"mxcompile_{name}{{") and all(label in line for label in wanted)
        )

    def wait_idle(self) -> None:
        """Return when no request holds or awaits a slot any more."""
        # The numbers come once a second: a short request shows when they are new. The queue may be full before.
        before = self.metric("requests_total", end="finished")
        probe = {"input_ids": [1], "max_tokens": 1}
        until(lambda: self.post("generate", probe)[0] == 200, "a short request is not answered")
        until(lambda: self.metric("requests_total", end="finished") > before, "no numbers come")
        until(lambda: not self.metric("active_requests") + self.metric("waiting_requests"), "a slot is leaked")

    def wait_logged(self, text: str) -> None:
        """Return when this is in the log: a server may answer before it writes there."""
        until(lambda: text in self.log.read_text(), f"not in the log: {text}")

    def engine_process(self) -> psutil.Process:
        """The process that holds the engine."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # another one, which has just ended
                if "mxcompile.serving.worker" in process.cmdline():
                    return process
        raise AssertionError("there is no engine process now")

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT_S)


def launch(engine: Path, log: Path, venv: Path, *options: object) -> Served:
    """`mxcompile serve` on free ports, once it serves. `log`: its output, in a folder that takes what a killed server leaves."""
    openai, http_port, grpc, metrics = free_ports(4)
    ports = ("--openai-port", openai, "--http-port", http_port, "--grpc-port", grpc, "--metrics-port", metrics)
    command = [sys.executable, "-m", "mxcompile", "serve", engine, *ports, "--threads", 1, "--drain", 10, *options]
    own = {"PYTHONPATH": str(ROOT), "MXCOMPILE_TRITON_VENV": str(venv), "TMPDIR": str(log.parent)}
    with log.open("w") as out:
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=out, env=os.environ | own)
    server = Served(process, log, openai, http_port, grpc, metrics)
    end = time.monotonic() + LIMIT_S
    while "metrics     http" not in log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            server.stop()
            raise AssertionError(log.read_text())
        time.sleep(0.05)
    return server


def triton_venv() -> Path:
    """Where the server is expected: what MXCOMPILE_TRITON_VENV names, else .venv-triton, which `make setup` makes."""
    return Path(os.environ.get("MXCOMPILE_TRITON_VENV") or ROOT / ".venv-triton")


def listed(value: int | list[int]) -> list[int]:
    """Triton's JSON writes a list of one entry as the entry."""
    return value if isinstance(value, list) else [value]


def until(true: Callable[[], object], otherwise: str) -> None:
    """Return as soon as it is true; fail when it is not after a long time."""
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, and that the system gives to nobody else: below those that it takes for connections."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.sample(range(min(10_000, first - 1_000), first), 1_000):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no ports are free")
