"""Where a benchmark begins: with an empty report, or where an interrupted run left its file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from mxcompile.bench.environment import environment, now
from mxcompile.bench.options import BenchOptions
from mxcompile.bench.results import BenchReport, read_json
from mxcompile.bench.subject import describe_engine
from mxcompile.errors import MxcompileError


def begin(
    folder: Path,
    config: EngineConfig,
    checkpoint: dict[str, Any] | None,
    options: BenchOptions,
    json_file: str | os.PathLike[str] | None,
    resume: bool,
) -> BenchReport:
    """A new report, or with `resume` the unfinished one in `json_file`.

    Raises MxcompileError for a file that cannot be gone on with, or that a new run would write over.
    """
    engine = describe_engine(folder, config)
    if resume and json_file is None:
        raise MxcompileError("--resume goes on with the run in a file; name it with --json FILE")
    if json_file is not None and Path(json_file).exists():
        old = _previous(json_file, resume)
        if resume and old is not None:
            if old.finished:
                return old
            _check_same_run(old, engine, checkpoint, options, json_file)
            # What was not run may be possible now: only measured cells are kept.
            old.not_run, old.layer_times, old.contestants = [], [], []
            return old
    started = now()
    return BenchReport(started, started, options.to_dict(), engine, checkpoint, environment(options.threads))


def _previous(json_file: str | os.PathLike[str], resume: bool) -> BenchReport | None:
    try:
        old = read_json(json_file)
    except MxcompileError:
        if resume:
            raise
        raise MxcompileError(f"{json_file}: is there already and is no benchmark; choose another file") from None
    if not resume and not old.finished and old.cells:
        raise MxcompileError(
            f"{json_file}: holds an unfinished run of {len(old.cells)} cells; go on with --resume, or remove it"
        )
    return old


def _check_same_run(
    old: BenchReport, engine: dict[str, Any], checkpoint: dict[str, Any] | None, options: BenchOptions, json_file: Any
) -> None:
    def refuse(what: str) -> None:
        raise MxcompileError(f"{json_file}: cannot be resumed, {what}; remove the file or choose another")

    if (old.engine or {}).get("digest") != engine["digest"]:
        refuse("it is of another engine")
    if (
        checkpoint is not None
        and old.checkpoint is not None
        and old.checkpoint["fingerprint"] != checkpoint["fingerprint"]
    ):
        refuse("it is of another checkpoint")
    new = options.to_dict()
    different = [key for key in sorted(set(new) | set(old.options)) if new.get(key) != old.options.get(key)]
    if different:
        key = different[0]
        refuse(f"its {key.replace('_', ' ')} were {old.options.get(key)}, not {new.get(key)}")
