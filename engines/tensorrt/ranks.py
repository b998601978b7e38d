"""Build a TensorRT engine of several ranks: a plan per rank, the collectives inside it.

The parser makes a DistCollective layer of each exchange, and the plan calls NCCL at run time with the communicator of its execution
context. So a step stays one plan: cutting the graph at its exchanges would give TensorRT three small plans per layer to launch, and an
exchange plugin of our own would do what the layer does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from engines.config import EngineConfig
from engines.directory import EngineFiles
from engines.errors import EngineError
from engines.parallel.heads import of_all_ranks
from engines.placing import Progress
from engines.tensorrt import build
from engines.tensorrt.build import BuildRequest, CompiledPlan

COLLECTIVE = "DistCollective"


@dataclass(frozen=True)
class BuiltRank:
    """One rank's configuration, and name and shape of every exchange of its plan in order."""

    config: EngineConfig
    exchanges: list[list[str]]


def build_rank(
    model: ir.Model,
    writer: EngineFiles,
    request: BuildRequest,
    progress: Progress | None = None,
    plugin_folder: Path | None = None,
) -> BuiltRank:
    """Write the files of the one rank that `request` names. Ranks may be built in any order, and in processes of their own.

    Args:
        model: the rank's canonical graph with its collectives and bound weights.

    Raises EngineError as `engines.tensorrt.build.build` does, and where TensorRT lost an exchange.
    """
    wanted = sum(node.op_type == COLLECTIVE for node in model.graph)
    config, compiled = build.build_rank(model, writer, request, progress, plugin_folder)
    found = exchanges(compiled)
    if len(found) != wanted:
        raise EngineError(f"TensorRT made {len(found)} exchanges of {wanted}; the rank would compute nonsense")
    return BuiltRank(replace(config, options=config.options | {"parallel_build": _build_id(request)}), found)


def together(ranks: Sequence[BuiltRank]) -> EngineConfig:
    """The configuration of the whole engine from its ranks, in order. EngineError where they exchange different things."""
    for rank, one in enumerate(ranks):
        if one.exchanges != ranks[0].exchanges:
            raise EngineError(f"rank {rank} exchanges other values than rank 0; the ranks would wait for ever")
    memory = [entry for one in ranks for entry in one.config.options["memory"]]
    whole = of_all_ranks(ranks[-1].config, [files for one in ranks for files in one.config.ranks])
    return replace(whole, options=whole.options | {"memory": memory})


def exchanges(compiled: CompiledPlan) -> list[list[str]]:
    """Name and shape of every exchange of a plan, in order; all ranks must have the same."""
    return [
        [str(layer["name"]), str(layer["outputs"])] for layer in compiled.layers if layer["type"] == "DIST_COLLECTIVE"
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
