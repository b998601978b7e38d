"""Build an engine of several ranks for CPUs: each rank's graph lowered, its weights placed, and the graph cut into pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from engines.config import EngineConfig, Mapping, StateTensor
from engines.directory import EngineDirWriter
from engines.onnxruntime.build import BuildRequest, build
from engines.parallel.cut import cut
from engines.parallel.pieces import PieceFile, pieces_name, to_bytes
from engines.placing import Progress


def build_ranks(
    graph_of: Callable[[int], ir.Model],
    writer: EngineDirWriter,
    request: BuildRequest,
    progress: Progress | None = None,
) -> EngineConfig:
    """Write the files of all ranks with `writer`, one rank in memory at a time; commit the directory yourself.

    Args:
        graph_of: makes a rank's canonical graph with its collectives and bound weights.
        request: `request.mapping` says how many ranks there are.

    Raises EngineError as `engines.onnxruntime.build.build` does.
    """
    report = progress or (lambda stage, done, total: None)
    ranks, build_id = request.mapping.tp_size, _build_id(request, request.mapping)
    files, config = [], None
    for rank in range(ranks):
        model = graph_of(rank)
        config = build(model, writer, replace(request, rank=rank, prefill_graph=False), progress)
        report("cut", rank, ranks)
        pieces, models = cut(ir.to_proto(model))
        writer.write(pieces_name(rank), to_bytes(PieceFile(rank, ranks, build_id, pieces), models))
        report("cut", rank + 1, ranks)
        files += config.ranks
    assert config is not None
    states = [replace(spec, dims=_whole(spec, request.model)) for spec in config.states]
    dims = {name: spec.dims for spec in states for name in (spec.past, spec.present)}
    return replace(
        config,
        ranks=files,
        states=states,
        inputs=[replace(port, dims=dims.get(port.name, port.dims)) for port in config.inputs],
        outputs=[replace(port, dims=dims.get(port.name, port.dims)) for port in config.outputs],
        options=config.options | {"parallel_build": build_id},
    )


def _build_id(request: BuildRequest, mapping: Mapping) -> str:
    """Tells the files of one build from those of another: same model, checkpoint, type and mapping give the same."""
    facts = (request.model, request.checkpoint, request.dtype, request.quantization, mapping, request.versions)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _whole(spec: StateTensor, model: dict[str, Any]) -> list[int | str]:
    """Dimensions of a state of the whole model, from a rank's."""
    heads = model["num_attention_heads" if spec.kind == "lightning" else "num_key_value_heads"]
    return [spec.dims[0], heads, *spec.dims[2:]]
