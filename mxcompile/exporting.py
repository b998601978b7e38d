"""From a checkpoint or a configuration to the canonical graph, and to an ONNX file of it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mxcompile.errors import MxcompileError
from mxcompile.progress import Progress, SilentProgress, StageClock

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.weights import Source
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.config import ModelConfig

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote. Sizes in bytes, times in seconds."""

    path: str
    dtype: str
    layers: int
    nodes: int
    graph_bytes: int
    referenced_bytes: int
    derived_bytes: int
    seconds: dict[str, float]
    peak_memory: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def export_onnx(
    source: str | Path | ModelConfig,
    output: str | Path,
    *,
    dtype: str = "float32",
    layers: int | None = None,
    weights: bool = True,
    tp_size: int = 1,
    moe_tp_size: int | None = None,
    moe_ep_size: int | None = None,
    cp_size: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write the canonical ONNX graph; for several ranks (`tp_size`, `cp_size`), `rank{r}.onnx` of every rank into the folder `output`.

    With a `cp_size`, those are the graphs for prefill, in which a rank computes its segment of the tokens.

    `source` is a checkpoint folder, whose weights the file then refers to; or, for the graph alone, a configuration, a
    `config.json` or a checkpoint folder with `weights=False`. Raises as `build` does.
    """
    from export.parallel.mapping import ParallelMapping
    from export.parallel.plan import ShardingPlan
    from export.parallel.save import save_ranks
    from export.save import SavedModel, save_graph, save_with_weights
    from model_defs.config import ModelConfig
    from model_defs.config_schemas import read_config

    check_choice("dtype", dtype, DTYPES)
    clock = StageClock(progress or SilentProgress())
    opened: Checkpoint | None = None
    with clock.stage("read"):
        if isinstance(source, ModelConfig):
            config = source.text_only() if layers is None else source.text_only().truncated(layers)
        elif weights and Path(source).suffix != ".json":
            opened, config = open_checkpoint(Path(source), layers)
        else:
            config = read_config(source).text_only()
            config = config if layers is None else config.truncated(layers)
        plan = ShardingPlan(config, ParallelMapping.of(tp_size, moe_tp_size, moe_ep_size, cp_size))
        several = len(plan.mapping.ranks)
    with clock.stage("trace"):
        alone = opened is None or several > 1
        model = graph(config, dtype) if alone else bound_graph(config, dtype, cast("Checkpoint", opened))
    if several > 1:
        with clock.stage("write", several) as stage:
            ranks = save_ranks(model, plan, Path(output), opened, force=force, on_rank=lambda rank: stage.advance())
        saved = SavedModel(
            Path(output),
            sum(rank.graph_bytes for rank in ranks),
            sum(rank.referred_bytes for rank in ranks),
            sum(rank.derived_bytes for rank in ranks),
        )
    elif opened is None:
        with clock.stage("write"):
            saved = save_graph(model, Path(output), force=force)
    else:
        total = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        with clock.stage("bind weights", total) as stage:
            saved = save_with_weights(model, Path(output), force=force, on_progress=stage.advance)
    return ExportSummary(
        path=str(output),
        dtype=dtype,
        layers=config.num_layers,
        nodes=model.graph.num_nodes(),
        graph_bytes=saved.graph_bytes,
        referenced_bytes=saved.referred_bytes,
        derived_bytes=saved.derived_bytes,
        seconds={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        peak_memory=peak_memory(),
    )


def bound_graph(config: ModelConfig, dtype: str, checkpoint: Checkpoint) -> ir.Model:
    """The canonical graph of `config`, its initializers bound to the checkpoint without reading them."""
    from export.weights import bind_weights

    model = graph(config, dtype)
    bind_weights(model, config, cast("Source", checkpoint))
    return model


def graph(config: ModelConfig, dtype: str) -> ir.Model:
    """The canonical graph of `config`, without weights."""
    from export.trace import trace_model

    with quiet():
        return trace_model(config, dtype)


def open_checkpoint(folder: Path, layers: int | None, *, vision: bool = False) -> tuple[Checkpoint, ModelConfig]:
    """The checkpoint, and the configuration of its first `layers` layers, whose tensors are all there; with its vision half, if it
    has one, where `vision` asks for it.
    """
    from model_defs.checkpoint.processor import read_processing
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.checkpoint.verify import require_complete

    opened = Checkpoint.open(folder)
    config = opened.config if vision else opened.config.text_only()
    config = config if layers is None else config.truncated(layers)
    require_complete(opened, config)
    if config.vision is not None:
        read_processing(opened.folder, config.vision)  # before any work
    return opened, config


def peak_memory() -> int:
    """Most resident memory of this process so far, in bytes."""
    # Linux hands ru_maxrss down to new processes: a small one that a large one started would tell the large one's.
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises MxcompileError when `value` is none of `choices`."""
    if value not in choices:
        raise MxcompileError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep from the user what the tracer says about packages that it does not find and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
