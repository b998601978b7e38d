"""Absent optional inputs of plugin operators as tensors without elements.

TensorRT's plugins know no absent inputs: the ONNX parser would shift the later inputs forward.

Rules:
1. Every absent input of a com.microsoft::MoE or QMoEInt8 node that lies before a present one becomes a constant of shape [0] and of
   the type of the node's first input.
2. The constants of one type are one value.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class FillAbsentInputs(ir.passes.InPlacePass):
    """Give plugin nodes an input at every place (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        empty: dict[ir.DataType, ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if node.domain == "com.microsoft" and node.op_type in ("MoE", "QMoEInt8"):
                for index, value in enumerate(node.inputs):
                    if value is None:
                        node.replace_input_with(index, _empty(model.graph, node, empty))
                        modified = True
        return ir.passes.PassResult(model, modified)


def _empty(graph: ir.Graph, node: ir.Node, made: dict[ir.DataType, ir.Value]) -> ir.Value:
    tokens = node.inputs[0]
    assert tokens is not None
    assert tokens.dtype is not None
    if tokens.dtype not in made:
        tensor = ir.tensor(np.zeros(0, dtype=tokens.dtype.numpy()), dtype=tokens.dtype)
        constant = ir.node("Constant", [], {"value": tensor})
        constant.outputs[0].type, constant.outputs[0].shape = ir.TensorType(tokens.dtype), ir.Shape([0])
        graph.insert_before(node, constant)
        made[tokens.dtype] = constant.outputs[0]
    return made[tokens.dtype]
