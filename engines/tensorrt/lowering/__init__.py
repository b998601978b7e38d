"""From the canonical graph to what TensorRT's ONNX parser takes; one pass per file.

Each pass keeps the graph's meaning: the result, with plugin operators replaced by reference implementations, still computes what the
canonical graph does.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from engines.tensorrt.lowering.fill_absent_inputs import FillAbsentInputs
from engines.tensorrt.lowering.narrow_lightning import NarrowLightning
from engines.tensorrt.lowering.static_cache import StaticCache

__all__ = ["FillAbsentInputs", "NarrowLightning", "StaticCache", "lower"]


def lower(model: ir.Model, capacity: int) -> ir.Model:
    """Lower `model` in place for a KV cache of `capacity` tokens, and return it."""
    passes = ir.passes.Sequential(
        NarrowLightning(),
        StaticCache(capacity),
        FillAbsentInputs(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    )
    return passes(model).model
