"""Writing a canonical graph as an ONNX file whose weights stay in the checkpoint.

`model.onnx` is written with a folder `model.onnx.weights` beside it. The folder holds a link to each safetensors file that the graph
refers to, and `derived.bin` with what had to be stacked or converted. Links, because ONNX runtimes refuse external data outside the
model's folder: a hard link where the file system allows it (ONNX Runtime takes only those), else a symbolic one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.errors import ExportError

ALIGNMENT = 64
Progress = Callable[[int], None]  # called with the bytes just finished


@dataclass(frozen=True)
class SavedModel:
    """What was written."""

    path: Path
    graph_bytes: int
    referred_bytes: int  # weights that stay in the checkpoint's files
    derived_bytes: int  # weights that were stacked or converted and written anew


def save_graph(model: ir.Model, path: Path, *, force: bool = False) -> SavedModel:
    """Write the graph alone. Weights without values (`forget_weights`) become references to a file that does not exist yet, named
    `<file>.weights/unbound`, so that shapes and types are kept.
    """
    return _write(model, path, force, None)


def save_with_weights(
    model: ir.Model, path: Path, *, force: bool = False, on_progress: Progress | None = None
) -> SavedModel:
    """Write the graph with weights bound by `export.weights.bind_weights`.

    Peak memory is one derived tensor. A failure on the way removes what was written.

    Raises:
        ExportError: `path` exists and `force` is not given, or its folder does not exist.
        OSError: the disk is full or not writable.
    """
    return _write(model, path, force, on_progress or (lambda _: None))


def _write(model: ir.Model, path: Path, force: bool, on_progress: Progress | None) -> SavedModel:
    path = path.absolute()
    weights = path.with_name(path.name + ".weights")
    if not path.parent.is_dir():
        raise ExportError(f"the folder {path.parent} does not exist")
    for existing in (path, weights):
        if existing.exists() and not force:
            raise ExportError(f"{existing} exists; give --force to replace it")
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    originals = {name: value.const_value for name, value in model.graph.initializers.items()}
    try:
        if on_progress is None:
            referred, derived = _refer_to_nothing(model, weights.name), 0
        else:
            (staging / weights.name).mkdir()
            referred, derived = _place_weights(model, staging, weights.name, on_progress)
        proto = ir.to_proto(model)
        (staging / path.name).write_bytes(proto.SerializeToString())
        for existing in (path, weights):
            _remove(existing)
        for written in (weights.name, path.name):  # the graph last: without it nothing looks finished
            if (staging / written).exists():
                os.rename(staging / written, path.parent / written)
    finally:
        for name, tensor in originals.items():
            model.graph.initializers[name].const_value = tensor
        shutil.rmtree(staging, ignore_errors=True)
    return SavedModel(path, path.stat().st_size, referred, derived)


def _refer_to_nothing(model: ir.Model, folder: str) -> int:
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.ExternalTensor(
                f"{folder}/unbound", None, None, value.dtype, shape=value.shape, name=name
            )
    return 0


def _place_weights(model: ir.Model, staging: Path, folder: str, on_progress: Progress) -> tuple[int, int]:
    referred = derived = 0
    links: dict[Path, str] = {}
    with open(staging / folder / "derived.bin", "wb") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                source = Path(tensor.location)
                if source not in links:
                    links[source] = f"{folder}/{_link(source, staging / folder)}"
                location, offset, referred = links[source], tensor.offset, referred + tensor.nbytes
            elif isinstance(tensor, ir.LazyTensor):
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                location, offset = f"{folder}/derived.bin", file.tell()
                # Not tofile: NumPy does not say why a disk takes no more.
                file.write(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
                derived += tensor.nbytes
            else:
                continue
            value.const_value = ir.ExternalTensor(
                location, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
            )
            on_progress(tensor.nbytes)
    return referred, derived


def _link(source: Path, folder: Path) -> str:
    target = folder / source.name
    if target.exists():
        raise ExportError(f"two checkpoint files are called {source.name}")
    try:
        os.link(source.resolve(), target)
    except OSError:
        target.symlink_to(source.resolve())
    return source.name


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
