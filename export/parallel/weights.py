"""One rank's weights, bound to the checkpoint as slices; nothing is read until somebody asks.

A part that is a run of whole rows of a stored tensor (qkv, gates, vocabulary) is referred to in place, by offset. What is cut by
columns, stacked from experts or stored in another type is made on demand from views of the mapped file, one tensor at a time: no rank
touches bytes that it does not hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ExportError
from export.parallel.plan import Part, ShardingPlan
from export.weights import Entry, Source, bound_tensor
from model_defs.weights import Direct, InterleavedStack, Recipe, Stacked, weight_recipes


def bind_rank_weights(model: ir.Model, plan: ShardingPlan, rank: int, source: Source) -> None:
    """Give every weight initializer of a rank's graph (`export.parallel.shard`) its value.

    Raises:
        ExportError: a tensor is missing, or its shape is not what the model needs.
    """
    for name, recipe in weight_recipes(plan.config).items():
        value = model.graph.initializers[name]
        value.const_value = rank_tensor(name, recipe, value, plan, rank, source)


def rank_tensor(
    name: str, recipe: Recipe, value: ir.Value, plan: ShardingPlan, rank: int, source: Source
) -> ir.TensorProtocol:
    """The tensor for one initializer; see `bind_rank_weights`."""
    part = plan.part(name, rank)
    shape = _stored_shape(recipe, plan.shapes[name])
    for tensor in recipe.tensors:
        if tensor not in source.entries:
            raise ExportError(f"the checkpoint has no tensor {tensor!r}")
        found = tuple(source.entries[tensor].shape)
        if found != shape:
            raise ExportError(f"tensor {tensor!r} has shape {list(found)}, the model needs {list(shape)}")
    mine, cut = _rank_recipe(recipe, part)
    sliced = _SlicedSource(source, cut, mine.tensors)
    if part.shape != plan.held_shape(name):
        return _padded(name, mine, value, part, sliced)
    return bound_tensor(name, mine, value, sliced)


def _padded(name: str, recipe: Recipe, value: ir.Value, part: Part, source: _SlicedSource) -> ir.LazyTensor:
    """A part of the vocabulary that ends early, with rows of zeros behind it."""
    assert value.shape is not None
    assert value.dtype is not None
    shape, dtype = value.shape, value.dtype

    def assemble() -> ir.TensorProtocol:
        array = np.zeros(shape.numpy(), dtype.numpy())
        array[: part.shape[0]] = recipe.assemble(source.array)
        return ir.tensor(array, dtype=dtype, name=name)

    return ir.LazyTensor(assemble, dtype=dtype, shape=shape, name=name, cache=False)


def _stored_shape(recipe: Recipe, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of each checkpoint tensor of a parameter of this shape."""
    if isinstance(recipe, Direct):
        return shape
    if isinstance(recipe, Stacked):
        return shape[1:]
    return (shape[1] // 2, shape[2])


def _rank_recipe(recipe: Recipe, part: Part) -> tuple[Recipe, tuple[slice, ...]]:
    """The rank's recipe, and which slice of each of its tensors it takes."""
    if isinstance(recipe, Direct):
        return recipe, part.slices
    experts = slice(*part.ranges[0])
    if isinstance(recipe, Stacked):
        return Stacked(recipe.tensors[experts]), part.slices[1:]
    (start, end), columns = part.ranges[1], part.slices[2]
    # Rows 2i and 2i + 1 of the interleaved form are row i of both tensors; a part holds whole pairs.
    return InterleavedStack(recipe.even[experts], recipe.odd[experts]), (slice(start // 2, end // 2), columns)


class _SlicedSource:
    """A checkpoint as if its tensors were only their slices."""

    def __init__(self, source: Source, cut: tuple[slice, ...], tensors: tuple[str, ...]) -> None:
        self._source, self._cut = source, cut
        self.entries = {name: _SlicedEntry.of(source.entries[name], cut) for name in tensors}

    def array(self, name: str) -> NDArray:
        return self._source.array(name)[self._cut]


@dataclass(frozen=True)
class _SlicedEntry:
    file: object
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, entry: Entry, cut: tuple[slice, ...]) -> _SlicedEntry:
        shape = tuple(part.stop - part.start for part in cut)
        whole_rows = all(
            part.stop - part.start == length for part, length in zip(cut[1:], entry.shape[1:], strict=True)
        )
        row = entry.nbytes // max(1, entry.shape[0])
        return cls(
            entry.file,
            entry.offset + cut[0].start * row,
            math.prod(shape) * (row // max(1, math.prod(entry.shape[1:]))),
            # What is no run of bytes in the file must not be referred to by offset.
            entry.dtype if whole_rows else f"{entry.dtype} in columns",
            shape,
        )
