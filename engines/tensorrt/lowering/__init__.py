"""From the canonical graph to what TensorRT's ONNX parser takes; one pass per file.

Each pass keeps the graph's meaning: the result, with plugin operators replaced by reference implementations, still computes what the
canonical graph does.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from engines.tensorrt.lowering.fill_absent_inputs import FillAbsentInputs
from engines.tensorrt.lowering.mask_attention import MaskAttention
from engines.tensorrt.lowering.narrow_lightning import NarrowLightning
from engines.tensorrt.lowering.plugin_attention import PluginAttention
from engines.tensorrt.lowering.signed_experts import SignedExperts
from engines.tensorrt.lowering.static_cache import StaticCache

__all__ = [
    "FillAbsentInputs",
    "MaskAttention",
    "NarrowLightning",
    "PluginAttention",
    "SignedExperts",
    "StaticCache",
    "lower",
]

Attention = Literal["mask", "plugin"]


def lower(model: ir.Model, capacity: int, attention: Attention) -> ir.Model:
    """Lower `model` in place for a KV cache of `capacity` tokens, and return it.

    `attention`: how lengths reach attention, by an explicit mask or by our plugin (`engines.tensorrt.lengths`).
    """
    passes = ir.passes.Sequential(
        NarrowLightning(),
        StaticCache(capacity),
        MaskAttention(capacity) if attention == "mask" else PluginAttention(),
        SignedExperts(),
        FillAbsentInputs(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    )
    return passes(model).model
