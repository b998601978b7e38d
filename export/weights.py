"""Binding the canonical graph's initializers to a checkpoint, by reference wherever its bytes can be used as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ExportError
from model_defs.config import ModelConfig
from model_defs.weights import Direct, InterleavedStack, Recipe, Stacked, weight_recipes

_NUMPY_DTYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}
_STORED_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


class Entry(Protocol):
    """Where a checkpoint keeps one tensor."""

    @property
    def file(self) -> object: ...  # pathlib.Path, absolute

    @property
    def offset(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """What binding needs of a checkpoint; `model_defs.checkpoint.reader.Checkpoint` is one."""

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def array(self, name: str) -> NDArray: ...


def forget_weights(model: ir.Model, config: ModelConfig) -> None:
    """Leave the weight initializers with a type and a shape only."""
    for name in weight_recipes(config):
        model.graph.initializers[name].const_value = None


def bind_weights(model: ir.Model, config: ModelConfig, source: Source) -> None:
    """Give every weight initializer of `model` its value, without reading any.

    A checkpoint tensor of the wanted type and form becomes an `ir.ExternalTensor` that points into the safetensors file. One that must
    be widened, narrowed, stacked or interleaved becomes an `ir.LazyTensor` that is made when somebody asks, and not kept.

    Raises:
        ExportError: a tensor is missing, or its shape is not what the graph needs.
    """
    for name, recipe in weight_recipes(config).items():
        value = model.graph.initializers[name]
        value.const_value = bound_tensor(name, recipe, value, source)


def bound_tensor(name: str, recipe: Recipe, value: ir.Value, source: Source) -> ir.TensorProtocol:
    """The tensor for one initializer; see `bind_weights`."""
    assert value.shape is not None
    assert value.dtype is not None
    shape, dtype = value.shape.numpy(), value.dtype
    for tensor in recipe.tensors:
        if tensor not in source.entries:
            raise ExportError(f"the checkpoint has no tensor {tensor!r}")
    if isinstance(recipe, Direct):
        entry = source.entries[recipe.tensor]
        if tuple(entry.shape) != tuple(shape):
            raise ExportError(f"tensor {recipe.tensor!r} has shape {list(entry.shape)}, the model needs {list(shape)}")
        if _STORED_DTYPES.get(entry.dtype) == dtype:
            file = entry.file
            return ir.ExternalTensor(str(file), entry.offset, entry.nbytes, dtype, shape=value.shape, name=name)

    if not isinstance(recipe, Direct):
        return ExpertTensor(recipe, source, dtype, value.shape, name)
    return ConvertedTensor(recipe, source, dtype, value.shape, name)


class ConvertedTensor(ir.LazyTensor):
    """A checkpoint tensor in another type than it is stored in, made when somebody asks."""

    def __init__(self, recipe: Direct, source: Source, dtype: ir.DataType, shape: ir.Shape, name: str) -> None:
        def assemble() -> ir.TensorProtocol:
            return _as_tensor(self.stored(), dtype, name, tuple(shape.numpy()))

        super().__init__(assemble, dtype=dtype, shape=shape, name=name, cache=False)
        self._recipe, self._source = recipe, source

    def stored(self) -> NDArray:
        """The tensor in the type it is stored in, usually a view of the mapped file."""
        return self._recipe.assemble(self._source.array)


class ExpertTensor(ir.LazyTensor):
    """The stacked weights of a layer's experts, made when somebody asks, whole or one expert at a time."""

    def __init__(
        self, recipe: Stacked | InterleavedStack, source: Source, dtype: ir.DataType, shape: ir.Shape, name: str
    ) -> None:
        def assemble() -> ir.TensorProtocol:
            return _as_tensor(recipe.assemble(source.array), dtype, name, tuple(shape.numpy()))

        super().__init__(assemble, dtype=dtype, shape=shape, name=name, cache=False)
        self._recipe, self._source = recipe, source

    def experts(self) -> Iterator[NDArray]:
        """Each expert's weights [rows, columns] in the type they are stored in. Raises ExportError where the shape is wrong."""
        for recipe in self._recipe.experts():
            array = recipe.assemble(self._source.array)[0]
            if array.shape != tuple(self.shape.numpy())[1:]:
                raise ExportError(f"an expert of {self.name} assembles to shape {list(array.shape)}")
            yield array


def _as_tensor(array: NDArray, dtype: ir.DataType, name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
    if array.shape != shape:
        raise ExportError(f"{name} assembles to shape {list(array.shape)}, the model needs {list(shape)}")
    return ir.tensor(array.astype(_NUMPY_DTYPES[dtype], copy=False), dtype=dtype, name=name)
