"""From the canonical graph to one that ONNX Runtime's CPU provider runs fast; one pass per file.

Each pass leaves a graph that ONNX Runtime could run with the same results. Choices rest on the measurements in
`docs/lowering-onnxruntime.md`.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from engines.onnxruntime.lowering.attention import LowerAttention
from engines.onnxruntime.lowering.collectives import LowerCollectives
from engines.onnxruntime.lowering.expert_range import LowerExpertRange
from engines.onnxruntime.lowering.experts import GroupExperts
from engines.onnxruntime.lowering.linear import LowerLinear
from engines.onnxruntime.lowering.linear_attention import LowerLinearAttention
from engines.onnxruntime.lowering.opset import LowerOpset

__all__ = [
    "GroupExperts",
    "LowerAttention",
    "LowerCollectives",
    "LowerExpertRange",
    "LowerLinear",
    "LowerLinearAttention",
    "LowerOpset",
    "lower",
]


def lower(model: ir.Model) -> ir.Model:
    """Lower `model` in place for any number of tokens, and return it. `GroupExperts` then makes a prefill graph of it."""
    passes = ir.passes.Sequential(
        IdentityEliminationPass(),
        LowerAttention(),
        LowerLinearAttention(),
        LowerLinear(),
        LowerExpertRange(),
        LowerCollectives(),
        LowerOpset(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
    )
    return passes(model).model
