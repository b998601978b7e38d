"""What this machine can do at best: copy bandwidth and fp32 matrix products, measured with the contestants' number of threads.

Runs in a process of its own, whose BLAS reads its thread count from the environment. The best of several tries counts: these are
upper bounds that everything else is compared with.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

COPY_BYTES = 256 * 2**20  # of one array: far above the caches
MATMUL_SIZE = 1536
TRIES = 5


def measure(
    threads: int, *, copy_bytes: int = COPY_BYTES, size: int = MATMUL_SIZE, tries: int = TRIES
) -> dict[str, Any]:
    """copy_bytes_per_s counts bytes read and bytes written; matmul_flops_per_s two operations for each multiplication and addition."""
    source = np.ones(copy_bytes // 8)
    target = np.zeros_like(source)
    parts = np.array_split(np.arange(len(source)), threads)
    cuts = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
    left = np.random.default_rng(0).standard_normal((size, size), np.float32)
    product = left @ left  # starts the library's threads
    copies, products = [], []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(tries):
            start = time.perf_counter()
            list(pool.map(lambda cut: np.copyto(target[cut], source[cut]), cuts))
            copies.append(time.perf_counter() - start)
            start = time.perf_counter()
            np.matmul(left, left, out=product)
            products.append(time.perf_counter() - start)
    return {"copy_bytes_per_s": 2 * source.nbytes / min(copies), "matmul_flops_per_s": 2 * size**3 / min(products)}


def bound(
    model: dict[str, Any], element: int, rates: dict[str, float], length: int, batch: int, new_tokens: int
) -> dict[str, float]:
    """Least seconds of reading the prompts and of one decode step at these rates: bytes at the copy rate or arithmetic at the
    matmul rate, whichever is longer. Uniform routing decides how many experts are read.

    Keys: prefill_s, decode_s.
    """
    from fractions import Fraction

    from export.parallel.mapping import ParallelMapping
    from export.parallel.plan import ShardingPlan
    from model_defs.config import ModelConfig
    from mxcompile.planning import roofline
    from mxcompile.planning.gpus import Gpu
    from mxcompile.planning.memory import WeightScheme

    config = ModelConfig.from_dict(model)
    plan = ShardingPlan(config, ParallelMapping(1, 1, 1))
    bandwidth, rate = rates["copy_bytes_per_s"], rates["matmul_flops_per_s"]
    here = Gpu("here", "this machine", 0.0, bandwidth, rate, 1.0)
    size = Fraction(element)
    scheme = WeightScheme("here", "this engine", size, size, size)
    decode = roofline.decode(plan, here, scheme, batch, length + new_tokens // 2, element)
    arithmetic = batch * roofline.prefill(plan, here, length).seconds
    touched = roofline.touched_experts(config, batch * length) / config.num_local_experts
    weights = sum(
        count * (touched if ".fc1." in name or ".fc2." in name else 1.0) * element
        for name, count in plan.rank_parameters(0).items()
        if name != "embed_tokens.weight"
    )
    return {"prefill_s": max(arithmetic, weights / bandwidth), "decode_s": decode.seconds}
