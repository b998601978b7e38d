"""A strict reader of the safetensors header.

The format: 8 bytes little-endian header length, a JSON object, then the tensors' bytes. Offsets in the header count
from the byte behind it. The tensors must fill that space without gaps or overlaps, so that a file cannot hide bytes or
share them. (format description: github.com/huggingface/safetensors, README)

An own reader because the library hands out tensors, never the offsets that the engines bind to.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from model_defs.errors import CheckpointError
from model_defs.strict_json import parse_object

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at byte `offset` of `file`, row-major."""

    name: str
    file: Path  # absolute
    offset: int  # from the start of the file
    nbytes: int
    dtype: str  # safetensors name, such as "BF16"
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """What the header of one file says."""

    file: Path
    file_bytes: int  # size of the file on disk
    declared_bytes: int  # size that the header asks for; larger than `file_bytes` when the file was cut off
    entries: dict[str, TensorEntry]
    raw: bytes  # length field and JSON, for fingerprints
    metadata: dict[str, str]


def file_size(path: Path) -> int:
    """Size of a regular file in bytes; symbolic links are followed. Raises CheckpointError for anything else."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    return status.st_size


def read_header(path: Path) -> Header:
    """Header of the file at `path` (made absolute). A file shorter than its header declares is returned, not refused:
    compare `file_bytes` with `declared_bytes`.

    Raises CheckpointError, with the file's name, for everything that breaks the format.
    """
    path = path.absolute()
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length_field = file.read(8)
            if len(length_field) < 8:
                raise CheckpointError(f"{path}: is too short for a safetensors file ({size} bytes); download it again")
            length = int.from_bytes(length_field, "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: is not a safetensors file (it claims a header of {length} bytes)")
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: is truncated inside its header ({size} of at least {8 + length} bytes); download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None
    try:
        return _parse(path, size, length_field + text)
    except ValueError as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from None


def _parse(path: Path, size: int, raw: bytes) -> Header:
    if not raw[8:9] == b"{":
        raise ValueError("it does not begin with '{'")
    fields = parse_object(raw[8:])
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map names to texts")
    start = len(raw)
    entries = {name: _entry(path, start, name, value) for name, value in fields.items()}
    expected = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != expected:
            fault = "overlaps the tensor before it" if entry.offset < expected else "leaves a gap before it"
            raise ValueError(f"tensor {entry.name!r} {fault} (offset {entry.offset - start}, not {expected - start})")
        expected += entry.nbytes
    if size > expected:
        raise ValueError(f"{size - expected} bytes at the end of the file belong to no tensor")
    return Header(path, size, expected, entries, raw, metadata)


def _entry(path: Path, start: int, name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has unknown dtype {dtype!r}")
    if not _is_counts(shape):
        raise ValueError(f"tensor {name!r} has a malformed shape")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has malformed data_offsets")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise ValueError(f"tensor {name!r} of shape {shape} and dtype {dtype} needs {nbytes} bytes, not {end - begin}")
    return TensorEntry(name, path, start + begin, nbytes, dtype, tuple(shape))


def _is_counts(value: Any) -> bool:
    """A short list of whole numbers that fit in 63 bits; Python's integers do not overflow, but other readers' do."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value)
    )
