"""What a benchmark is of: the engine, named by its digest, and the checkpoint that it was built from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from mxcompile.errors import MxcompileError


def describe_engine(folder: Path, config: EngineConfig) -> dict[str, Any]:
    """What identifies an engine in a report. `digest` is of its config.json, which holds the digests of all its files."""
    return {
        "path": str(folder),
        "digest": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "target": config.target,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "layers": config.num_layers,
        "model": config.model,
        "ranks": config.mapping.ranks,
        "max_batch_size": config.limits.max_batch_size,
        "max_seq_len": config.limits.max_seq_len,
        "prefill_chunk": config.limits.prefill_chunk,
        "checkpoint": None if config.checkpoint is None else config.checkpoint.fingerprint,
        "mxcompile_version": config.mxcompile_version,
        "versions": config.versions,
    }


def find_checkpoint(
    config: EngineConfig, against: str | os.PathLike[str] | None, needed: bool
) -> dict[str, Any] | None:
    """Path and fingerprint of the checkpoint, which must be the engine's."""
    built_from = config.checkpoint
    if against is None:
        if built_from is None or not Path(built_from.path).is_dir():
            if needed:
                raise MxcompileError(
                    "pytorch and transformers run on the checkpoint; say where it is with --against CHECKPOINT"
                )
            return None
        if not needed:
            return {"path": built_from.path, "fingerprint": built_from.fingerprint, "moved": False}
        against = built_from.path
    from model_defs.checkpoint.reader import Checkpoint

    opened = Checkpoint.open(against)
    fingerprint = opened.fingerprint()
    if built_from is not None and built_from.fingerprint != fingerprint:
        raise MxcompileError(
            f"the engine was built from another checkpoint ({built_from.path}) than {opened.folder}; give that one with --against"
        )
    moved = built_from is not None and Path(built_from.path) != opened.folder
    return {
        "path": str(Path(opened.folder).absolute()),
        "fingerprint": fingerprint,
        "moved": moved,
        "layers": opened.config.num_layers,
    }
