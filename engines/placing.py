"""Decide at build time where each weight's bytes lie: in the checkpoint as they are, or written to the engine directory.

Weights whose bytes an engine can use as they lie in the checkpoint stay there; derived ones (stacked experts, widened
types) are written to one file of the engine, one at a time, so memory holds at most one of them.
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
) -> Manifest:
    """Point the graph's initializers at where their bytes lie, and list them.

    Args:
        data_name: file of the engine for derived weights.
        dtype_of: numpy's name of a weight's type (given name and tensor), or EngineError where the engine cannot use it.
        own_copy: whether a weight must lie in the engine's file even if the checkpoint has it.
    """
    root = Path(checkpoint.path).resolve() if checkpoint is not None else None
    files: list[WeightFile] = []
    index: dict[str, int] = {}
    records: list[WeightRecord] = []
    derived: list[ir.Value] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise EngineError(f"weight {value.name} has no bytes; bind the graph to a checkpoint before building")
        dtype = dtype_of(value.name or "", tensor)
        inside = _inside_checkpoint(tensor, root) if not own_copy(value) else None
        if inside is not None and root is not None:
            if inside not in index:
                index[inside] = len(files)
                files.append(checkpoint_file(root, inside))
            assert isinstance(tensor, ir.ExternalTensor)
            shape = list(tensor.shape.numpy())
            records.append(
                WeightRecord(value.name or "", dtype, shape, index[inside], tensor.offset or 0, tensor.nbytes)
            )
            _refer(value, data_name, 0, 0)
        elif isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) or tensor.nbytes > INLINE_LIMIT:
            derived.append(value)
    _need_space(writer, sum(_nbytes(value) for value in derived))
    records += _write_derived(derived, writer, data_name, files, report)
    return Manifest(files, records, {})


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
                WeightRecord(value.name, array.dtype.name, list(array.shape), len(files), offset, array.nbytes)
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


def _inside_checkpoint(tensor: Any, root: Path | None) -> str | None:
    """Name of the checkpoint file the tensor's bytes lie in, if they do."""
    if root is None or not isinstance(tensor, ir.ExternalTensor):
        return None
    path = Path(tensor.path).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else None


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
