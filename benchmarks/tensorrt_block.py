"""Time and memory of building one block pair of MiniMax-Text-01's real width for TensorRT-RTX, without weights.

    python benchmarks/tensorrt_block.py --dtype bfloat16

One lightning and one softmax layer (hidden 6144, 64 heads, 32 experts of 9216) with a small vocabulary. The weights are inputs of the
plan that nothing is bound to: their 22 GB are never made. Prints one line of JSON. Needs the extras `build` and `tensorrt-rtx` and the
plugin library; no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from collections import Counter

from engines.tensorrt.build import BuildRequest, compile_plan, load_runtime, lower_graph, weights_to_inputs
from engines.tensorrt.gpus import find_gpu
from model_defs.presets import preset
from mxcompile.exporting import graph

TARGET = "tensorrt-rtx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--gpu", default=None)
    parser.add_argument("--max-batch-size", type=int, default=4)
    parser.add_argument("--max-seq-len", type=int, default=131072)
    parser.add_argument("--vocabulary", type=int, default=1024)
    options = parser.parse_args()
    config = dataclasses.replace(preset("text-01"), layer_kinds=("lightning", "softmax"), vocab_size=options.vocabulary)
    trt, _ = load_runtime(TARGET, None)
    started = time.perf_counter()
    model = graph(config, options.dtype)
    traced = time.perf_counter()
    before = _peak()
    weights = [name for name, value in model.graph.initializers.items() if value.const_value is None]
    shapes = [model.graph.initializers[name] for name in weights]
    weight_bytes = sum(_count(value.shape) * 2 for value in shapes)
    request = BuildRequest(
        model=config.to_dict(),
        target=TARGET,
        gpu=find_gpu(options.gpu, TARGET),
        max_batch_size=options.max_batch_size,
        max_seq_len=options.max_seq_len,
        dtype=options.dtype,
        strip_weights=True,
    )

    def quiet(stage: str, done: int, total: int) -> None:
        """No one watches."""

    lower_graph(model, request, quiet)
    weights_to_inputs(model, weights)
    compiled = compile_plan(trt, model, {}, request, len, quiet)
    built = time.perf_counter()
    plugins = Counter(layer["plugin"] for layer in compiled.layers if layer["plugin"])
    print(
        json.dumps(
            {
                "tensorrt_rtx": trt.__version__,
                "gpu": request.gpu.name,
                "dtype": options.dtype,
                "attention": request.attention,
                "capacity": request.capacity,
                "weight_gib": round(weight_bytes / 2**30, 2),
                "plan_mib": round(compiled.size / 2**20, 1),
                "plugins": dict(plugins),
                "trace_s": round(traced - started, 1),
                "build_s": round(built - traced, 1),
                "peak_mib_after_trace": before // 2**20,
                "peak_mib": _peak() // 2**20,
            }
        )
    )


def _count(shape: object) -> int:
    count = 1
    for dim in shape:  # type: ignore[attr-defined]
        count *= int(dim)
    return count


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
