"""`LinearAttention` (ONNX 27) -> `com.microsoft::LinearAttention`, the only one with a CPU kernel in ONNX Runtime.

Rules:
1. Same inputs, outputs and attributes; inputs must be float32 (the kernel has no other type).
2. `scale` must be written out: 0, the default, means 1/sqrt(K) on both sides.

A chunked form made of matrix products was measured as well and is slower at every shape tried
(`docs/lowering-onnxruntime.md`), so prefill and decode share this node.
"""

from __future__ import annotations

import onnx_ir as ir

from engines.rewrite import CONTRIB, put_in_place_of


class LowerLinearAttention(ir.passes.InPlacePass):
    """Linear attention as ONNX Runtime's own operator (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "LinearAttention" or node.domain != "":
                continue
            for value in node.inputs:
                if value is not None and value.dtype not in (None, ir.DataType.FLOAT):
                    raise ValueError(f"{node.name}: {value.name} is {value.dtype}, the CPU kernel takes float32 only")
            if "scale" not in node.attributes or node.attributes["scale"].as_float() == 0.0:
                raise ValueError(f"{node.name}: the scale of LinearAttention must be given")
            new = ir.Node(
                CONTRIB, "LinearAttention", node.inputs, node.attributes.values(), num_outputs=2, name=node.name
            )
            put_in_place_of(node, new, list(zip(node.outputs, new.outputs, strict=True)))
            model.graph.remove(node, safe=True)
            model.graph.opset_imports[CONTRIB] = 1
            modified = True
        return ir.passes.PassResult(model, modified)
