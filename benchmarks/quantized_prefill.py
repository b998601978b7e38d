"""From how many tokens on are products per expert faster than the operator for experts, in a model quantized as a whole?

    python benchmarks/quantized_prefill.py --json benchmarks/results/quantized_prefill_small.json

Every engine reads the same prompts with both of its graphs, in turns, with one thread and with all. Reported are medians of milliseconds,
of CPU time (of all threads, spinning included) as well. `engines.onnxruntime.session.QUANTIZED_PREFILL_FROM` is the number of tokens from
which sessions take products; the float32 engine, whose graph is not forced, stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from engines.onnxruntime import session as sessions
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint

FORMS = {"operator": 1 << 62, "products": 1}  # tokens from which products are taken


def measure(session: Any, prompts: list[list[int]], forms: dict[str, int], rounds: int) -> dict[str, dict[str, float]]:
    """Medians by prompt length and form, in turns."""
    state = session.new_state(1)
    taken: dict[str, list[tuple[float, float]]] = {}
    before = sessions.QUANTIZED_PREFILL_FROM
    try:
        for number in range(rounds + 1):
            for prompt in prompts:
                for form, start in forms.items():
                    sessions.QUANTIZED_PREFILL_FROM = start
                    state.clear_row(0)
                    wall, cpu = time.perf_counter(), time.process_time()
                    session.prefill([prompt], state)
                    found = (time.perf_counter() - wall, time.process_time() - cpu)
                    if number:  # the first round warms up
                        taken.setdefault(f"{len(prompt)} {form}", []).append(found)
    finally:
        sessions.QUANTIZED_PREFILL_FROM = before
    names = ("milliseconds", "cpu_milliseconds")
    return {
        key: {
            name: round(1e3 * statistics.median(column), 3)
            for name, column in zip(names, zip(*pairs, strict=True), strict=True)
        }
        for key, pairs in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[32, 64, 128, 192, 256, 384, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        create_checkpoint(options.preset, Path(scratch) / "checkpoint", seed=0)
        for kind in (None, "int8", "int4"):
            folder = Path(scratch) / str(kind)
            build(Path(scratch) / "checkpoint", folder, quantize=kind, max_seq_len=max(options.prompt_lengths))
            for threads in options.threads:
                session = sessions.load(folder, threads=threads)
                prompts = [random.integers(0, session.vocab_size, length).tolist() for length in options.prompt_lengths]
                found = measure(session, prompts, FORMS if kind else {"float32": 0}, options.rounds)
                results.setdefault(kind or "float32", {})[f"threads {threads}"] = found
                for name, numbers in found.items():
                    print(f"{kind or 'float32'}, threads {threads}, {name}: {numbers}", flush=True)
    report = {
        "benchmark": "quantized_prefill",
        "date": date.today().isoformat(),
        "preset": options.preset,
        "machine": {"system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"onnxruntime": version("onnxruntime")},
        "rounds": options.rounds,
        "results": results,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
