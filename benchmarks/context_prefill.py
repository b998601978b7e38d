"""Does a prompt that ranks share get its first token sooner? Context parallelism beside other ways to use the same cores.

    python benchmarks/context_prefill.py --json benchmarks/results/context_prefill_small.json

Contestants have the same number of threads in all: one rank with all of them, ranks with one each that share every prompt's tokens
(--cp-size), and as many ranks that share the model (--tp-size). All are loaded and take turns prompt by prompt; before they are timed, each
prompt's logits must agree with the first contestant's. Reported are medians of seconds, and how many times faster than one rank each is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from engines import load
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint

TOLERANCE = 2e-4  # of logits in fp32 over sums in another order, as everywhere


def contestants(ranks: int) -> dict[str, dict[str, int]]:
    """Options of `build` by name."""
    return {"one rank": {}, f"cp {ranks}": {"cp_size": ranks}, f"tp {ranks}": {"tp_size": ranks}}


def measure(sessions: dict[str, Any], prompt: list[int], rounds: int) -> dict[str, float]:
    """Median seconds until the logits behind `prompt` are there, by contestant."""
    states = {name: session.new_state(1) for name, session in sessions.items()}
    logits = {name: session.prefill([prompt], states[name])[0] for name, session in sessions.items()}
    first, *others = logits
    for name in others:
        difference = float(np.abs(logits[name] - logits[first]).max())
        if difference >= TOLERANCE:
            raise SystemExit(f"{name} differs by {difference:.2g} from {first} at {len(prompt)} tokens")
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            states[name].clear_row(0)
            start = time.perf_counter()
            session.prefill([prompt], states[name])
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error("--ranks must be at least 2: there is nothing to share otherwise")
    result: dict[str, Any] = {
        "benchmark": "context_prefill",
        "date": date.today().isoformat(),
        "preset": options.preset,
        "machine": {"cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {name: version(name) for name in ("numpy", "onnxruntime", "mpi4py", "openmpi")},
        "threads": options.ranks,
        "rounds": options.rounds,
        "load_before": os.getloadavg(),
        "prompts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        create_checkpoint(options.preset, checkpoint, seed=0, dtype="float32")
        sessions: dict[str, Any] = {}
        try:
            for name, sizes in contestants(options.ranks).items():
                engine = Path(folder) / name.replace(" ", "-")
                build(checkpoint, engine, max_batch_size=1, max_seq_len=max(options.lengths), **sizes)  # type: ignore[arg-type]
                sessions[name] = load(engine, threads=options.ranks)
            random = np.random.default_rng(0)
            for length in options.lengths:
                prompt = random.integers(0, sessions["one rank"].vocab_size, length).tolist()
                seconds = measure(sessions, prompt, options.rounds)
                one = seconds["one rank"]
                result["prompts"][str(length)] = {
                    name: {"seconds": taken, "times_faster_than_one_rank": one / taken}
                    for name, taken in seconds.items()
                }
                ratios = ", ".join(f"{name} {one / taken:.2f}" for name, taken in seconds.items())
                print(f"{length} tokens: {ratios}", file=sys.stderr, flush=True)
        finally:
            for session in sessions.values():
                getattr(session, "close", lambda: None)()
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
