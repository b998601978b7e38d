"""Writes safetensors files one tensor piece at a time: the header first, then the bytes as they are made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from numpy.typing import NDArray

from model_defs.checkpoint.safetensors_header import DTYPES, MAX_HEADER_BYTES
from model_defs.errors import CheckpointError

_ALIGNMENT = 64  # tensors begin on cache lines when their sizes are multiples of one; the format itself asks for 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor still to be written."""

    name: str
    dtype: str  # safetensors name
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def plan_shards(tensors: list[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    """Cuts the list, in order, so that no shard's tensors exceed `max_shard_bytes`; a larger tensor gets its own shard."""
    shards: list[list[PlannedTensor]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names as Hugging Face libraries write them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_safetensors(
    path: Path,
    tensors: list[PlannedTensor],
    blocks: Callable[[PlannedTensor], Iterator[NDArray]] | None,
    on_tensor: Callable[[PlannedTensor], None] = lambda tensor: None,
) -> None:
    """Writes one file. `blocks` gives a tensor's values as consecutive arrays of its dtype; without it the file ends in a hole of the
    tensors' size, which reads as zeros and takes no space where the file system knows holes. Raises OSError when the disk is full and
    CheckpointError when the values do not have the planned size.
    """
    text = _header(path, tensors)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if blocks is None:
            file.truncate(8 + len(text) + sum(tensor.nbytes for tensor in tensors))
        for tensor in tensors:
            if blocks is not None:
                _write_tensor(file, tensor, blocks(tensor))
            on_tensor(tensor)


def _header(path: Path, tensors: list[PlannedTensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without this mark
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path.name}: too many tensors for one safetensors file; use smaller shards")
    return text


def _write_tensor(file: IO[bytes], tensor: PlannedTensor, blocks: Iterator[NDArray]) -> None:
    written = 0
    for block in blocks:
        if block.dtype != DTYPES[tensor.dtype]:
            raise CheckpointError(f"tensor {tensor.name}: values are {block.dtype}, planned was {tensor.dtype}")
        # Row-major bytes; ml_dtypes arrays do not offer the buffer protocol, bytes of them do.
        written += file.write(block.tobytes())
    if written != tensor.nbytes:
        raise CheckpointError(f"tensor {tensor.name}: {written} bytes written, planned were {tensor.nbytes}")
