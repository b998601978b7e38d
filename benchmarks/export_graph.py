"""Time and memory of writing a full-size canonical graph, or all ranks' graphs, from the configuration alone, in a fresh process.

python benchmarks/export_graph.py --preset text-01 --json benchmarks/results/export_text-01.json
python benchmarks/export_graph.py --preset text-01 --tp-size 8 --moe-ep-size 8 --json benchmarks/results/export_text-01_tp8_ep8.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path


def export_once(preset_name: str, dtype: str, tp_size: int, moe_ep_size: int) -> dict[str, object]:
    """Runs in the child: imports, traces, cuts, verifies and writes; imports count."""
    start = time.perf_counter()
    from export.parallel.mapping import ParallelMapping
    from export.parallel.plan import ShardingPlan
    from export.parallel.save import save_ranks
    from export.save import save_graph
    from export.trace import trace_model
    from model_defs.presets import preset
    from mxcompile.exporting import peak_memory

    plan = ShardingPlan(preset(preset_name), ParallelMapping.of(tp_size, moe_ep_size=moe_ep_size))
    model = trace_model(plan.config, dtype)
    traced = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        saved = (
            save_ranks(model, plan, Path(folder)) if tp_size > 1 else [save_graph(model, Path(folder) / "model.onnx")]
        )
    return {
        "trace_seconds": round(traced - start, 2),
        "total_seconds": round(time.perf_counter() - start, 2),
        "peak_rss_bytes": peak_memory(),
        "nodes": len(model.graph),
        "graphs": len(saved),
        "graph_bytes": sum(one.graph_bytes for one in saved),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="text-01")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--moe-ep-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(export_once(options.preset, options.dtype, options.tp_size, options.moe_ep_size)))
        return
    command = [sys.executable, __file__, "--child", "--preset", options.preset, "--dtype", options.dtype]
    command += ["--tp-size", str(options.tp_size), "--moe-ep-size", str(options.moe_ep_size)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(options.repeats)
    ]
    result = {
        "benchmark": "export_graph",
        "date": date.today().isoformat(),
        "preset": options.preset,
        "dtype": options.dtype,
        "tp_size": options.tp_size,
        "moe_ep_size": options.moe_ep_size,
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")},
        "runs": runs,
    }
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
