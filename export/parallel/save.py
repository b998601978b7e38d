"""Writing the graphs of all ranks, one file each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from export.errors import ExportError
from export.parallel.context import split_context
from export.parallel.plan import ShardingPlan
from export.parallel.shard import shard
from export.parallel.weights import bind_rank_weights
from export.save import SavedModel, save_graph, save_with_weights
from export.weights import Source


def save_ranks(
    model: ir.Model,
    plan: ShardingPlan,
    folder: Path,
    source: Source | None = None,
    *,
    force: bool = False,
    on_rank: Callable[[int], None] | None = None,
) -> list[SavedModel]:
    """Write `rank{r}.onnx` of every rank into `folder`, which is made if it is not there; one rank in memory at a time.

    With a `cp_size` they are the ranks' graphs for their segments of a prefill chunk.

    Args:
        model: the canonical graph of the whole model, without weights.
        source: the checkpoint that the files then refer to; without it, graphs alone are written.
        on_rank: called with each rank that is done.

    Raises:
        ExportError: a file exists and `force` is not given, or `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"{folder} is a file; several ranks are written into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for rank in plan.mapping.ranks:
        mine, path = split_context(shard(model, plan, rank), plan, rank), folder / f"rank{rank}.onnx"
        if source is None:
            saved.append(save_graph(mine, path, force=force))
        else:
            bind_rank_weights(mine, plan, rank, source)
            saved.append(save_with_weights(mine, path, force=force))
        if on_rank is not None:
            on_rank(rank)
    return saved
