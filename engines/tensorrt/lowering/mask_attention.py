"""Attention with its lengths as an explicit mask: for small capacities.

TensorRT's parser drops `nonpad_kv_seqlen` without an error, and what lies behind the valid part of the cache would leak into
every result. A mask cannot be dropped. But a masked position still enters the product of probabilities and values, where a NaN
or an infinity times 0 is NaN; so what lies behind the valid part is also taken out of keys and values.

Rules:
1. `Attention(q, K, V, nonpad_kv_seqlen=n)` with is_causal=1 becomes `Attention(q, K', V', mask)` without is_causal, where
   mask[b, 0, i, s] = s <= past_lengths[b] + i. This is what the canonical form means: query i of row b sees positions
   0 .. past_lengths[b] + i and nothing else.
2. K' and V' are K and V where s < n[b], and 0 behind.
3. Mask and valid part are computed once for all layers. The mask has batch * new tokens * capacity bytes, and rule 2 passes
   over the whole cache: the builder takes this form only where both are small (`engines.tensorrt.lengths`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.rewrite import constant_before
from engines.tensorrt.lowering.canonical_attention import CachedAttention, cached_attentions, graph_input

DECOMPOSABLE = "TRT_decomposable"


class MaskAttention(ir.passes.InPlacePass):
    """Mask attention over a cache of `capacity` positions explicitly (rules above)."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        shared: tuple[ir.Value, ir.Value] | None = None
        zeros: dict[ir.DataType, ir.Value] = {}
        for found in cached_attentions(model.graph):
            node = found.node
            if shared is None:
                shared = self._mask_and_valid(found, graph_input(model.graph, "past_lengths"))
            mask, valid = shared
            dtype = found.key.dtype
            if dtype is None:
                raise ValueError(f"{node.name}: the type of the cache is not known")
            if dtype not in zeros:
                zeros[dtype] = constant_before(node, np.zeros((), dtype.numpy()))
            for index, cache in ((1, found.key), (2, found.value)):
                kept = _add(node, "Where", [valid, cache, zeros[dtype]])
                kept.type, kept.shape = ir.TensorType(dtype), cache.shape
                node.replace_input_with(index, kept)
            node.replace_input_with(3, mask)
            node.replace_input_with(6, None)
            node.resize_inputs(4)
            node.attributes.pop("is_causal")
            node.attributes[DECOMPOSABLE] = ir.AttrInt64(DECOMPOSABLE, 1)
        return ir.passes.PassResult(model, modified=shared is not None)

    def _mask_and_valid(self, found: CachedAttention, past_lengths: ir.Value) -> tuple[ir.Value, ir.Value]:
        """bool [B, 1, T, S] and bool [B, 1, S, 1], computed in front of the first attention."""
        node = found.node

        def constant(values: object) -> ir.Value:
            return constant_before(node, np.asarray(values, dtype=np.int64))

        tokens = _add(node, "Squeeze", [_add(node, "Shape", [found.query], start=2, end=3)])
        offsets_T = _add(node, "Range", [constant(0), tokens, constant(1)])
        last_seen_BT = _add(node, "Add", [_add(node, "Unsqueeze", [past_lengths, constant([1])]), offsets_T])
        last_seen_B1T1 = _add(node, "Unsqueeze", [last_seen_BT, constant([1, 3])])
        mask = _add(node, "LessOrEqual", [constant(np.arange(self._capacity)), last_seen_B1T1])
        written_B111 = _add(node, "Unsqueeze", [found.written, constant([1, 2, 3])])
        valid = _add(node, "Less", [constant(np.arange(self._capacity)[:, None]), written_B111])
        return mask, valid


def _add(node: ir.Node, op: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Value:
    """The value of a new node in front of `node`."""
    made = ir.node(op, inputs, attributes)
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, made)
    return made.outputs[0]
