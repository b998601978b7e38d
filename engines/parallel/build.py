"""Build an engine of several ranks for CPUs: each rank's graph lowered, its weights placed, and the graph cut into pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import onnx
import onnx_ir as ir

from engines.config import EngineConfig, Mapping
from engines.directory import EngineDirWriter
from engines.onnxruntime.build import BuildRequest, build
from engines.parallel.cut import cut
from engines.parallel.heads import of_all_ranks
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
        config = build(model, writer, replace(request, rank=rank), progress)
        report("cut", rank, ranks)
        for graph in filter(None, (config.ranks[0].graph, config.ranks[0].prefill_graph)):
            assert writer.path is not None
            pieces, models = cut(onnx.load(str(writer.path / graph), load_external_data=False))
            writer.write(pieces_name(graph), to_bytes(PieceFile(rank, ranks, build_id, pieces), models))
        report("cut", rank + 1, ranks)
        files += config.ranks
    assert config is not None
    whole = of_all_ranks(config, files)
    return replace(whole, options=whole.options | {"parallel_build": build_id})


def _build_id(request: BuildRequest, mapping: Mapping) -> str:
    """Tells the files of one build from those of another: same model, checkpoint, type and mapping give the same."""
    facts = (request.model, request.checkpoint, request.dtype, request.quantization, mapping, request.versions)
    return hashlib.sha256(repr(facts).encode()).hexdigest()
