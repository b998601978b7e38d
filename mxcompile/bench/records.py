"""What the files of all measurements share: schema and version in the head, an unfinished run to go on with, refusals in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mxcompile.errors import MxcompileError

Path_ = str | Path


class Record(Protocol):
    """A run that grows in a file."""

    engine: dict[str, Any]
    checkpoint: dict[str, Any]
    options: dict[str, Any]
    finished: bool


R = TypeVar("R", bound=Record)


def check_schema(values: Any, schema: str, version: int, written_by: str) -> dict[str, Any]:
    """`values` as an object of this schema. Raises MxcompileError for another kind of file or schema version."""
    if not isinstance(values, dict) or values.get("schema") != schema:
        raise MxcompileError(f"this is not a file of `{written_by}`")
    if values.get("schema_version") != version:
        raise MxcompileError(
            f"it has schema version {values.get('schema_version')!r}, this mxcompile reads {version}; measure again"
        )
    return values


def previous(
    json_file: Path_ | None, resume: bool, read: Callable[[Path_], R], fresh: R, read_error: str = "no such measurement"
) -> R | None:
    """The unfinished run in `json_file`, when `resume` asks for it; None for a new run, which may overwrite a finished one.

    Raises MxcompileError: nothing to resume, a run of another engine, checkpoint or options, or an unfinished run that a new one would
    overwrite.
    """
    if resume and json_file is None:
        raise MxcompileError("--resume goes on with the run in a file; name it with --json FILE")
    if json_file is None or not Path(json_file).exists():
        return None
    try:
        old = read(json_file)
    except MxcompileError:
        if resume:
            raise
        raise MxcompileError(f"{json_file}: is there already and is {read_error}; choose another file") from None
    if not resume:
        if not old.finished:
            raise MxcompileError(f"{json_file}: holds an unfinished run; go on with --resume, or remove it")
        return None
    _refuse_another(json_file, "engine", old.engine.get("digest"), fresh.engine.get("digest"))
    theirs, ours = (run.checkpoint.get("fingerprint") for run in (old, fresh))
    _refuse_another(json_file, "checkpoint", theirs, ours)
    for key in sorted(set(old.options) | set(fresh.options)):
        if old.options.get(key) != fresh.options.get(key):
            was, now = old.options.get(key), fresh.options.get(key)
            raise MxcompileError(
                f"{json_file}: cannot be resumed, its {key.replace('_', ' ')} were {was}, not {now}; remove the file or choose another"
            )
    return old


def _refuse_another(json_file: Path_, what: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise MxcompileError(
            f"{json_file}: cannot be resumed, it is of another {what}; remove the file or choose another"
        )


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON gives them back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
