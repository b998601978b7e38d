"""A cache of fixed capacity: TensorRT's cache layer wants a static dimension.

Rule: the dimension called "capacity" becomes the given number in every graph input and value.
"""

from __future__ import annotations

import onnx_ir as ir

CAPACITY = "capacity"


class StaticCache(ir.passes.InPlacePass):
    """Fix the capacity (rule above)."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
            if value.shape is not None and any(_is_capacity(dim) for dim in value.shape):
                value.shape = ir.Shape([self._capacity if _is_capacity(dim) else dim for dim in value.shape])
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_capacity(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value == CAPACITY
