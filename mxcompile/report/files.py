"""Reports as files: JSON, and whatever text a page is. Written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mxcompile.bench.results import read_any
from mxcompile.errors import MxcompileError
from mxcompile.validation.results import ValidationReport


def write_json(report: ValidationReport, path: str | os.PathLike[str]) -> None:
    """Write `report.to_dict()`. Raises OSError when the disk is full or the folder cannot be written to."""
    write_text(path, json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> ValidationReport:
    """Read a report that `write_json` wrote. Raises MxcompileError, naming the file, when it is none, damaged or of another version."""
    report: ValidationReport = read_any(path, ValidationReport.from_dict)
    return report


def check_place(*paths: str | os.PathLike[str] | None) -> None:
    """Before minutes of measuring: MxcompileError where a file could not be written afterwards. None and "-" (stdout) are passed over."""
    for path in paths:
        if path is None or path == "-":
            continue
        folder = Path(path).absolute().parent
        while not os.path.lexists(folder):  # missing ones are made
            folder = folder.parent
        if Path(path).is_dir():
            raise MxcompileError(f"{path}: is a folder; name a file")
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise MxcompileError(f"{path}: nothing can be written to {folder}; choose another folder")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file by way of a neighbour that is renamed when it is whole; makes the folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
