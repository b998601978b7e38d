"""From the canonical graph to one that ONNX Runtime's CPU provider runs fast, or to one that its CUDA provider runs; one pass per file.

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
from engines.onnxruntime.lowering.context_attention import LowerContextAttention
from engines.onnxruntime.lowering.cuda_attention import LowerCudaAttention
from engines.onnxruntime.lowering.cuda_routing import LowerCudaRouting
from engines.onnxruntime.lowering.expert_range import LowerExpertRange
from engines.onnxruntime.lowering.experts import GroupExperts
from engines.onnxruntime.lowering.linear import LowerLinear
from engines.onnxruntime.lowering.linear_attention import LowerLinearAttention
from engines.onnxruntime.lowering.opset import LowerOpset

__all__ = [
    "GroupExperts",
    "LowerAttention",
    "LowerCollectives",
    "LowerContextAttention",
    "LowerCudaAttention",
    "LowerCudaRouting",
    "LowerExpertRange",
    "LowerLinear",
    "LowerLinearAttention",
    "LowerOpset",
    "lower",
    "lower_expert_ranges",
    "lower_for_cuda",
]


def lower(model: ir.Model) -> ir.Model:
    """Lower `model` in place for any number of tokens, and return it.

    Experts stay as they are: `GroupExperts` then makes a prefill graph of it, and `lower_expert_ranges` the graph for single tokens.
    """
    passes = ir.passes.Sequential(
        IdentityEliminationPass(),
        LowerAttention(),
        LowerContextAttention(),
        LowerLinearAttention(),
        LowerLinear(),
        LowerCollectives(),
        LowerOpset(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
    )
    return passes(model).model


def lower_for_cuda(model: ir.Model) -> ir.Model:
    """Lower the graph of one rank in place for the CUDA provider and any number of tokens, and return it.

    There MoE is a grouped product, good for many tokens too, so no second graph is made for prefill.
    """
    passes = ir.passes.Sequential(
        IdentityEliminationPass(),
        LowerCudaAttention(),
        LowerLinearAttention(),
        LowerCudaRouting(),
        LowerLinear(),
        LowerOpset(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
    )
    return passes(model).model


def lower_expert_ranges(model: ir.Model) -> ir.Model:
    """Give experts over a range of all, if there are any, the form that ONNX Runtime runs; in place."""
    return ir.passes.Sequential(LowerExpertRange(), CommonSubexpressionEliminationPass())(model).model
