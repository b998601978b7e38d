"""Build an engine of several ranks for CPUs: each rank's graph lowered, its weights placed, and the graph cut into pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx
import onnx_ir as ir

from engines.config import EngineConfig
from engines.directory import EngineFiles
from engines.onnxruntime.build import BuildRequest, build
from engines.parallel.cut import cut
from engines.parallel.heads import of_all_ranks
from engines.parallel.pieces import PieceFile, pieces_name, to_bytes
from engines.placing import Progress


def build_ranks(
    graph_of: Callable[[int], ir.Model],
    writer: EngineFiles,
    request: BuildRequest,
    progress: Progress | None = None,
) -> EngineConfig:
    """Write the files of all ranks that share a model with `writer`, one rank in memory at a time; commit the directory yourself.

    Args:
        graph_of: makes a rank's canonical graph with its collectives and bound weights.
        request: `request.mapping` says how many ranks there are. With a `cp_size`, this is the first set of ranks, and
            `engines.parallel.segments` makes the others.

    Raises EngineError as `engines.onnxruntime.build.build` does.
    """
    ranks = range(request.mapping.tp_size)
    return together([build_rank(graph_of(rank), writer, replace(request, rank=rank), progress) for rank in ranks])


def build_rank(
    model: ir.Model, writer: EngineFiles, request: BuildRequest, progress: Progress | None = None
) -> EngineConfig:
    """Write the files of the one rank that `request` names. Ranks may be built in any order, and in processes of their own."""
    report = progress or (lambda stage, done, total: None)
    config = build(model, writer, request, progress)
    config = replace(config, options=config.options | {"parallel_build": _build_id(request)})
    graphs = [name for name in (config.ranks[0].graph, config.ranks[0].prefill_graph) if name is not None]
    for done, graph in enumerate(graphs):
        report("cut", done, len(graphs))
        write_pieces(writer, graph, request.rank, config)
    report("cut", len(graphs), len(graphs))
    return config


def together(ranks: Sequence[EngineConfig]) -> EngineConfig:
    """The configuration of the whole engine from what `build_rank` returned for each of its ranks."""
    return of_all_ranks(ranks[-1], [files for rank in ranks for files in rank.ranks])


def write_pieces(writer: EngineFiles, graph: str, rank: int, engine: EngineConfig) -> None:
    """Cut a rank's graph file at its collectives, and write the pieces beside it."""
    assert writer.path is not None
    pieces, models = cut(onnx.load(str(writer.path / graph), load_external_data=False))
    content = PieceFile(rank, engine.mapping.ranks, engine.options["parallel_build"], pieces)
    writer.write(pieces_name(graph), to_bytes(content, models))


def _build_id(request: BuildRequest) -> str:
    """Tells the files of one build from those of another: same model, checkpoint, type and mapping give the same."""
    facts = (request.model, request.checkpoint, request.dtype, request.quantization, request.mapping, request.versions)
    return hashlib.sha256(repr(facts).encode()).hexdigest()
