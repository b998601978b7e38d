"""Softmax attention of a rank that computes only some of the queries of a chunk (context parallelism): over the slots in use.

The group query operator writes as many keys as it has queries. Here all ranks' keys are written and one segment's queries
asked, so `Attention` stays, which computes a score for every slot that it is given.

Rules:
1. Matches `Attention` with `nonpad_kv_seqlen` = Add(Add(p, shift), number of queries) over caches that are written at p; other nodes
   stay as they are.
2. As in `attention`, it must be causal over all keys, with no mask. The windows' attributes (-1: none) are newer than the runtime's opset
   and go.
3. Keys and values are cut behind the longest row's last visible slot. The copy reads what attention reads anyway, for every query.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.onnxruntime.lowering.attention import check_form, is_of_segment
from engines.rewrite import constant_before


class LowerContextAttention(ir.passes.InPlacePass):
    """Attention of one segment's queries (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if is_of_segment(node):
                _lower(node)
                modified = True
        return ir.passes.PassResult(model, modified)


def _lower(node: ir.Node) -> None:
    graph, total = node.graph, node.inputs[6]
    assert isinstance(graph, ir.Graph)
    assert total is not None
    check_form(node)
    for name in ("left_window_size", "right_window_size"):
        node.attributes.pop(name, None)
    longest = ir.node("ReduceMax", [total], {"keepdims": 1})
    graph.insert_before(node, longest)
    for index in (1, 2):
        cache = node.inputs[index]
        assert cache is not None
        bounds = [constant_before(node, np.array([0], np.int64)), longest.outputs[0]]
        used = ir.node("Slice", [cache, *bounds, constant_before(node, np.array([2], np.int64))])
        used.outputs[0].type = cache.type
        graph.insert_before(node, used)
        node.replace_input_with(index, used.outputs[0])
