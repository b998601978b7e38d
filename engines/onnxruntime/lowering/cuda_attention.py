"""Softmax attention over a cache for the CUDA provider: `GroupQueryAttention` in 16 bits, `Attention` in float32.

The CUDA provider has `com.microsoft::GroupQueryAttention` for float16 and bfloat16 only; in float32 the node would run on the CPU, and the
whole cache would travel there and back in every step. Its `Attention` (24) takes float32 and lines up causal queries as the canonical graph
wants it (the last new token with slot `nonpad_kv_seqlen` - 1, since ONNX Runtime 1.27).

Rules:
1. A 16-bit cache: as on the CPU (`attention`).
2. A float32 cache: `TensorScatter` and `Attention` stay. The windows' attributes (-1: none) are newer than the runtime's opset and go.
3. Both must have the canonical form that `attention` checks.
"""

from __future__ import annotations

import onnx_ir as ir

from engines.onnxruntime.lowering.attention import check_form, to_group_query
from engines.rewrite import CONTRIB

_WINDOWS = ("left_window_size", "right_window_size")


class LowerCudaAttention(ir.passes.InPlacePass):
    """Attention with a cache as the CUDA provider runs it (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        lengths: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in list(model.graph):
            if node.op_type != "Attention" or node.domain != "":
                continue
            modified = True
            cache = node.inputs[1]
            if cache is None or cache.dtype is None:
                raise ValueError(f"{node.name}: the type of attention's cache is not known")
            if cache.dtype != ir.DataType.FLOAT:
                to_group_query(node, lengths)
                model.graph.opset_imports[CONTRIB] = 1
                continue
            check_form(node)
            for name in _WINDOWS:
                node.attributes.pop(name, None)
        return ir.passes.PassResult(model, modified)
