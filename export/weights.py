"""Binding the canonical graph's initializers to a checkpoint, by reference wherever its bytes can be used as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ExportError
from export.pieces import Cut, Entry, Piece, pieces_of, run
from model_defs.config import ModelConfig
from model_defs.weights import Direct, InterleavedStack, ReadArray, Recipe, Stacked, weight_recipes

_NUMPY_DTYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}
_STORED_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


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
    be widened, narrowed, stacked or interleaved becomes a `MadeTensor`.

    Raises:
        ExportError: a tensor is missing, or its shape is not what the graph needs.
    """
    for name, recipe in weight_recipes(config).items():
        value = model.graph.initializers[name]
        value.const_value = bound_tensor(name, recipe, value, source)


def bound_tensor(
    name: str,
    recipe: Recipe,
    value: ir.Value,
    source: Source,
    stored: tuple[int, ...] | None = None,
    cut: Cut | None = None,
) -> ir.TensorProtocol:
    """The tensor for one initializer; see `bind_weights`.

    Args:
        stored: the shape that each tensor of the recipe must have; default: what the initializer's own says.
        cut: the slice of each of them that the initializer is made of, where it is not the whole.
    """
    assert value.shape is not None
    assert value.dtype is not None
    stored = stored or recipe.stored_shape(tuple(value.shape.numpy()))
    for tensor in recipe.tensors:
        if tensor not in source.entries:
            raise ExportError(f"the checkpoint has no tensor {tensor!r}")
        found = tuple(source.entries[tensor].shape)
        if found != stored:
            raise ExportError(f"tensor {tensor!r} has shape {list(found)}, the model needs {list(stored)}")
    dtype, pieces = value.dtype, None
    if all(_STORED_DTYPES.get(source.entries[tensor].dtype) == dtype for tensor in recipe.tensors):
        pieces = pieces_of(recipe, source.entries, cut)
    if isinstance(recipe, Direct) and pieces is not None and len(pieces) == 1 and pieces[0].is_run:
        strand = pieces[0].strands[0]
        return ir.ExternalTensor(strand.file, strand.offset, pieces[0].nbytes, dtype, shape=value.shape, name=name)

    def read(tensor: str) -> NDArray:
        whole = source.array(tensor)
        return whole if cut is None else whole[cut]

    if not isinstance(recipe, Direct):
        return ExpertTensor(recipe, read, dtype, value.shape, name, pieces)
    return ConvertedTensor(recipe, read, dtype, value.shape, name, pieces)


def stored_pieces(tensor: ir.TensorProtocol) -> tuple[Piece, ...] | None:
    """The bytes of the checkpoint's files that a bound tensor is, or None where it takes more than copying them."""
    if isinstance(tensor, ir.ExternalTensor):
        return (run(str(tensor.location), tensor.offset or 0, tensor.nbytes),)
    return tensor.pieces if isinstance(tensor, MadeTensor) else None


class MadeTensor(ir.LazyTensor):
    """A weight that is made of checkpoint tensors when somebody asks, and not kept.

    `pieces`: the bytes of the checkpoint's files that it is, or None where it takes more than copying them: another type.
    """

    def __init__(
        self,
        made: Callable[[], NDArray],
        dtype: ir.DataType,
        shape: ir.Shape,
        name: str,
        pieces: tuple[Piece, ...] | None,
    ) -> None:
        def evaluate() -> ir.TensorProtocol:
            array = made()
            if array.shape != tuple(shape.numpy()):
                raise ExportError(f"{name} assembles to shape {list(array.shape)}, the model needs {list(shape)}")
            return ir.tensor(array.astype(_NUMPY_DTYPES[dtype], copy=False), dtype=dtype, name=name)

        super().__init__(evaluate, dtype=dtype, shape=shape, name=name, cache=False)
        self.pieces = pieces


class RecipeTensor(MadeTensor):
    """A weight that a recipe makes."""

    def __init__(
        self,
        recipe: Recipe,
        read: ReadArray,
        dtype: ir.DataType,
        shape: ir.Shape,
        name: str,
        pieces: tuple[Piece, ...] | None,
    ) -> None:
        super().__init__(self.stored, dtype, shape, name, pieces)
        self._recipe, self._read = recipe, read

    def stored(self) -> NDArray:
        """The weight in the type it is stored in; where the recipe is one tensor, usually a view of the mapped file."""
        return self._recipe.assemble(self._read)


class ConvertedTensor(RecipeTensor):
    """A checkpoint tensor in another type than it is stored in, or some of its columns."""


class ExpertTensor(RecipeTensor):
    """The stacked weights of a layer's experts, whole or one expert at a time."""

    _recipe: Stacked | InterleavedStack

    def experts(self) -> Iterator[NDArray]:
        """Each expert's weights [rows, columns] in the type they are stored in. Raises ExportError where the shape is wrong."""
        for recipe in self._recipe.experts():
            array = recipe.assemble(self._read)[0]
            if array.shape != tuple(self.shape.numpy())[1:]:
                raise ExportError(f"an expert of {self.name} assembles to shape {list(array.shape)}")
            yield array
