"""Add what ranks need to share the tokens of a prefill chunk to an engine of `engines.parallel.build`.

Every set of `tp_size` ranks holds the same weights, so the first set's files of them serve all. Each rank gets a graph for single tokens,
which knows nothing of segments, and one for its segment of several tokens; both as pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx
import onnx_ir as ir

from engines.config import EngineConfig, RankFiles
from engines.directory import EngineFiles
from engines.errors import EngineError
from engines.onnxruntime.build import write_graph
from engines.onnxruntime.lowering import GroupExperts, lower, lower_expert_ranges
from engines.parallel.build import write_pieces
from engines.placing import Progress


def build_segments(
    engine: EngineConfig,
    graph_of: Callable[[int], ir.Model],
    segment_of: Callable[[int], ir.Model],
    writer: EngineFiles,
    progress: Progress | None = None,
) -> EngineConfig:
    """Write the graphs of all `engine.mapping.cp_size` sets of ranks; commit the directory yourself.

    Args:
        engine: what `build_ranks` returned; its files are the first set's.
        graph_of, segment_of: make a rank's canonical graphs, for any tokens and for its segment; without weights.

    Raises EngineError when a graph cannot be lowered.
    """
    report, mapping = progress or (lambda stage, done, total: None), engine.mapping
    files = []
    for rank in range(mapping.ranks):
        report("cut segments", rank, mapping.ranks)
        first = engine.ranks[rank % mapping.tp_size]
        names = RankFiles(rank, f"rank{rank}.onnx", first.weights, f"rank{rank}.prefill.onnx")
        assert writer.path is not None
        assert names.prefill_graph is not None
        placed = ir.from_proto(onnx.load(str(writer.path / first.graph), load_external_data=False))
        if rank != first.rank:
            write_graph(writer, names.graph, lower_expert_ranges(_lowered(graph_of(rank), placed)))
            write_pieces(writer, names.graph, rank, engine)
        segment = _lowered(segment_of(rank), placed)
        GroupExperts()(segment)
        lower_expert_ranges(segment)  # experts with one scale per row stay one operator
        write_graph(writer, names.prefill_graph, segment)
        write_pieces(writer, names.prefill_graph, rank, engine)
        files.append(names)
        report("cut segments", rank + 1, mapping.ranks)
    return replace(engine, ranks=files)


def _lowered(model: ir.Model, placed: ir.Model) -> ir.Model:
    """`model` lowered, its weights where those of the same names in `placed` are."""
    try:
        lower(model)
    except (ValueError, ir.passes.PassError) as error:
        raise EngineError(f"the graph cannot be lowered to ONNX Runtime: {error.__cause__ or error}") from error
    for name, value in model.graph.initializers.items():
        if name not in placed.graph.initializers:
            raise EngineError(f"the graph of a segment has a weight {name!r} that the engine does not")
        value.const_value = placed.graph.initializers[name].const_value
    return model
