"""Decide at build time where each weight's bytes lie: in the checkpoint as they are, or written to the engine directory.

Weights whose bytes an engine can use as they lie in the checkpoint stay there; so do those that it can put together of them when it is
loaded. Others (other types, quantized ones) are written to one file of the engine, one at a time, so memory holds at most one of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from engines.config import Checkpoint
from engines.directory import EngineFiles
from engines.errors import ENVIRONMENT, EngineError
from engines.pieces import Piece, Strand
from engines.weights import ALIGNMENT, Manifest, WeightFile, WeightRecord, checkpoint_file

INLINE_LIMIT = 1024  # constants up to this many bytes stay in the graph
# progress(stage, done, total) with bytes or nodes as units
Progress = Callable[[str, int, int], None]


def place_weights(
    model: ir.Model,
    writer: EngineFiles,
    data_name: str,
    checkpoint: Checkpoint | None,
    report: Progress,
    *,
    dtype_of: Callable[[str, Any], str],
    own_copy: Callable[[ir.Value], bool] = lambda value: False,
    assembled: bool = False,
) -> Manifest:
    """Point the graph's initializers at where their bytes lie, and list them.

    Args:
        data_name: file of the engine for derived weights.
        dtype_of: numpy's name of a weight's type (given name and tensor), or EngineError where the engine cannot use it.
        own_copy: whether a weight must lie in the engine's file even if the checkpoint has it.
        assembled: whether the engine puts weights together when it is loaded: those whose tensor has `pieces`, as
            `export.pieces.Piece` is, then stay in the checkpoint too.
    """
    places = _Places(checkpoint)
    records: list[WeightRecord] = []
    derived: list[ir.Value] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise EngineError(f"weight {value.name} has no bytes; bind the graph to a checkpoint before building")
        dtype = dtype_of(value.name or "", tensor)
        pieces = places.pieces(tensor, assembled) if not own_copy(value) else None
        if pieces is not None:
            if sum(piece.nbytes for piece in pieces) != tensor.nbytes:
                raise EngineError(f"weight {value.name}: what the checkpoint has of it does not make {tensor.shape}")
            records.append(
                WeightRecord(value.name or "", dtype, list(tensor.shape.numpy()), tensor.nbytes, tuple(pieces))
            )
            _refer(value, data_name, 0, 0)
        elif isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) or tensor.nbytes > INLINE_LIMIT:
            derived.append(value)
    _need_space(writer, sum(_nbytes(value) for value in derived))
    records += _write_derived(derived, writer, data_name, places.files, report)
    return Manifest(places.files, records, {})


class _Places:
    """Files of the checkpoint that weights lie in."""

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self.files: list[WeightFile] = []
        self._root = Path(checkpoint.path).resolve() if checkpoint is not None else None
        self._index: dict[str, int | None] = {}  # by path; None for a file outside the checkpoint

    def pieces(self, tensor: Any, assembled: bool) -> list[Piece] | None:
        """What a weight is made of, or None where an engine cannot use the checkpoint's bytes."""
        if isinstance(tensor, ir.ExternalTensor):
            stored: Any = [([(tensor.path, tensor.offset or 0, tensor.nbytes)], tensor.nbytes, 1)]
        else:
            stored = getattr(tensor, "pieces", None) if assembled else None
        if stored is None:
            return None
        pieces = []
        for found, width, count in stored:
            strands = []
            for name, offset, stride in found:
                file = self._file(str(name))
                if file is None:
                    return None
                strands.append(Strand(file, offset, stride))
            pieces.append(Piece(tuple(strands), width, count))
        return pieces

    def _file(self, name: str) -> int | None:
        if name not in self._index:
            path, self._index[name] = Path(name).resolve(), None
            if self._root is not None and path.is_relative_to(self._root):
                self._index[name] = len(self.files)
                self.files.append(checkpoint_file(self._root, path.relative_to(self._root).as_posix()))
        return self._index[name]


def _write_derived(
    derived: list[ir.Value], writer: EngineFiles, data_name: str, files: list[WeightFile], report: Progress
) -> list[WeightRecord]:
    """Stream the derived weights into the engine's own file, one in memory at a time."""
    records: list[WeightRecord] = []
    total = sum(_nbytes(value) for value in derived)
    with writer.open(data_name) as file:
        # Never empty: weights that stay in the checkpoint name this file as a placeholder.
        file.write(b"mxcompile weights".ljust(ALIGNMENT, b"\0"))
        for value in derived:
            assert value.const_value is not None
            assert value.name is not None
            array = np.ascontiguousarray(value.const_value.numpy())
            if array.shape != tuple(value.const_value.shape):
                raise EngineError(f"weight {value.name}: {array.shape} arrived for {value.const_value.shape}")
            file.write(b"\0" * (-file.size % ALIGNMENT))
            offset = file.size
            file.write(array.tobytes() if array.nbytes <= INLINE_LIMIT else array.reshape(-1).view(np.uint8).data)
            records.append(
                WeightRecord(
                    value.name,
                    array.dtype.name,
                    list(array.shape),
                    array.nbytes,
                    (Piece.run(len(files), offset, array.nbytes),),
                )
            )
            _refer(value, data_name, offset, array.nbytes)
            report("bind weights", offset + array.nbytes, total)
            del array  # before the next one is made: experts of a layer are gigabytes
    written = writer.record(data_name)
    files.append(WeightFile("engine", data_name, written.size, written.sampled))
    return records


def _nbytes(value: ir.Value) -> int:
    assert value.const_value is not None
    return value.const_value.nbytes


def _refer(value: ir.Value, data_name: str, offset: int, length: int) -> None:
    """Let the graph file name the weight without its bytes; the session binds them by the list of weights."""
    tensor = value.const_value
    assert tensor is not None
    assert value.name is not None
    value.const_value = ir.ExternalTensor(
        data_name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name
    )


def _need_space(writer: EngineFiles, needed: int) -> None:
    assert writer.path is not None
    free = shutil.disk_usage(writer.path).free
    if needed > free:
        raise EngineError(
            f"{writer.target}: the engine's weights need {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB "
            "left; free some or choose another output folder",
            exit_code=ENVIRONMENT,
        )
