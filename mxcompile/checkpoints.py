"""Making checkpoints with random weights, and verifying any."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxcompile.errors import MxcompileError
from mxcompile.progress import Progress, SilentProgress, Stage

if TYPE_CHECKING:
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.checkpoint.verify import VerifyReport
    from model_defs.config import ModelConfig


def create_checkpoint(
    preset: str | ModelConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Checkpoint:
    """Write a random checkpoint of an architecture (a preset's name or a configuration), whole or not at all.

    Equal arguments write equal weights. `force` replaces a checkpoint that is at `folder`, and nothing else.
    `options` are those of `model_defs.checkpoint.create.create_checkpoint`. Raises ConfigError for an unknown preset,
    CheckpointError when something is in the way, StorageError when the disk is full.
    """
    from model_defs.checkpoint.create import create_checkpoint as create
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.presets import preset as named

    config = named(preset) if isinstance(preset, str) else preset
    target = Path(folder).absolute()
    replaced = force and target.is_dir() and any(target.iterdir())
    if replaced and not _is_checkpoint(target):
        raise MxcompileError(f"{target}: is not a checkpoint, so it is not replaced; choose another folder")
    written = target.with_name(f".{target.name}.new-{os.getpid()}") if replaced else target
    with (progress or SilentProgress()).stage("write") as stage:
        create(config, written, seed=seed, dtype=dtype, on_progress=_advancing(stage), **options)  # type: ignore[arg-type]
    if replaced:
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        os.rename(target, old)
        os.rename(written, target)
        shutil.rmtree(old, ignore_errors=True)
    return Checkpoint.open(target)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def verify_checkpoint(
    folder: str | Path, *, layers: int | None = None, scan_values: bool = False, progress: Progress | None = None
) -> VerifyReport:
    """Compare a checkpoint with its configuration, or with its first `layers` layers; all problems are in the report.

    `scan_values` reads every weight and reports what is not finite. Raises CheckpointError or ConfigError when there
    is no checkpoint to compare.
    """
    from model_defs.checkpoint.reader import Checkpoint
    from model_defs.checkpoint.verify import verify

    opened = Checkpoint.open(folder, strict=False)
    config = opened.config if layers is None else opened.config.truncated(layers)
    with (progress or SilentProgress()).stage("verify") as stage:
        return verify(opened, _advancing(stage), config=config, scan_values=scan_values)


def _advancing(stage: Stage) -> Callable[[int, int, str], None]:
    """Turn (bytes done, bytes in all, tensor) into advances of a stage."""
    before = 0

    def count(done: int, total: int, tensor: str) -> None:
        nonlocal before
        stage.advance(done - before)
        before = done

    return count
