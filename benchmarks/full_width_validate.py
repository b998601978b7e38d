"""An engine of MiniMax-Text-01's real width held against PyTorch on a machine whose memory does not hold the weights in fp32.

    python -m benchmarks.full_width_validate --experts 4 --json benchmarks/results/full_width_validate.json

A checkpoint with random weights: one lightning and one softmax layer of the published shapes (hidden 6144, 64 heads of 128, 32 experts of
9216; 22.5 GB in bf16) and a small vocabulary. On it run `build --quantize` and `validate --quick --stream-weights`, each as a process of
its own; what they took is told as in `benchmarks/full_size_build.py`. The folder
needs 23 GB for the checkpoint and 6 (int4) or 12 GB (int8)
for the engine; with 4 experts, 3.5 and 1. A validation that fails, fails the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.full_size_build import run, write
from model_defs.checkpoint.create import create_checkpoint
from model_defs.presets import preset
from mxcompile.validation.results import ValidationReport


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Checkpoint, engine, verdict."""
    config = dataclasses.replace(
        preset("text-01"),
        layer_kinds=("lightning", "softmax"),
        slope_layers=2,
        bos_token_id=None,
        eos_token_id=None,
        vocab_size=options.vocabulary,
        num_local_experts=options.experts,
    )
    checkpoint, engine = folder / "checkpoint", folder / "engine"
    started = time.perf_counter()
    made = create_checkpoint(config, checkpoint, with_tokenizer=False)
    result: dict[str, Any] = {
        "checkpoint": {"weight_bytes": made.total_bytes, "seconds": round(time.perf_counter() - started, 1)},
        "commands": {},
    }
    print(f"{result['checkpoint']['seconds']:8.1f} s  checkpoint", file=sys.stderr)
    limits = ["--max-seq-len", "512", "--max-batch-size", "6"]
    build = ["build", str(checkpoint), "-o", str(engine), "--quantize", options.quantize, *limits, "--json"]
    result["commands"]["build"], _ = run(build, folder)
    validate = ["validate", str(engine), "--against", str(checkpoint), "--quick", "--stream-weights", "--json", "-"]
    result["commands"]["validate"], printed = run(validate, folder)
    report = ValidationReport.from_dict(json.loads(printed))
    result["verdict"], result["logit_scale"] = report.verdict, round(report.logit_scale, 2)
    for check in report.checks:
        worst = max(check.measures, key=lambda measure: measure.strain)
        kept = result.setdefault("worst", {}).get(check.group)
        if kept is None or worst.strain > kept["share_of_limit"]:
            result["worst"][check.group] = {"value": worst.value, "limit": worst.limit, "share_of_limit": worst.strain}
    result["greedy_tokens_equal"] = [sum(run.agreed) for run in report.greedy]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", choices=("int4", "int8"), default="int4")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--scratch", type=Path, help="folder with the room; default: the system's for temporary files")
    parser.add_argument("--note", help="kept beside the numbers, such as what else the machine did")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mxcompile-full-width-", dir=options.scratch))
    try:
        result = measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = {"benchmark": "full_width_validate", "quantize": options.quantize, "experts": options.experts}
    write(options, ("onnxruntime", "torch", "onnx", "onnx-ir", "numpy"), about | result)


if __name__ == "__main__":
    main()
