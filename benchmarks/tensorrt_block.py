"""Time and memory of building one block pair of MiniMax-Text-01's real width for TensorRT-RTX; needs no GPU.

    python benchmarks/tensorrt_block.py --json benchmarks/results/tensorrt_block.json

One lightning and one softmax layer (hidden 6144, 64 heads, 32 experts of 9216) with a small vocabulary, each case in a fresh process:

    16-bit   the weights are inputs of the plan that nothing is bound to: their 22 GB are never made
    int8     as `mxcompile build --strip-weights --quantize-experts int8` does: every expert is quantized and written, 11 GB on the disk
             for as long as it takes. All experts are one random matrix per shape instead of a checkpoint's; all other weights lie in a
             file of zeros that stands for the checkpoint, where they stay.

Peak memory is the most resident memory of the process, mapped files included. Needs the extras `build` and `tensorrt-rtx` and the plugin
library.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from engines.config import Checkpoint
from engines.directory import EngineDirWriter
from engines.tensorrt.build import BuildRequest, build_rank, compile_plan, load_runtime, lower_graph, weights_to_inputs
from engines.tensorrt.gpus import find_gpu
from export.weights import bind_weights
from model_defs.checkpoint.names import expected_tensors
from model_defs.config import ModelConfig
from model_defs.presets import preset
from mxcompile.exporting import graph, peak_memory
from mxcompile.quantized import quantize

TARGET = "tensorrt-rtx"


class Stages:
    """A build's progress callback that keeps when each stage began."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {"trace": time.perf_counter()}

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.began.setdefault(stage, time.perf_counter())
        if stage == "lower" and done == total:  # binding reports first when it has made a weight
            self.began["bind weights"] = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Of each stage until the next; the last one's until now."""
        ends = [*list(self.began.values())[1:], time.perf_counter()]
        return {name: round(end - at, 1) for (name, at), end in zip(self.began.items(), ends, strict=True)}


class StandIn:
    """A source of weights as `export.weights` wants it: experts on demand, everything else in a file of zeros."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        file = folder / "zeros.safetensors"
        shapes = expected_tensors(config)
        with file.open("wb") as made:
            made.truncate(max(2 * math.prod(shape) for shape in shapes.values()))
        self.entries = {
            name: SimpleNamespace(file=file, offset=0, nbytes=2 * math.prod(shape), dtype="BF16", shape=shape)
            for name, shape in shapes.items()
        }
        self._matrices: dict[tuple[int, ...], np.ndarray] = {}

    def array(self, name: str) -> np.ndarray:
        shape = self.entries[name].shape
        if shape not in self._matrices:
            values = np.random.default_rng(0).standard_normal(shape, np.float32) / math.sqrt(shape[-1])
            self._matrices[shape] = values.astype(ml_dtypes.bfloat16)
        return self._matrices[shape]


def unbound(config: ModelConfig, request: BuildRequest) -> dict[str, Any]:
    """Compile with weights that are inputs of the plan and nothing else."""
    stages = Stages()
    trt, _ = load_runtime(TARGET, None)
    model = graph(config, request.dtype)
    weights = [name for name, value in model.graph.initializers.items() if value.const_value is None]
    nbytes = sum(2 * math.prod(int(dim) for dim in model.graph.initializers[name].shape or ()) for name in weights)
    lower_graph(model, request, stages)
    weights_to_inputs(model, weights)
    compiled = compile_plan(trt, model, {}, request, len, stages)
    return _result(stages, nbytes, compiled)


def int8(config: ModelConfig, request: BuildRequest, scratch: Path) -> dict[str, Any]:
    """Quantize the experts, write them, compile, and throw all of it away."""
    stages = Stages()
    model = graph(config, request.dtype)
    zeros = scratch / "checkpoint"
    zeros.mkdir()
    bind_weights(model, config, StandIn(config, zeros))
    error = quantize(model, {"experts": "int8"})
    request = dataclasses.replace(
        request, quantization={"experts": "int8"}, checkpoint=Checkpoint(str(zeros), "none"), strip_weights=True
    )
    with EngineDirWriter(scratch / "engine") as writer:
        config_found, compiled = build_rank(model, writer, request, stages)
        written = writer.record(f"rank{config_found.ranks[0].rank}.weights.bin").size
    return _result(stages, written, compiled) | {"relative_weight_error": error.described()["relative_weight_error"]}


def _result(stages: Stages, weight_bytes: int, compiled: Any) -> dict[str, Any]:
    return {
        "seconds": stages.seconds(),
        "peak_rss_bytes": peak_memory(),
        "weight_bytes": weight_bytes,
        "plan_bytes": compiled.size,
        "plugins": dict(Counter(layer["plugin"] for layer in compiled.layers if layer["plugin"])),
        "activation_bytes": compiled.memory["activations"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--gpu", default=None)
    parser.add_argument("--max-batch-size", type=int, default=4)
    parser.add_argument("--max-seq-len", type=int, default=131072)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--only", choices=("16-bit", "int8"))
    parser.add_argument(
        "--scratch", type=Path, help="folder with 12 GB of room for int8; default: the system's for temporary files"
    )
    parser.add_argument("--note", help="kept beside the numbers, such as what else the machine did")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = dataclasses.replace(preset("text-01"), layer_kinds=("lightning", "softmax"), vocab_size=options.vocabulary)
    request = BuildRequest(
        model=config.to_dict(),
        target=TARGET,
        gpu=find_gpu(options.gpu, TARGET),
        max_batch_size=options.max_batch_size,
        max_seq_len=options.max_seq_len,
        dtype=options.dtype,
        strip_weights=True,
    )
    if options.child:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            found = unbound(config, request) if options.only == "16-bit" else int8(config, request, Path(scratch))
        print(json.dumps(found))
        return
    cases = {}
    for case in [options.only] if options.only else ["16-bit", "int8"]:
        command = [sys.executable, "-m", "benchmarks.tensorrt_block", *sys.argv[1:], "--child", "--only", case]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        cases[case] = json.loads(done.stdout.splitlines()[-1])
    result = {
        "benchmark": "tensorrt_block",
        "date": date.today().isoformat(),
        "note": options.note,
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {name: version(name) for name in ("tensorrt-rtx-cu13", "torch", "onnx", "onnx-ir", "numpy")},
        "gpu": request.gpu.name,
        "dtype": request.dtype,
        "attention": request.attention,
        "capacity": request.capacity,
        "max_batch_size": request.max_batch_size,
        "prefill_chunk": request.chunk,
        "cases": cases,
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
