"""Lightning attention in the model's 16-bit type around the plugin.

The canonical graph widens q, k and v to fp32, because ONNX wants one type for q, k, v and decay. Our plugin takes 16-bit q, k, v with fp32
decay and state, and computes in fp32 inside: widening outside would only double the traffic.

Rules:
1. Matches `LinearAttention(Cast(q), Cast(k) * valid, Cast(v) * valid, state, decay)`, where the casts widen a 16-bit type.
2. q enters as it is; k and v are multiplied by the narrowed `valid`, which is 0 or 1 and so exact in any type.
3. The output takes the 16-bit type, and the cast that narrowed it goes away.
4. State and decay stay fp32. An fp32 model stays as it is.
"""

from __future__ import annotations

import onnx_ir as ir

from engines.rewrite import produced_by, take_over


class NarrowLightning(ir.passes.InPlacePass):
    """Feed LinearAttention the 16-bit values that were widened for it (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        narrowed_masks: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if node.op_type == "LinearAttention" and node.domain == "":
                modified |= _narrow(model.graph, node, narrowed_masks)
        return ir.passes.PassResult(model, modified)


def _narrow(graph: ir.Graph, node: ir.Node, masks: dict[tuple[ir.Value, ir.DataType], ir.Value]) -> bool:
    query = produced_by(node.inputs[0], "Cast")
    if query is None:
        return False
    narrow = query.inputs[0]
    assert narrow is not None
    dtype = narrow.dtype
    if dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return False
    node.replace_input_with(0, narrow)
    for index in (1, 2):
        node.replace_input_with(index, _narrow_product(graph, node, index, dtype, masks))
    output = node.outputs[0]
    consumers = [use.node for use in output.uses()]
    if len(consumers) != 1 or consumers[0].op_type != "Cast" or consumers[0].outputs[0].dtype != dtype:
        raise ValueError(f"{node.name}: the output of lightning attention is not narrowed to {dtype}")
    cast = consumers[0]
    output.type = cast.outputs[0].type
    take_over(cast.outputs[0], output)
    graph.remove(cast, safe=True)
    return True


def _narrow_product(
    graph: ir.Graph, node: ir.Node, index: int, dtype: ir.DataType, masks: dict[tuple[ir.Value, ir.DataType], ir.Value]
) -> ir.Value:
    """`Cast(x) * valid` as `x * Cast(valid)`, in front of `node`."""
    product = produced_by(node.inputs[index], "Mul")
    cast = produced_by(product.inputs[0], "Cast") if product is not None else None
    if product is None or cast is None:
        raise ValueError(f"{node.name}: input {index} of lightning attention is not a masked, widened value")
    source, valid = cast.inputs[0], product.inputs[1]
    assert source is not None
    assert valid is not None
    if (valid, dtype) not in masks:
        narrow_mask = ir.node("Cast", [valid], {"to": int(dtype)})
        narrow_mask.outputs[0].type, narrow_mask.outputs[0].shape = ir.TensorType(dtype), valid.shape
        graph.insert_before(node, narrow_mask)
        masks[valid, dtype] = narrow_mask.outputs[0]
    masked = ir.node("Mul", [source, masks[valid, dtype]])
    masked.outputs[0].type, masked.outputs[0].shape = ir.TensorType(dtype), product.outputs[0].shape
    graph.insert_before(node, masked)
    return masked.outputs[0]
