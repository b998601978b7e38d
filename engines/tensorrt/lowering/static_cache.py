"""A cache of fixed capacity, and attention that sees its valid part only.

TensorRT's cache layer wants a static capacity, and its parser drops `nonpad_kv_seqlen` without an error: what lies behind the valid part
would leak into every result. An explicit mask cannot be dropped.

Rules:
1. The dimension called "capacity" becomes the given number in every graph input and value.
2. `Attention(q, K, V, nonpad_kv_seqlen=n)` with is_causal=1 becomes `Attention(q, K, V, mask)` without is_causal, where
   mask[b, 0, i, s] = s <= past_lengths[b] + i. This is what the canonical form means: query i of row b sees positions
   0 .. past_lengths[b] + i and nothing else.
3. The mask is computed once for all layers. Its size is batch * new tokens * capacity bytes: the builder bounds it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.rewrite import constant_before, drop_dead

CAPACITY = "capacity"


class StaticCache(ir.passes.InPlacePass):
    """Fix the capacity and mask attention explicitly (rules above)."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
            if value.shape is not None:
                value.shape = ir.Shape([self._fixed(dim) for dim in value.shape])
        mask: ir.Value | None = None
        past_lengths = next((value for value in model.graph.inputs if value.name == "past_lengths"), None)
        for node in list(model.graph):
            if node.op_type != "Attention" or node.domain != "":
                continue
            if past_lengths is None or len(node.inputs) != 7 or node.inputs[6] is None or node.inputs[3] is not None:
                raise ValueError(f"{node.name}: attention without past_lengths and nonpad_kv_seqlen is not canonical")
            if mask is None:
                mask = self._mask(node, past_lengths)
            written = node.inputs[6].producer()
            node.replace_input_with(3, mask)
            node.replace_input_with(6, None)
            node.resize_inputs(4)
            node.attributes.pop("is_causal")
            drop_dead([written])
        return ir.passes.PassResult(model, modified=True)

    def _fixed(self, dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        return self._capacity if isinstance(dim, ir.SymbolicDim) and dim.value == CAPACITY else dim

    def _mask(self, node: ir.Node, past_lengths: ir.Value) -> ir.Value:
        """bool [B, 1, T, S], computed in front of `node`."""
        graph = node.graph
        assert isinstance(graph, ir.Graph)

        def add(op: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
            made = ir.node(op, inputs, attributes)
            graph.insert_before(node, made)
            return made.outputs[0]

        def constant(values: object) -> ir.Value:
            return constant_before(node, np.asarray(values, dtype=np.int64))

        tokens = add("Squeeze", [add("Shape", [node.inputs[0]], start=2, end=3)])
        offsets_T = add("Range", [constant(0), tokens, constant(1)])
        last_seen_BT = add("Add", [add("Unsqueeze", [past_lengths, constant([1])]), offsets_T])
        last_seen_B1T1 = add("Unsqueeze", [last_seen_BT, constant([1, 3])])
        return add("LessOrEqual", [constant(np.arange(self._capacity)), last_seen_B1T1])
