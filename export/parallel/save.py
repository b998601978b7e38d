"""Writing the graphs of all ranks, one file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from export.parallel.plan import ShardingPlan
from export.parallel.shard import shard
from export.save import SavedModel, save_graph


def save_rank_graphs(
    model: ir.Model,
    plan: ShardingPlan,
    folder: Path,
    *,
    force: bool = False,
    on_rank: Callable[[int], None] | None = None,
) -> list[SavedModel]:
    """Write `rank{r}.onnx` of every rank into an existing folder, without weights, one rank in memory at a time.

    Args:
        model: the canonical graph of the whole model.
        on_rank: called with each rank that is done.

    Raises:
        ExportError: a file exists and `force` is not given, or the folder does not exist.
    """
    saved = []
    for rank in plan.mapping.ranks:
        saved.append(save_graph(shard(model, plan, rank), folder / f"rank{rank}.onnx", force=force))
        if on_rank is not None:
            on_rank(rank)
    return saved
