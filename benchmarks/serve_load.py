"""Load on the real server: latencies by concurrency, what in-flight batching gains, what Triton costs, what a known prefix saves.

    python benchmarks/serve_load.py ENGINE_DIR --json benchmarks/results/serve_load_small.json

Everything is measured in one run on one machine, client and server together. Contestants take turns in every round: Triton with the
asked numbers of clients, and the scheduler alone in its own process with the largest of them. Reported are percentiles over all
requests, and medians over the rounds for throughputs and their ratios. All answers have the same length and are decoded greedily.
Client times start before the request is sent and end when its bytes are read.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

PERCENTILES = (50, 90, 99)
PORTS = {"http_port": 18400, "grpc_port": 18401, "metrics_port": 18402}


@dataclass
class Load:
    """Times of many requests, in seconds."""

    wall: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def stream(prompt: list[int], tokens: int, load: Load) -> None:
    """One streamed request over HTTP."""
    body = {"input_ids": prompt, "max_tokens": tokens, "end_id": -1, "stream": True}
    start = last = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", PORTS["http_port"], timeout=600)
    with contextlib.closing(connection):
        path = "/v2/models/mxcompile/generate_stream"
        connection.request("POST", path, json.dumps(body), {"Connection": "close"})
        receiver: socket.socket = connection.sock
        response, seen = connection.getresponse(), 0
        while line := response.readline():
            # Triton leaves Nagle's algorithm on: without quick acknowledgements tokens come in bursts 40 ms apart.
            receiver.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            if line.startswith(b"data:"):
                now = time.perf_counter()
                (load.between if seen else load.first).append(now - last)
                last, seen = now, seen + 1
    if seen != tokens:
        raise RuntimeError(f"{seen} of {tokens} tokens came: {line!r}")
    load.whole.append(last - start)
    load.tokens += seen


def through_triton(prompts: list[list[int]], tokens: int, clients: int) -> Load:
    """`clients` at a time until all prompts are answered."""
    load = Load()
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda prompt: stream(prompt, tokens, load), prompts))
    load.wall = time.perf_counter() - start
    return load


class EngineAlone:
    """The scheduler in a process of its own, without any server: `through` as above."""

    def __init__(self, engine: Path, threads: int) -> None:
        command = [sys.executable, __file__, str(engine), "--alone", "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask({"prompts": [[1, 2]] * 2, "tokens": 4, "clients": 2})

    def through(self, prompts: list[list[int]], tokens: int, clients: int) -> float:
        """Tokens per second."""
        return float(self._ask({"prompts": prompts, "tokens": tokens, "clients": clients})["tokens_per_s"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def serve_alone(engine: Path, threads: int) -> None:
    """The other side of EngineAlone."""
    from engines.generation import GenerationConfig
    from mxcompile.loading import load
    from mxcompile.serving.requests import Event, Finished, Request
    from mxcompile.serving.scheduler import Scheduler

    loaded = load(engine, threads=threads)
    detokenizer = loaded.tokenizer.detokenizer if loaded.tokenizer is not None else None
    scheduler = Scheduler(loaded.session, detokenizer=detokenizer)
    for line in sys.stdin:
        asked = json.loads(line)
        config = GenerationConfig(max_new_tokens=asked["tokens"])
        waiting, running, done = list(asked["prompts"]), 0, 0

        def note(event: Event) -> None:
            nonlocal running, done
            if isinstance(event, Finished):
                running, done = running - 1, done + len(event.result.tokens)

        start = time.perf_counter()
        while waiting or not scheduler.idle:
            while waiting and running < asked["clients"]:
                scheduler.submit(Request(waiting.pop(), config, note))
                running += 1
            scheduler.step()
        print(json.dumps({"tokens_per_s": done / (time.perf_counter() - start)}), flush=True)


@contextlib.contextmanager
def triton(engine: Path, venv: Path, threads: int) -> Iterator[None]:
    """The real server on a repository of this engine."""
    from mxcompile.serving.triton.environment import install
    from mxcompile.serving.triton.repository import write_repository
    from mxcompile.serving.triton.server import TritonServer
    from mxcompile.serving.worker import Settings

    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        write_repository(engine, Path(folder) / "repository", settings=Settings("", threads=threads), link=True)
        with TritonServer(install(venv), Path(folder) / "repository", log=log, **PORTS) as server:
            server.wait_ready()
            yield


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    points = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {f"p{p}": round(points[p - 1] * 1000, 3) for p in PERCENTILES}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    source = random.Random(0)
    levels = sorted(arguments.concurrency)

    def prompts() -> list[list[int]]:
        """New ones in every round, so that no prefix is known."""
        lengths = [source.randint(arguments.prompt_tokens // 2, arguments.prompt_tokens) for _ in range(levels[-1])]
        return [[source.randrange(500) for _ in range(length)] for length in lengths]

    loads: dict[int, list[Load]] = {level: [] for level in levels}
    alone: list[float] = []
    with triton(arguments.engine, arguments.triton_venv, arguments.threads):
        other = EngineAlone(arguments.engine, arguments.threads)
        through_triton(prompts()[:2], 4, 2)  # warm
        for number in range(arguments.rounds):
            for level in levels:
                loads[level].append(through_triton(prompts(), arguments.output_tokens, level))
            alone.append(other.through(prompts(), arguments.output_tokens, levels[-1]))
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
        other.close()
        prefix = shared_prefix(arguments.shared_prefix, arguments.rounds, source) if arguments.shared_prefix else None

    def rate(load: Load) -> float:
        return load.tokens / load.wall

    rates = {level: statistics.median(map(rate, some)) for level, some in loads.items()}
    first, last = levels[0], levels[-1]
    gains = [rate(many) / rate(one) for one, many in zip(loads[first], loads[last], strict=True)]
    costs = [1 - rate(many) / own for many, own in zip(loads[last], alone, strict=True)]
    return {
        "by_concurrency": [
            {
                "clients": level,
                "requests": sum(len(load.whole) for load in some),
                "tokens_per_s": round(rates[level], 1),
                "time_to_first_token_ms": percentiles([t for load in some for t in load.first]),
                "inter_token_latency_ms": percentiles([t for load in some for t in load.between]),
                "request_ms": percentiles([t for load in some for t in load.whole]),
            }
            for level, some in loads.items()
        ],
        "batching_gain": {"clients": [first, last], "ratio": round(statistics.median(gains), 2), "rounds": gains},
        "triton_cost": {
            "clients": last,
            "engine_tokens_per_s": round(statistics.median(alone), 1),
            "share": round(statistics.median(costs), 3),
            "rounds": costs,
        },
        "shared_prefix": prefix,
    }


def shared_prefix(length: int, rounds: int, source: random.Random) -> dict[str, Any]:
    """First-token times of prompts that share `length` tokens, the first of each round unknown to the server."""
    cold, warm = [], []
    for _ in range(rounds):
        prefix = [source.randrange(500) for _ in range(length)]
        for times in (cold, warm, warm):
            load = Load()
            stream([*prefix, source.randrange(500), source.randrange(500)], 2, load)
            times.append(load.first[0])
    ratio = statistics.median(cold) / statistics.median(warm)
    return {"tokens": length, "cold_ms": percentiles(cold), "warm_ms": percentiles(warm), "ratio": round(ratio, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=64, help="longest prompt; the shortest is half of it")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shared-prefix", type=int, default=0, help="also measure a shared prefix of this many tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--triton-venv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        serve_alone(arguments.engine, arguments.threads)
        return
    from engines.directory import read_config
    from mxcompile.serving.triton.environment import default_folder

    arguments.triton_venv = arguments.triton_venv or default_folder()
    config = read_config(arguments.engine)
    parameters = sum(record.size for record in config.files.values())
    load_before = os.getloadavg()[0]  # work of others on this machine
    values = {
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
        | {"load_before": load_before},
        "engine": {"target": config.target, "dtype": config.dtype, "layers": config.num_layers, "bytes": parameters},
        "settings": {
            name: getattr(arguments, name) for name in ("prompt_tokens", "output_tokens", "rounds", "threads")
        },
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")} | {"triton": "2.51.0"},
        **measure(arguments),
    }
    text = json.dumps(values, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


def cpu_name() -> str:
    """As the kernel reports it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
