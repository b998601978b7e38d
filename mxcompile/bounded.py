"""Files that a user names, read up to a limit: /dev/zero or a pipe that never ends would otherwise fill the memory."""

from __future__ import annotations

import os
from typing import BinaryIO

from mxcompile.errors import MxcompileError

MAX_TEXT_BYTES = 256 << 20


def read_bounded(source: str | os.PathLike[str] | BinaryIO, largest: int = MAX_TEXT_BYTES) -> bytes:
    """All bytes of a file, or of an open stream. Raises OSError, and MxcompileError, naming the file, for more than `largest` bytes."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return _read(file, largest, str(source))
    return _read(source, largest, "standard input")


def _read(file: BinaryIO, largest: int, name: str) -> bytes:
    data = file.read(largest + 1)
    if len(data) > largest:
        raise MxcompileError(f"{name}: is larger than {largest >> 20} MiB; take a part of it")
    return data
