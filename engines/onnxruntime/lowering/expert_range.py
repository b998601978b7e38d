"""`MoE` or `QMoE` over a range of local experts -> the operator as ONNX Runtime has it, over the tokens that chose one of them.

The canonical node of an expert-parallel rank takes the router's logits of all experts, the weights of a contiguous range, and
`first_local_expert`. Its output is the local experts' share of the sum; the ranks' shares are added later.

Rules:
1. Routing is done in front, over all experts: softmax, top k, weights divided by their sum; then the local columns are cut out.
2. Tokens without a local expert (most of them, in long prompts) are left out and get zeros.
3. The operator takes the remaining tokens with logits log(w) for a chosen local expert and -1e30 for any other: its softmax gives
   w / sum(local w), which is multiplied by that sum afterwards. Exact, not an approximation: exp(-1e30) is 0.
4. k becomes the number of local experts where that is smaller.
5. A node without the attribute stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from engines.rewrite import CONTRIB, put_in_place_of

ATTRIBUTE = "first_local_expert"
NOT_CHOSEN = -1e30


class LowerExpertRange(ir.passes.InPlacePass):
    """Experts of one rank (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type in ("MoE", "QMoE") and node.domain == CONTRIB and ATTRIBUTE in node.attributes:
                _lower(node)
                modified = True
        return ir.passes.PassResult(model, modified)


def _lower(node: ir.Node) -> None:
    x, router, fc1 = node.inputs[0], node.inputs[1], node.inputs[2]
    if x is None or router is None or fc1 is None or fc1.shape is None or x.shape is None:
        raise ValueError(f"{node.name}: the experts' inputs are not known")
    if not node.attributes["normalize_routing_weights"].as_int():
        raise ValueError(f"{node.name}: routing weights that are not divided by their sum are not canonical")
    local, first = fc1.shape.numpy()[0], node.attributes[ATTRIBUTE].as_int()
    k = node.attributes["k"].as_int()
    put = _Put(node)
    probabilities = put("Softmax", router, axis=-1)
    top, chosen = put("TopK", probabilities, put.const([k]), outputs=2, axis=-1)
    weights = put("Div", top, put("ReduceSum", top, put.const([-1]), keepdims=1))
    every = put("ScatterElements", put.zeros_like(probabilities), chosen, weights, axis=-1)
    mine = put("Slice", every, put.const([first]), put.const([first + local]), put.const([-1]))
    share = put("ReduceSum", mine, put.const([-1]), keepdims=1)
    zero = put.const(np.float32(0))
    is_mine = put("Greater", share, zero)
    rows = put("Transpose", put("NonZero", put("Squeeze", is_mine, put.const([-1]))), perm=[1, 0])  # [tokens here, 1]
    mine, share = put("GatherND", mine, rows), put("GatherND", share, rows)
    logits = put("Where", put("Greater", mine, zero), put("Log", mine), put.const(np.float32(NOT_CHOSEN)))
    hidden = put("Reshape", x, put.const([-1, x.shape[-1]]))
    attributes = {key: value for key, value in node.attributes.items() if key != ATTRIBUTE}
    attributes["k"] = ir.AttrInt64("k", min(k, local))
    attributes["normalize_routing_weights"] = ir.AttrInt64("normalize_routing_weights", 0)
    inputs = [put("GatherND", hidden, rows), logits, *node.inputs[2:]]
    experts = put.add(ir.Node(CONTRIB, node.op_type, inputs, list(attributes.values()), name=node.name))
    scaled = put("Mul", experts, share)
    spread = put("ScatterND", put.zeros_like(hidden), rows, scaled)
    result = ir.node("Reshape", [spread, put("Shape", x)])
    put_in_place_of(node, result, [(node.outputs[0], result.outputs[0])])
    assert isinstance(result.graph, ir.Graph)
    result.graph.remove(node, safe=True)


class _Put:
    """Adds nodes in front of `node`."""

    def __init__(self, node: ir.Node) -> None:
        assert isinstance(node.graph, ir.Graph)
        self.node, self.graph = node, node.graph
        self.stem, self.count = node.outputs[0].name, 0

    def __call__(self, operator: str, *inputs: ir.Value, outputs: int = 1, **attributes: Any) -> Any:
        new = ir.node(operator, list(inputs), attributes or None, num_outputs=outputs)
        for value in new.outputs:
            self.count += 1
            value.name = f"{self.stem}.{operator.lower()}.{self.count}"
        self.graph.insert_before(self.node, new)
        return new.outputs[0] if outputs == 1 else new.outputs

    def add(self, new: ir.Node) -> ir.Value:
        new.outputs[0].name = f"{self.stem}.local"
        self.graph.insert_before(self.node, new)
        return new.outputs[0]

    def zeros_like(self, value: ir.Value) -> ir.Value:
        return self("ConstantOfShape", self("Shape", value), value=ir.tensor(np.zeros(1, np.float32)))

    def const(self, value: Any) -> ir.Value:
        array = np.asarray(value)
        return self("Constant", value=ir.tensor(array.astype(np.int64) if array.dtype.kind == "i" else array))
