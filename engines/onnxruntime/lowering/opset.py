"""Declare the opset that ONNX Runtime supports in full.

The canonical graph says opset 27 because of `LinearAttention`. ONNX Runtime 1.31 guarantees opsets up to 24 only.

Rules:
1. The default domain becomes opset 24.
2. A node whose operator changed in between must read the same in both: same inputs and outputs, no attribute that
   opset 24 does not know (later opsets added types, and attributes for 16-bit types, to Range and others).
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

OPSET = 24


class LowerOpset(ir.passes.InPlacePass):
    """Opset 24 (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        declared = model.graph.opset_imports[""]
        if declared <= OPSET:
            return ir.passes.PassResult(model, False)
        for node in model.graph.all_nodes():
            if node.domain == "" and not _reads_the_same(node, declared):
                raise ValueError(f"{node.op_type} of opset {declared} means something else in opset {OPSET}")
        model.graph.opset_imports[""] = OPSET
        return ir.passes.PassResult(model, True)


def _reads_the_same(node: ir.Node, declared: int) -> bool:
    new, old = onnx.defs.get_schema(node.op_type, declared, ""), onnx.defs.get_schema(node.op_type, OPSET, "")
    return new.since_version == old.since_version or (
        [p.name for p in new.inputs] == [p.name for p in old.inputs]
        and [p.name for p in new.outputs] == [p.name for p in old.outputs]
        and set(node.attributes) <= set(old.attributes)
    )
