"""Build a TensorRT engine of several ranks: a plan per rank, the collectives inside it.

The parser makes a DistCollective layer of each exchange, and the plan calls NCCL at run time with the communicator of its execution
context. So a step stays one plan: cutting the graph at its exchanges would give TensorRT three small plans per layer to launch, and an
exchange plugin of our own would do what the layer does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from engines.config import EngineConfig, RankFiles
from engines.directory import EngineDirWriter
from engines.errors import EngineError
from engines.parallel.heads import of_all_ranks
from engines.placing import Progress
from engines.tensorrt.build import BuildRequest, CompiledPlan, build_rank

COLLECTIVE = "DistCollective"


def build_ranks(
    graph_of: Callable[[int], ir.Model],
    writer: EngineDirWriter,
    request: BuildRequest,
    progress: Progress | None = None,
    plugin_folder: Path | None = None,
) -> EngineConfig:
    """Write the files of all ranks with `writer`, one rank in memory at a time; commit the directory yourself.

    Args:
        graph_of: makes a rank's canonical graph with its collectives and bound weights.
        request: `request.mapping` says how many ranks there are.

    Raises EngineError as `engines.tensorrt.build.build` does, and where TensorRT lost an exchange or ranks have different ones.
    """
    ranks, config = request.mapping.tp_size, None
    files: list[RankFiles] = []
    memory: list[Any] = []
    first: list[tuple[str, str]] = []
    for rank in range(ranks):
        model = graph_of(rank)
        wanted = sum(node.op_type == COLLECTIVE for node in model.graph)
        config, compiled = build_rank(model, writer, replace(request, rank=rank), progress, plugin_folder)
        found = exchanges(compiled)
        if len(found) != wanted:
            raise EngineError(
                f"rank {rank}: TensorRT made {len(found)} exchanges of {wanted}; it would compute nonsense"
            )
        first = found if rank == 0 else first
        if found != first:
            raise EngineError(f"rank {rank} exchanges other values than rank 0; the ranks would wait for ever")
        files += config.ranks
        memory += config.options["memory"]
    assert config is not None
    whole = of_all_ranks(config, files)
    return replace(whole, options=whole.options | {"parallel_build": _build_id(request), "memory": memory})


def exchanges(compiled: CompiledPlan) -> list[tuple[str, str]]:
    """Name and shape of every exchange of a plan, in order; all ranks must have the same."""
    return [
        (str(layer["name"]), str(layer["outputs"])) for layer in compiled.layers if layer["type"] == "DIST_COLLECTIVE"
    ]


def _build_id(request: BuildRequest) -> str:
    """Tells the plans of one build from those of another."""
    facts = (
        request.model,
        request.checkpoint,
        request.dtype,
        request.quantization,
        request.mapping,
        request.gpu,
        request.versions,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()
