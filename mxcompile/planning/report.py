"""A whole plan as plain values: what `mxcompile plan --json` prints and what its tables are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from export.errors import ExportError
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from model_defs.config import ModelConfig
from mxcompile.planning import memory, roofline
from mxcompile.planning.gpus import Gpu

DECODE_CONTEXTS = (4096, 131072, 1048576)
DECODE_BATCHES = (1, 32, 128)
CPU_WEIGHTS = {"fp32": None, "--quantize int8": "int8", "--quantize int4": "int4"}


def plan_report(
    config: ModelConfig,
    mapping: ParallelMapping,
    gpus: Sequence[Gpu],
    schemes: Sequence[memory.WeightScheme],
    contexts: Sequence[int],
    *,
    batch: int = 1,
    cache_bytes: int = 2,
    chunk: int = 4096,
) -> dict[str, Any]:
    """Parameters, bytes per rank, fits and rooflines. Raises ExportError for sizes that cannot be."""
    plan = ShardingPlan(config, mapping)
    return {
        "model": {
            "family": config.family,
            "layers": config.num_layers,
            "lightning_layers": len(config.lightning_layers),
            "softmax_layers": len(config.softmax_layers),
        },
        "mapping": {
            "tp_size": mapping.tp_size,
            "moe_tp_size": mapping.moe_tp_size,
            "moe_ep_size": mapping.moe_ep_size,
            "cp_size": mapping.cp_size,
        },
        "parameters": _parameters(plan),
        "collectives": [
            {
                "after": item.after,
                "operation": item.operation,
                "elements_per_token": item.elements_per_token,
                "fp32": item.fp32,
                "count": item.count,
            }
            for item in plan.collectives()
        ],
        "segment_exchanges": [
            {
                "of": item.of,
                "operation": item.operation,
                "elements_per_sequence": item.elements_per_sequence,
                "elements_per_token": item.elements_per_token,
                "fp32": item.fp32,
                "count": item.count,
                "bytes_received_per_chunk": roofline.segment_bytes(plan, chunk, cache_bytes)[item.of],
            }
            for item in plan.segment_exchanges()
        ],
        "per_rank": {
            "state_bytes_per_sequence": plan.state_elements_per_sequence() * memory.STATE_BYTES,
            "cache_bytes_per_token": plan.cache_elements_per_token() * cache_bytes,
            "cpu_weight_bytes": {name: _cpu_weight_bytes(plan, kind) for name, kind in CPU_WEIGHTS.items()},
            "weight_bytes": {scheme.key: memory.weight_bytes(plan, scheme, 0) for scheme in schemes},
        },
        "fits": [
            _fit(plan, memory.Demand(scheme, context, batch, cache_bytes, chunk), gpu)
            for gpu in gpus
            for scheme in schemes
            for context in contexts
        ],
        "prefill": [_prefill(plan, gpu, context, chunk) for gpu in gpus for context in contexts],
        "decode": [
            _decode(plan, gpu, scheme, size, context, cache_bytes)
            for gpu in gpus
            for scheme in schemes
            for context in DECODE_CONTEXTS
            for size in DECODE_BATCHES
            if memory.fit(plan, memory.Demand(scheme, context, size, cache_bytes, chunk), gpu).fits
        ],
        "assumptions": [*memory.ASSUMPTIONS, *roofline.ASSUMPTIONS],
    }


def _cpu_weight_bytes(plan: ShardingPlan, quantize: str | None) -> int | str:
    """Of a rank, or why there is no such engine."""
    try:
        return memory.cpu_weight_bytes(plan, quantize, 0)
    except ExportError as error:
        return str(error)


def _parameters(plan: ShardingPlan) -> dict[str, Any]:
    ranks = plan.mapping.ranks
    total = sum(plan.config.parameter_counts().values())
    per_rank = [sum(plan.rank_parameters(rank).values()) for rank in ranks]
    # What several ranks hold alike, counted once: the rest of the sum over ranks is copies.
    copies = sum(
        (plan.copies(name) - 1) * plan.part(name, rank).size / plan.copies(name)
        for name in plan.shapes
        if plan.copies(name) > 1
        for rank in ranks
    )
    return {"total": total, "per_rank": per_rank, "copies": round(copies)}


def _fit(plan: ShardingPlan, demand: memory.Demand, gpu: Gpu) -> dict[str, Any]:
    found = memory.fit(plan, demand, gpu)
    return {
        "gpu": gpu.key,
        "scheme": demand.scheme.key,
        "context": demand.context,
        "batch": demand.batch,
        "weights": found.memory.weights,
        "state": found.memory.state,
        "cache": found.memory.cache,
        "workspace": found.memory.workspace,
        "data": found.memory.data,
        "budget": found.budget,
        "fits": found.fits,
        "longest_context": found.longest_context,
        "reason": found.reason,
    }


def _prefill(plan: ShardingPlan, gpu: Gpu, context: int, chunk: int) -> dict[str, Any]:
    found = roofline.prefill(plan, gpu, context, chunk)
    return {
        "gpu": gpu.key,
        "context": context,
        "flops": found.flops,
        "softmax_share": found.softmax_share,
        "seconds": found.seconds,
        "seconds_at_75_percent": found.at(0.75),
        "exchange_seconds": found.exchange_seconds,
    }


def _decode(
    plan: ShardingPlan, gpu: Gpu, scheme: memory.WeightScheme, batch: int, context: int, cache_bytes: int
) -> dict[str, Any]:
    found = roofline.decode(plan, gpu, scheme, batch, context, cache_bytes)
    return {
        "gpu": gpu.key,
        "scheme": scheme.key,
        "batch": batch,
        "context": context,
        "memory_seconds": found.memory_seconds,
        "compute_seconds": found.compute_seconds,
        "seconds": found.seconds,
        "tokens_per_second": found.tokens_per_second,
        "bound": found.bound,
        "experts_touched": found.experts_touched,
    }
