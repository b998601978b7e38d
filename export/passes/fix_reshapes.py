"""Pass: give reshapes constant targets."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class FixReshapes(ir.passes.InPlacePass):
    """Replace a reshape target computed from dynamic sizes by a constant.

    1. A dynamic output dimension equal to the input's dimension at the same place becomes 0 (copy it).
    2. At most one other dynamic output dimension becomes -1 (whatever is left).
    3. A reshape with two or more such dimensions, or of unknown shape, stays as it is.
    4. Output shapes do not change. Runtimes gain nodes that need no work at each step (a decode step is short).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type == "Reshape" and node.domain == "":
                modified |= _fix(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _fix(graph: ir.Graph, node: ir.Node) -> bool:
    source, target = node.inputs
    before, after = source.shape if source else None, node.outputs[0].shape
    if target is None or target.producer() is None or target.producer().op_type == "Constant":  # type: ignore[union-attr]
        return False
    if before is None or after is None:
        return False
    sizes: list[int] = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            sizes.append(dim)
        elif axis < len(before) and before[axis] == dim:
            sizes.append(0)
        else:
            sizes.append(-1)
    if sizes.count(-1) > 1:
        return False
    constant = ir.node("Constant", [], attributes={"value": ir.tensor(np.asarray(sizes, dtype=np.int64))})
    graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    return True
