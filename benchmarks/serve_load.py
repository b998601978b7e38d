"""Load on the real server: latencies and throughput by concurrency, what in-flight batching gains, what each way in costs beside the
engine alone, what a known prefix saves.

    python benchmarks/serve_load.py --preset tiny --shared-prefix 16000 --json NUMBERS.json --plot DRAWING.svg

Everything is measured in one run on one machine, client and server together. Contestants take turns in every round: the scheduler
alone, driven in a process of its own with all requests streamed to a callback, and `mxcompile serve` over HTTP, gRPC and the
OpenAI-compatible API. Each also reports the processor time of every process per token, which other work on the machine moves less than
it moves the clock. Reported are percentiles over all requests, and medians over the rounds for throughputs and their ratios. Answers
are greedy and of one length. Client times start before the request is sent and end when its bytes are read.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from serve_clients import GRPC_CLIENT, OPENAI, TRITON_HTTP, Driver, Load, drive
from serve_plot import plot

from engines.directory import read_config
from engines.generation import GenerationConfig, TokenEvent
from mxcompile.loading import load
from mxcompile.machine import examine
from mxcompile.serving.cache import MemoryBudget, StateCache
from mxcompile.serving.requests import Event, Finished, Request
from mxcompile.serving.scheduler import Scheduler
from mxcompile.serving.triton.environment import default_folder, install
from mxcompile.serving.worker import Settings

PERCENTILES = (50, 90, 99)
PORTS = {"openai": 18403, "http": 18400, "grpc": 18401, "metrics": 18402}
ROLES = {
    "openai_front": "mxcompile serve",
    "tritonserver": "bin/tritonserver",
    "stub": "triton_python_backend_stub",
    "engine": "mxcompile.serving.worker",
}
START_S = 300.0
Prompts = list[list[int]]


def engine_alone(engine: Path, threads: int) -> None:
    """A Driver's process: the scheduler as the engine process of a server has it, without any server."""
    loaded = load(engine, threads=threads)
    budget = MemoryBudget(Settings("").cache_bytes)
    scheduler = Scheduler(
        loaded.session,
        detokenizer=loaded.tokenizer.detokenizer if loaded.tokenizer is not None else None,
        cache=StateCache(budget, loaded.config.limits.prefill_chunk, ""),
    )
    for line in sys.stdin:
        asked = json.loads(line)
        config = GenerationConfig(max_new_tokens=asked["tokens"])
        clients = _Clients(scheduler, [Request(prompt, config, print) for prompt in asked["prompts"]], asked["clients"])
        print(json.dumps(vars(clients.run())), flush=True)


class _Clients:
    """Clients of a scheduler in this process: so many at a time until all requests are answered."""

    def __init__(self, scheduler: Scheduler, waiting: list[Request], clients: int) -> None:
        self._scheduler, self._waiting, self._clients = scheduler, waiting, clients
        self._load, self._running = Load(), 0

    def run(self) -> Load:
        start = time.perf_counter()
        while self._waiting or not self._scheduler.idle:
            while self._waiting and self._running < self._clients:
                self._submit()
            self._scheduler.step()
        self._load.wall = time.perf_counter() - start
        return self._load

    def _submit(self) -> None:
        start = last = time.perf_counter()
        load, seen = self._load, 0

        def note(event: Event) -> None:
            nonlocal last, seen
            if isinstance(event, TokenEvent):
                now = time.perf_counter()
                (load.between if seen else load.first).append(now - last)
                last, seen = now, seen + 1
            elif isinstance(event, Finished):
                self._running -= 1
                load.tokens += len(event.result.tokens)
                load.whole.append(last - start)
            else:
                raise RuntimeError(event.message)

        self._scheduler.submit(dataclasses.replace(self._waiting.pop(0), emit=note))
        self._running += 1


@contextlib.contextmanager
def served(engine: Path, venv: Path, threads: int) -> Iterator[int]:
    """`mxcompile serve` on this engine; its process."""
    ports = [part for kind, port in PORTS.items() for part in (f"--{kind}-port", str(port))]
    command = [
        sys.executable,
        "-m",
        "mxcompile",
        "serve",
        str(engine),
        *ports,
        "--threads",
        str(threads),
        "--drain",
        "5",
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            environment = os.environ | {"MXCOMPILE_TRITON_VENV": str(venv)}
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            end = time.monotonic() + START_S
            while "metrics     http" not in log.read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield process.pid
        finally:
            process.terminate()
            process.wait(60)


class ProcessorTime:
    """Processor seconds of the server's processes and of the clients."""

    def __init__(self, server: int, others: dict[str, int]) -> None:
        """`others`: processes of clients by name."""
        main = psutil.Process(server)
        self._processes = {name: psutil.Process(pid) for name, pid in others.items()}
        for process in [main, *main.children(recursive=True)]:
            line = " ".join(process.cmdline())
            self._processes |= {
                role: process for role, mark in ROLES.items() if mark in line and role not in self._processes
            }
        self._processes["client"] = psutil.Process()

    def now(self) -> dict[str, float]:
        """By process."""
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: used.user + used.system for name, used in times.items()}


@dataclass(frozen=True)
class Contestant:
    """A way to the engine. `parts`: whose processor time counts."""

    name: str
    through: Callable[[Prompts, int], Load]  # prompts, clients
    parts: tuple[str, ...]


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    points = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {f"p{p}": round(points[p - 1] * 1000, 3) for p in PERCENTILES}


def spread(values: list[float], digits: int = 3) -> dict[str, Any]:
    """Median and all rounds."""
    return {"median": round(statistics.median(values), digits), "rounds": [round(value, digits) for value in values]}


def summary(loads: list[Load]) -> dict[str, Any]:
    """Of one contestant at one number of clients, over all rounds."""
    return {
        "requests": sum(len(load.whole) for load in loads),
        "tokens_per_s": spread([load.rate for load in loads], 1),
        "time_to_first_token_ms": percentiles([t for load in loads for t in load.first]),
        "inter_token_latency_ms": percentiles([t for load in loads for t in load.between]),
        "request_ms": percentiles([t for load in loads for t in load.whole]),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    source = random.Random(0)
    levels, tokens = sorted(arguments.concurrency), arguments.output_tokens
    most = levels[-1]

    def prompts() -> Prompts:
        """New ones in every round, so that no prefix is known."""
        count = arguments.requests or 2 * most
        lengths = [source.randint(arguments.prompt_tokens // 2, arguments.prompt_tokens) for _ in range(count)]
        return [[source.randrange(3, 500) for _ in range(length)] for length in lengths]

    own = [sys.executable, __file__, arguments.engine, "--alone", "--threads", str(arguments.threads)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(arguments.engine, arguments.triton_venv, arguments.threads))
        alone = Driver(own)
        stack.callback(alone.close)
        grpc = Driver([arguments.triton_venv / "bin" / "python", GRPC_CLIENT, str(PORTS["grpc"])])
        stack.callback(grpc.close)
        serving = ("client", "tritonserver", "stub", "engine")
        contestants = [
            Contestant("engine_alone", lambda some, n: alone.drive(some, tokens, n), ("alone",)),
            Contestant("http", lambda some, n: drive(PORTS["http"], TRITON_HTTP, some, tokens, n), serving),
            Contestant("grpc", lambda some, n: grpc.drive(some, tokens, n), ("grpc_client", *serving[1:])),
            Contestant(
                "openai", lambda some, n: drive(PORTS["openai"], OPENAI, some, tokens, n), (*serving, "openai_front")
            ),
        ]
        for contestant in contestants:  # warm
            contestant.through(prompts()[:most], most)
        clock = ProcessorTime(server, {"alone": alone.pid, "grpc_client": grpc.pid})
        by_level: dict[int, list[Load]] = {level: [] for level in levels}
        by_way: dict[str, list[Load]] = {contestant.name: [] for contestant in contestants}
        used: dict[str, dict[str, list[float]]] = {one.name: {part: [] for part in one.parts} for one in contestants}
        for number in range(arguments.rounds):
            for level in levels[:-1]:
                by_level[level].append(drive(PORTS["http"], TRITON_HTTP, prompts(), tokens, level))
            turn = number % len(contestants)
            for contestant in contestants[turn:] + contestants[:turn]:
                before = clock.now()
                found = contestant.through(prompts(), most)
                after = clock.now()
                by_way[contestant.name].append(found)
                for part, values in used[contestant.name].items():
                    values.append((after[part] - before[part]) / found.tokens * 1e6)
            by_level[most].append(by_way["http"][-1])
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
        prefix = shared_prefix(arguments.shared_prefix, arguments.rounds, source) if arguments.shared_prefix else None
    one_by_one, many = by_level[levels[0]], by_level[most]
    gains = [b.rate / a.rate for a, b in zip(one_by_one, many, strict=True)]
    ways = {}
    for name, loads in by_way.items():
        costs = [1 - load.rate / own.rate for load, own in zip(loads, by_way["engine_alone"], strict=True)]
        processor = {part: round(statistics.median(values), 1) for part, values in used[name].items()}
        ways[name] = summary(loads) | {"cost": spread(costs), "processor_us_per_token": processor}
    return {
        "by_concurrency": [{"clients": level, **summary(loads)} for level, loads in by_level.items()],
        "batching_gain": {"clients": [levels[0], most], **spread(gains, 2)},
        "ways_in": {"clients": most, **ways},
        "shared_prefix": prefix,
    }


def shared_prefix(length: int, rounds: int, source: random.Random) -> dict[str, Any]:
    """First-token times of prompts that share `length` tokens, the first of each round unknown to the server."""
    cold, warm = [], []
    for _ in range(rounds):
        prefix = [source.randrange(3, 500) for _ in range(length)]
        for times in (cold, warm, warm):
            prompt = [*prefix, source.randrange(3, 500), source.randrange(3, 500)]
            times += drive(PORTS["http"], TRITON_HTTP, [prompt], 2, 1).first
    ratio = statistics.median(cold) / statistics.median(warm)
    return {"tokens": length, "cold_ms": percentiles(cold), "warm_ms": percentiles(warm), "ratio": round(ratio, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path, nargs="?", help="an engine directory; or give --preset")
    parser.add_argument("--preset", choices=["tiny", "small"], help="build an engine of random weights for this run")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompt-tokens", type=int, default=64, help="longest prompt; the shortest is half of it")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument(
        "--requests", type=int, help="of each contestant in each round (default: twice the most clients)"
    )
    parser.add_argument("--shared-prefix", type=int, default=0, help="also measure a shared prefix of this many tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=1, help="of the engine; the server and its clients need a core too"
    )
    parser.add_argument("--triton-venv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write an SVG drawing")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        engine_alone(arguments.engine, arguments.threads)
        return
    if (arguments.engine is None) == (arguments.preset is None):
        parser.error("give either an engine directory or --preset")
    arguments.triton_venv = arguments.triton_venv or default_folder()
    install(arguments.triton_venv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.preset is not None:
            arguments.engine = build_preset(arguments, Path(folder))
        report(arguments)


def build_preset(arguments: argparse.Namespace, folder: Path) -> Path:
    """An engine of the preset that holds what this run asks of it."""
    from mxcompile.building import build
    from mxcompile.checkpoints import create_checkpoint

    longest = max(arguments.prompt_tokens + arguments.output_tokens, arguments.shared_prefix + 16)
    create_checkpoint(arguments.preset, folder / "checkpoint", seed=1)
    build(
        folder / "checkpoint", folder / "engine", max_batch_size=max(arguments.concurrency), max_seq_len=longest + 256
    )
    return folder / "engine"


def report(arguments: argparse.Namespace) -> None:
    """Measure, and write what was asked for."""
    config, machine = read_config(arguments.engine), examine()
    names = ("concurrency", "prompt_tokens", "output_tokens", "requests", "rounds", "threads")
    values = {
        "date": date.today().isoformat(),
        "machine": {"cpu": machine.cpu, "cores": machine.cores, "system": machine.system, "python": machine.python}
        | {"load_average_before": os.getloadavg()[0]},  # work of others
        "engine": {"target": config.target, "dtype": config.dtype, "layers": config.num_layers}
        | {
            "hidden_size": config.model.get("hidden_size"),
            "bytes": sum(record.size for record in config.files.values()),
        },
        "settings": {name: getattr(arguments, name) for name in names},
        "versions": {name: machine.libraries.get(name) for name in ("onnxruntime", "numpy")}
        | {"mxcompile": machine.mxcompile, "triton": "2.51.0"},
        **measure(arguments),
    }
    text = json.dumps(values, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    if arguments.plot is not None:
        arguments.plot.write_text(plot(values))


if __name__ == "__main__":
    main()
