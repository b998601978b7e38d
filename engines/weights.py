"""Where the bytes of a rank's weights lie, and how an engine gets at them without a copy.

`rank{r}.weights.json` lists every weight with file, offset and shape. Files are either the engine's own
`rank{r}.weights.bin` (derived weights) or files of the checkpoint, used as they are. Both are mapped, so weights of
engines that share a checkpoint share memory, and pages that are not used cost nothing.

ONNX Runtime takes a pointer as it is only from `SessionOptions.add_initializer`; `add_external_initializers`
copies (measured, `docs/lowering-onnxruntime.md`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np

from engines import digest
from engines.config import EngineConfig, FileRecord
from engines.directory import check_file, inside, os_errors
from engines.errors import EngineError

ALIGNMENT = 64
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")


@dataclass(frozen=True)
class WeightFile:
    """A file that holds weights: `name` inside the engine directory or inside the checkpoint's folder."""

    root: Literal["engine", "checkpoint"]
    name: str
    size: int
    sampled: str


@dataclass(frozen=True)
class WeightRecord:
    """One weight: C-contiguous, little-endian, `nbytes` at `offset` of `files[file]`."""

    name: str
    dtype: str
    shape: list[int]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """`parts` maps a weight to its first dimension E when graphs also use `name@0` .. `name@{E-1}`, its slices; to [E, *shape] where they
    use them in another shape than the weight's own.
    """

    files: list[WeightFile]
    tensors: list[WeightRecord]
    parts: dict[str, int | list[int]]

    def to_json(self) -> str:
        lines = ",\n  ".join(json.dumps(dataclasses.asdict(tensor)) for tensor in self.tensors)
        files = ",\n  ".join(json.dumps(dataclasses.asdict(file)) for file in self.files)
        parts = json.dumps(self.parts)
        return f'{{"files": [\n  {files}\n ],\n "tensors": [\n  {lines}\n ],\n "parts": {parts}}}\n'

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Parse and check everything that can be checked without the weight files."""
        try:
            raw = json.loads(text)
            manifest = cls(
                [WeightFile(**f) for f in raw["files"]], [WeightRecord(**t) for t in raw["tensors"]], raw["parts"]
            )
            for tensor in manifest.tensors:
                _check_record(tensor, manifest.files)
            if len({tensor.name for tensor in manifest.tensors}) != len(manifest.tensors):
                raise ValueError("a weight is listed twice")
            for name, count in manifest.parts.items():
                whole = [t.shape for t in manifest.tensors if t.name == name]
                parts, *shape = count if isinstance(count, list) else [count]
                if [found[:1] for found in whole] != [[parts]]:
                    raise ValueError(f"{name} does not have {parts} parts")
                if shape and (
                    not all(type(dim) is int and dim >= 0 for dim in shape)
                    or math.prod(shape) != math.prod(whole[0][1:])
                ):
                    raise ValueError(f"the parts of {name} do not have the shape {shape}")
            for file in manifest.files:
                if file.root not in ("engine", "checkpoint"):
                    raise ValueError(f"unknown place {file.root!r}")
                inside(file.name)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise EngineError(f"{source}: not a list of weights ({error}); rebuild the engine") from None
        return manifest


def _check_record(tensor: WeightRecord, files: list[WeightFile]) -> None:
    if tensor.dtype not in DTYPES or not all(type(dim) is int and dim >= 0 for dim in tensor.shape):
        raise ValueError(f"{tensor.name} has an unknown type or shape")
    expected = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
    if not 0 <= tensor.file < len(files) or tensor.nbytes != expected:
        raise ValueError(f"{tensor.name} has {tensor.nbytes} bytes, its shape needs {expected}")
    if not 0 <= tensor.offset <= files[tensor.file].size - tensor.nbytes:
        raise ValueError(f"{tensor.name} lies outside its file")


def map_weights(
    folder: Path, config: EngineConfig, name: str, checkpoint: Path | None = None, *, whole: bool = False
) -> dict[str, np.ndarray]:
    """Read-only arrays over the mapped files, by weight name.

    `checkpoint` says where the checkpoint lies now, if it was moved. Checkpoint files are checked by size and
    sampled digest; the engine's own were checked with the directory.
    """
    with os_errors(f"reading {folder / name}"):
        manifest = Manifest.from_json((folder / name).read_text(encoding="utf-8"), str(folder / name))
    if checkpoint is None and config.checkpoint is not None:
        checkpoint = Path(config.checkpoint.path)
    maps: list[Any] = []
    for file in manifest.files:
        if file.root == "checkpoint" and checkpoint is None:
            raise EngineError(f"{folder / name}: the engine names no checkpoint for {file.name}; rebuild the engine")
        path = (folder if file.root == "engine" else checkpoint or folder) / file.name
        if file.root == "checkpoint":
            if not path.is_file():
                raise EngineError(
                    f"{path}: this engine reads weights from its checkpoint, but the file is not there; "
                    "say where the checkpoint is now, or rebuild the engine"
                )
            check_file(path, FileRecord(file.size, "", file.sampled), whole=whole)
        elif path.stat().st_size != file.size:
            raise EngineError(f"{path}: {path.stat().st_size} bytes, {name} expects {file.size}; rebuild the engine")
        with os_errors(f"mapping {path}"):
            maps.append(np.memmap(path, np.uint8, "r") if file.size else np.empty(0, np.uint8))
    arrays = {}
    for tensor in manifest.tensors:
        piece = maps[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]
        # A plain ndarray over the mapping: np.memmap's own bookkeeping is slow and not needed.
        arrays[tensor.name] = np.asarray(piece).view(np.dtype(tensor.dtype)).reshape(tensor.shape)
    for name, count in manifest.parts.items():
        parts, *shape = count if isinstance(count, list) else [count]
        stacked = arrays[name].reshape(parts, *(shape or arrays[name].shape[1:]))  # a view
        arrays |= {f"{name}@{index}": stacked[index] for index in range(parts)}
    return arrays


def checkpoint_file(root: Path, name: str) -> WeightFile:
    """Record of a checkpoint file as it is now."""
    path = root / name
    return WeightFile("checkpoint", name, path.stat().st_size, digest.sampled(path))
