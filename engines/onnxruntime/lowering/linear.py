"""`MatMul(x, Transpose(weight))` -> `com.microsoft::FusedMatMul(x, weight, transB=1)`.

Left alone, ONNX Runtime folds the transpose: it computes and keeps a transposed copy of every weight before it
packs it. The fused node packs straight from the mapped checkpoint bytes, or uses them where they lie.

Rules:
1. The weight is an initializer with two dimensions and the transpose has perm [1, 0].
2. The transpose goes when nobody else uses it.
"""

from __future__ import annotations

import onnx_ir as ir

from engines.rewrite import CONTRIB, drop_dead, produced_by, put_in_place_of


class LowerLinear(ir.passes.InPlacePass):
    """Linear layers that take weights in checkpoint orientation (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "MatMul" or node.domain != "":
                continue
            turned = produced_by(node.inputs[1], "Transpose")
            weight = turned.inputs[0] if turned is not None else None
            if turned is None or weight is None or not weight.is_initializer():
                continue
            if list(turned.attributes["perm"].as_ints()) != [1, 0]:
                continue
            new = ir.node("FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=CONTRIB, name=node.name)
            put_in_place_of(node, new, [(node.outputs[0], new.outputs[0])])
            drop_dead([node, turned])
            model.graph.opset_imports[CONTRIB] = 1
            modified = True
        return ir.passes.PassResult(model, modified)
