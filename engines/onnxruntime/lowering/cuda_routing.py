"""`com.microsoft::MoE` with 16-bit weights behind a float32 router -> one whose router logits have the weights' type.

ONNX Runtime's operator has one type for tokens, weights and logits. Logits rounded to 16 bits would choose other experts wherever two of
them lie within rounding, so the choice is made in front, in float32.

Rules:
1. A node whose logits have the tokens' type stays as it is.
2. The k largest logits are taken in float32. Their distances to the largest, at most 0, are rounded to the tokens' type; experts that were
   not chosen get a number whose exponential is 0. So the operator chooses the same experts.
3. Of two chosen experts the first one's logit, which would be 0, is what rounding took from the second one's, with the other sign: the
   operator only sees the difference, which is then right to twice the digits. With other k a routing weight is off by up to
   |distance| * 2^-9 of itself in bfloat16, 2^-12 in float16.
4. Routing weights must be divided by their sum, as canonical ones are: then what was not chosen has no part in them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.rewrite import CONTRIB, constant_before

NOT_CHOSEN = -3e4  # within float16's range; its exponential is 0 in float32


class LowerCudaRouting(ir.passes.InPlacePass):
    """Routing in float32 in front of 16-bit experts (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "MoE" or node.domain != CONTRIB:
                continue
            weights, router = node.inputs[2], node.inputs[1]
            if weights is None or router is None or weights.dtype is None:
                raise ValueError(f"{node.name}: the experts' inputs are not known")
            if weights.dtype != ir.DataType.FLOAT:
                _route(node, router, weights.dtype)
                modified = True
        return ir.passes.PassResult(model, modified)


def _route(node: ir.Node, router: ir.Value, dtype: ir.DataType) -> None:
    if not node.attributes["normalize_routing_weights"].as_int():
        raise ValueError(f"{node.name}: routing weights that are not divided by their sum are not canonical")
    graph = node.graph
    assert isinstance(graph, ir.Graph)

    def put(operator: str, *inputs: ir.Value, outputs: int = 1, **attributes: int) -> list[ir.Value]:
        new = ir.node(operator, list(inputs), attributes or None, num_outputs=outputs)
        graph.insert_before(node, new)
        return list(new.outputs)

    count = constant_before(node, np.array([node.attributes["k"].as_int()], np.int64))
    zero, one, last_axis = (constant_before(node, np.array([number], np.int64)) for number in (0, 1, -1))
    top, chosen = put("TopK", router, count, outputs=2, axis=-1)
    largest = put("Slice", top, zero, one, last_axis)[0]  # the first; ReduceMax would need cuDNN
    distance = put("Sub", top, largest)[0]
    if node.attributes["k"].as_int() == 2:
        near = put("Cast", put("Cast", distance, to=int(dtype))[0], to=int(ir.DataType.FLOAT))[0]
        two = constant_before(node, np.array([2], np.int64))
        lost = put("Slice", put("Sub", distance, near)[0], one, two, last_axis)[0]
        first = constant_before(node, np.array([1.0, 0.0], np.float32))
        distance = put("Sub", near, put("Mul", lost, first)[0])[0]
    shape = put("Shape", router)[0]
    none = put("Expand", constant_before(node, np.array(NOT_CHOSEN, np.float32)), shape)[0]
    logits = put("ScatterElements", none, chosen, distance, axis=-1)[0]
    rounded = put("Cast", logits, to=int(dtype))[0]
    for value, kind in ((top, ir.DataType.FLOAT), (chosen, ir.DataType.INT64), (rounded, dtype)):
        value.type = ir.TensorType(kind)
    node.replace_input_with(1, rounded)
