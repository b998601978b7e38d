"""One session's state in a file: eight bytes of magic, a JSON header, raw arrays, and a digest over all of it.

The file is untrusted when read: it must be of this engine, whole, and hold exactly the arrays its header lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.config import EngineConfig
from engines.interface import RowSnapshot
from mxcompile.errors import MxcompileError

MAGIC = b"MXCSTAT1"
PARTIAL = ".partial-"  # begins the name of a file that is not whole yet
_DIGEST = 32
_LARGEST_HEADER = 1 << 24
_ROLES = ("recurrent", "key", "value")


class StateFileError(MxcompileError):
    """A state file that is damaged or belongs to another engine."""


def engine_digest(config: EngineConfig) -> str:
    """Identifies what a state depends on: the model, its weights, its types, and the graphs that wrote it."""
    parts = {
        "model": config.model,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "target": config.target,
        "checkpoint": config.checkpoint.fingerprint if config.checkpoint else None,
        "files": {name: record.sha256 or record.sampled for name, record in sorted(config.files.items())},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encode_state(engine: str, name: str, snapshot: RowSnapshot, unfed: Sequence[int]) -> list[bytes | memoryview]:
    """A state file's contents but for the digest at its end; arrays are not copied."""
    arrays: list[memoryview] = []
    tensors: list[dict[str, Any]] = []
    for role in _ROLES:
        for layer, array in sorted(getattr(snapshot, role).items()):
            arrays.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            tensors.append({"role": role, "layer": layer, "dtype": array.dtype.name, "shape": list(array.shape)})
    head = {"engine": engine, "name": name, "length": snapshot.length, "unfed": list(unfed), "tensors": tensors}
    header = json.dumps(head).encode()
    return [MAGIC, len(header).to_bytes(8, "little"), header, *arrays]


def state_bytes(parts: Sequence[bytes | memoryview]) -> int:
    """Bytes of the file that `parts` make."""
    return sum(len(part) for part in parts) + _DIGEST


def write_parts(file: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file whole or not at all; only the owner may read it (it is a conversation). Raises OSError."""
    digest = hashlib.sha256()
    descriptor, temporary = tempfile.mkstemp(prefix=PARTIAL, dir=file.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as out:
            for part in parts:
                out.write(part)
                digest.update(part)
            out.write(digest.digest())
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_state(file: Path, engine: str, name: str, snapshot: RowSnapshot, unfed: Sequence[int]) -> None:
    """Write one session's state. Raises OSError."""
    write_parts(file, encode_state(engine, name, snapshot, unfed))


def read_state(file: Path, engine: str, name: str) -> tuple[RowSnapshot, list[int]]:
    """The snapshot and the unfed tokens of session `name`. Raises StateFileError."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise StateFileError(f"{file}: {error.strerror}") from error
    if data[:8] != MAGIC or len(data) < 16 + _DIGEST or hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise StateFileError(f"{file}: not a whole state file")
    size = int.from_bytes(data[8:16], "little")
    if size > min(_LARGEST_HEADER, len(data) - 16 - _DIGEST):
        raise StateFileError(f"{file}: its header is too long")
    try:
        head = json.loads(data[16 : 16 + size])
        if head["engine"] != engine:
            raise StateFileError(f"{file}: was written by another engine")
        if head["name"] != name:
            raise StateFileError(f"{file}: belongs to another session")
        parts: dict[str, dict[int, np.ndarray]] = {role: {} for role in _ROLES}
        at = 16 + size
        for tensor in head["tensors"]:
            array, at = _array(data, at, tensor)
            parts[tensor["role"]][int(tensor["layer"])] = array
        if at != len(data) - _DIGEST:
            raise StateFileError(f"{file}: its arrays do not fill it")
        return RowSnapshot(int(head["length"]), **parts), [int(token) for token in head["unfed"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateFileError(f"{file}: its header is malformed") from error


def _array(data: bytes, at: int, tensor: dict[str, Any]) -> tuple[np.ndarray, int]:
    if tensor["dtype"] == "bfloat16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    elif tensor["dtype"] in ("float32", "float16"):
        dtype = np.dtype(tensor["dtype"])
    else:
        raise ValueError(tensor["dtype"])
    shape = [int(dim) for dim in tensor["shape"]]
    if len(shape) != 3 or min(shape) < 0:
        raise ValueError(shape)
    count = shape[0] * shape[1] * shape[2]
    if at + count * dtype.itemsize > len(data) - _DIGEST:
        raise ValueError("an array passes the end of the file")
    return np.frombuffer(data, dtype, count, at).reshape(shape), at + count * dtype.itemsize
