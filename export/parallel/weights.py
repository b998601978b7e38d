"""One rank's weights, bound to the checkpoint as slices; nothing is read until somebody asks.

A part that is a run of whole rows of a stored tensor (qkv, gates, vocabulary) is referred to in place, by offset. What is cut by
columns or stacked from experts says of which bytes it is made (`export.pieces`); that and what is stored in another type can also be made
on demand from views of the mapped file, one tensor at a time: no rank touches bytes that it does not hold.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.parallel.plan import Part, ShardingPlan
from export.pieces import Cut, zeros
from export.weights import MadeTensor, Source, bound_tensor, stored_pieces
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
    stored = recipe.stored_shape(plan.shapes[name])
    mine, cut = _rank_recipe(recipe, part)
    if part.shape == plan.held_shape(name):
        return bound_tensor(name, mine, value, source, stored, cut)
    held = ir.Value(name=name, type=value.type, shape=ir.Shape(part.shape))
    return _padded(bound_tensor(name, mine, held, source, stored, cut), value)


def _padded(early: ir.TensorProtocol, value: ir.Value) -> ir.TensorProtocol:
    """A part of the vocabulary that ends early, with rows of zeros behind it."""
    assert value.shape is not None
    assert value.dtype is not None
    assert value.name is not None
    shape, dtype = value.shape, value.dtype

    def made() -> NDArray:
        array = np.zeros(shape.numpy(), dtype.numpy())
        array[: early.shape[0]] = early.numpy()
        return array

    pieces = stored_pieces(early)
    if pieces is not None:
        pieces += (zeros(math.prod(shape.numpy()) * dtype.numpy().itemsize - early.nbytes),)
    return MadeTensor(made, dtype, shape, value.name, pieces)


def _rank_recipe(recipe: Recipe, part: Part) -> tuple[Recipe, Cut]:
    """The rank's recipe, and which slice of each of its tensors it takes."""
    if isinstance(recipe, Direct):
        return recipe, part.slices
    experts = slice(*part.ranges[0])
    if isinstance(recipe, Stacked):
        return Stacked(recipe.tensors[experts]), part.slices[1:]
    (start, end), columns = part.ranges[1], part.slices[2]
    # Rows 2i and 2i + 1 of the interleaved form are row i of both tensors; a part holds whole pairs.
    return InterleavedStack(recipe.even[experts], recipe.odd[experts]), (slice(start // 2, end // 2), columns)
