"""Does a decode step of the lightning layers take longer behind a long context? It must not: their state has a fixed size.

    python benchmarks/lightning_context.py --json benchmarks/results/lightning_context_small.json

One engine, one state per context length, filled with random memories of that length (what they hold does not change the time). The lengths
take turns step by step, and ONNX Runtime's own profile says what each kind of layer took in each step. Reported are medians; the softmax
layers, whose cache does grow, stand beside for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

import mxcompile
from engines.directory import read_config
from engines.interface import RowSnapshot
from engines.weights import map_weights
from model_defs.checkpoint.create import create_checkpoint
from model_defs.config import ModelConfig
from model_defs.presets import preset
from mxcompile.bench.layer_times import KINDS, ProfiledSession, node_kinds, runs, seconds_by_kind


def random_memories(config: ModelConfig, length: int, random: np.random.Generator) -> RowSnapshot:
    """A row that looks as if it had seen `length` tokens."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    return RowSnapshot(
        length=length,
        recurrent={layer: draw(heads, width, width) for layer in config.lightning_layers},
        key={layer: draw(groups, length, width) for layer in config.softmax_layers},
        value={layer: draw(groups, length, width) for layer in config.softmax_layers},
    )


def measure(
    engine: Path, config: ModelConfig, lengths: list[int], steps: int, warmup: int, threads: int
) -> dict[str, dict[str, float]]:
    """Median seconds of one decode step by kind of layer, by context length."""
    engine_config = read_config(engine)
    files = engine_config.ranks[0]
    assert files.weights is not None
    session = ProfiledSession(
        engine_config, engine / files.graph, None, map_weights(engine, engine_config, files.weights), threads=threads
    )
    random = np.random.default_rng(0)
    states = []
    for length in lengths:
        state = session.new_state(1)
        state.write_row(0, random_memories(config, length, random))
        states.append(state)
    for _ in range(warmup + steps):
        for state in states:
            session.decode([int(random.integers(config.vocab_size))], state)
    _, events = session.take_profiles()
    kinds = node_kinds(engine_config, engine / files.graph)
    by_run = [seconds_by_kind(run, kinds) for run in runs(events)][warmup * len(lengths) :]
    return {
        str(length): {kind: statistics.median(run[kind] for run in by_run[index :: len(lengths)]) for kind in KINDS}
        for index, length in enumerate(lengths)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = preset(options.preset)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, engine = Path(folder) / "checkpoint", Path(folder) / "engine"
        create_checkpoint(config, checkpoint, seed=0)
        longest = max(options.lengths) + options.steps + options.warmup
        mxcompile.build(checkpoint, engine, max_seq_len=longest, max_batch_size=1)
        seconds = measure(engine, config, options.lengths, options.steps, options.warmup, options.threads)
    lightning = [by_kind["lightning"] for by_kind in seconds.values()]
    report = {
        "benchmark": "lightning_context",
        "date": date.today().isoformat(),
        "preset": options.preset,
        "machine": {"system": platform.platform(), "threads": options.threads},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
        "steps": options.steps,
        "median_seconds_per_step": seconds,
        "lightning_longest_over_shortest_context": round(lightning[-1] / lightning[0], 3),
        "lightning_max_over_min": round(max(lightning) / min(lightning), 3),
    }
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
