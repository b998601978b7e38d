"""Where the bytes of a rank's weights lie, and how an engine gets at them without a copy on the disk.

`rank{r}.weights.json` lists every weight with type, shape and the pieces of files that it is made of (`engines.pieces`). Files are
either the engine's own `rank{r}.weights.bin` (converted and quantized weights) or files of the checkpoint, used as they are. Both are
mapped, so weights of engines that share a checkpoint share memory, and pages that are not used cost nothing.

ONNX Runtime takes a pointer as it is only from `SessionOptions.add_initializer`; `add_external_initializers`
copies (measured, `docs/lowering-onnxruntime.md`). So its weights are runs of bytes in one file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np

from engines import digest
from engines.config import EngineConfig, FileRecord
from engines.directory import check_file, inside, os_errors
from engines.errors import ENVIRONMENT, EngineError
from engines.pieces import STAGING_BYTES, Piece, blocks, check_pieces

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
    """One weight: C-contiguous, little-endian, made of `pieces`.

    In JSON a weight that is a run of one file has "file" and "offset", others have "pieces", lists as of `Piece.to_plain`.
    """

    name: str
    dtype: str
    shape: list[int]
    nbytes: int
    pieces: tuple[Piece, ...]

    @property
    def files(self) -> set[int]:
        """Indices of the files that its bytes lie in."""
        return {strand.file for piece in self.pieces for strand in piece.strands}

    def to_plain(self) -> dict[str, Any]:
        facts = {"name": self.name, "dtype": self.dtype, "shape": self.shape}
        if len(self.pieces) == 1 and self.pieces[0].is_run:
            strand = self.pieces[0].strands[0]
            return facts | {"file": strand.file, "offset": strand.offset, "nbytes": self.nbytes}
        return facts | {"nbytes": self.nbytes, "pieces": [piece.to_plain() for piece in self.pieces]}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> WeightRecord:
        """Raises what a malformed one makes Python raise."""
        facts = dict(plain)
        if "pieces" in facts:
            pieces = tuple(Piece.from_plain(piece) for piece in facts.pop("pieces"))
        else:
            pieces = (Piece.run(facts.pop("file"), facts.pop("offset"), facts["nbytes"]),)
        return cls(pieces=pieces, **facts)


@dataclass(frozen=True)
class Manifest:
    """`parts` maps a weight to its first dimension E when graphs also use `name@0` .. `name@{E-1}`, its slices; to [E, *shape] where they
    use them in another shape than the weight's own.
    """

    files: list[WeightFile]
    tensors: list[WeightRecord]
    parts: dict[str, int | list[int]]

    def is_written(self, record: WeightRecord) -> bool:
        """Whether the weight's bytes are the engine's own rather than the checkpoint's."""
        return any(self.files[index].root == "engine" for index in record.files)

    def to_json(self) -> str:
        lines = ",\n  ".join(json.dumps(tensor.to_plain()) for tensor in self.tensors)
        files = ",\n  ".join(json.dumps(dataclasses.asdict(file)) for file in self.files)
        parts = json.dumps(self.parts)
        return f'{{"files": [\n  {files}\n ],\n "tensors": [\n  {lines}\n ],\n "parts": {parts}}}\n'

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Parse and check everything that can be checked without the weight files."""
        try:
            raw = json.loads(text)
            manifest = cls(
                [WeightFile(**f) for f in raw["files"]],
                [WeightRecord.from_plain(t) for t in raw["tensors"]],
                raw["parts"],
            )
            sizes = [file.size for file in manifest.files]
            for tensor in manifest.tensors:
                _check_record(tensor, sizes)
            shapes = {tensor.name: tensor.shape for tensor in manifest.tensors}
            if len(shapes) != len(manifest.tensors):
                raise ValueError("a weight is listed twice")
            for name, count in manifest.parts.items():
                _check_parts(name, count, shapes.get(name, []))
            for file in manifest.files:
                if file.root not in ("engine", "checkpoint"):
                    raise ValueError(f"unknown place {file.root!r}")
                inside(file.name)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise EngineError(f"{source}: not a list of weights ({error}); rebuild the engine") from None
        return manifest


def _check_record(tensor: WeightRecord, sizes: list[int]) -> None:
    if tensor.dtype not in DTYPES or not all(type(dim) is int and dim >= 0 for dim in tensor.shape):
        raise ValueError(f"{tensor.name} has an unknown type or shape")
    expected = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
    if tensor.nbytes != expected:
        raise ValueError(f"{tensor.name} has {tensor.nbytes} bytes, its shape needs {expected}")
    try:
        check_pieces(tensor.pieces, tensor.nbytes, sizes)
    except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}") from None


def _check_parts(name: str, count: int | list[int], whole: list[int]) -> None:
    parts, *shape = count if isinstance(count, list) else [count]
    if whole[:1] != [parts]:
        raise ValueError(f"{name} does not have {parts} parts")
    if shape and (not all(type(dim) is int and dim >= 0 for dim in shape) or math.prod(shape) != math.prod(whole[1:])):
        raise ValueError(f"the parts of {name} do not have the shape {shape}")


class StoredWeight:
    """One weight over mapped files. Nothing is read before its bytes are."""

    def __init__(self, record: WeightRecord, files: Sequence[np.ndarray]) -> None:
        """`files`: the bytes of the list's files."""
        self.record, self._files = record, files

    @property
    def nbytes(self) -> int:
        return self.record.nbytes

    def blocks(self, staging: np.ndarray) -> Iterator[np.ndarray]:
        """The bytes in order, at most `len(staging)` at a time; see `engines.pieces.blocks`."""
        return blocks(self.record.pieces, self._files, staging)

    def forget(self) -> None:
        """Let go of the memory that reading mapped files took of this process; the system may keep their pages for the next reader."""
        for index in self.record.files:
            mapped = self._files[index].base
            if isinstance(mapped, mmap.mmap):
                mapped.madvise(mmap.MADV_DONTNEED)

    def array(self) -> np.ndarray:
        """The weight: a read-only view where it is a run of one file, else put together in memory."""
        record = self.record
        if len(record.pieces) == 1 and record.pieces[0].is_run:
            strand = record.pieces[0].strands[0]
            # A plain ndarray over the mapping: np.memmap's own bookkeeping is slow and not needed.
            found = np.asarray(self._files[strand.file][strand.offset : strand.offset + record.nbytes])
        else:
            try:
                found = np.empty(record.nbytes, np.uint8)
            except MemoryError:
                raise EngineError(
                    f"weight {record.name} of {record.nbytes} bytes does not fit into memory", exit_code=ENVIRONMENT
                ) from None
            done = 0
            for block in self.blocks(np.empty(max(1, min(STAGING_BYTES, record.nbytes)), np.uint8)):
                found[done : done + len(block)] = block
                done += len(block)
        return found.view(np.dtype(record.dtype)).reshape(record.shape)


def open_weights(
    folder: Path, config: EngineConfig, name: str, checkpoint: Path | None = None, *, whole: bool = False
) -> tuple[Manifest, list[StoredWeight]]:
    """The list of weights `name` of the engine in `folder`, and each of them over the mapped files.

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
            maps.append(_mapped(path) if file.size else np.empty(0, np.uint8))
    return manifest, [StoredWeight(record, maps) for record in manifest.tensors]


def _mapped(path: Path) -> np.ndarray:
    """The file's bytes. Python keeps a mapped file open, so this process may then open one file more than before, as far as the system
    lets it: of hundreds of shards little of a usual limit of 1024 would be left for a server's connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft + 1, hard))
    return np.memmap(path, np.uint8, "r")


def map_weights(
    folder: Path, config: EngineConfig, name: str, checkpoint: Path | None = None, *, whole: bool = False
) -> dict[str, np.ndarray]:
    """Read-only arrays by weight name, parts included; `open_weights` says what is checked."""
    manifest, weights = open_weights(folder, config, name, checkpoint, whole=whole)
    arrays = {weight.record.name: weight.array() for weight in weights}
    for name, count in manifest.parts.items():
        parts, *shape = count if isinstance(count, list) else [count]
        stacked = arrays[name].reshape(parts, *(shape or arrays[name].shape[1:]))  # a view
        arrays |= {f"{name}@{index}": stacked[index] for index in range(parts)}
    return arrays


def checkpoint_file(root: Path, name: str) -> WeightFile:
    """Record of a checkpoint file as it is now."""
    path = root / name
    return WeightFile("checkpoint", name, path.stat().st_size, digest.sampled(path))
