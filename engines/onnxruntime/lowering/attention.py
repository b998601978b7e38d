"""Softmax attention over a cache -> `com.microsoft::GroupQueryAttention`.

ONNX Runtime's `Attention` computes and stores a score for every slot of the cache's capacity; the group query
kernel only for those in use, and it writes the new keys and values into the cache itself.

Rules:
1. Matches `Attention(q, K, V, nonpad_kv_seqlen=n)` with `is_causal=1`, no mask, no window, no softcap, where
   K = `TensorScatter(past_key, k, w)` and V = `TensorScatter(past_value, v, w)` on axis 2, same w.
2. The new node takes seqlens_k = w + T - 1 and the longest w + T, and writes the new keys at w. The canonical n is
   the same w + T; this is checked: n must be Add(w, a dimension).
3. q, k and v are wanted as [B, T, heads * K]. A reshape and transpose that split the heads are taken back, also
   through `RotaryEmbedding`, which then gets `num_heads`; otherwise a transpose and reshape are added.
4. The same for the output.
5. The scale is kept (default 1/sqrt(K) on both sides).

6. Attention of a segment's queries (`context_attention`) is left alone.

Limit that the session keeps: with several new tokens and a past, the kernel takes one row at a time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.rewrite import (
    CONTRIB,
    constant_before,
    drop_dead,
    produced_by,
    put_in_place_of,
    sole_consumer,
    static_dims,
    swaps_tokens_and_heads,
    take_over,
)


class LowerAttention(ir.passes.InPlacePass):
    """Attention with a cache as one group query node (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        lengths: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        for node in list(model.graph):
            if node.op_type == "Attention" and node.domain == "" and not is_of_segment(node):
                to_group_query(node, lengths)
                modified = True
        if modified:
            model.graph.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, modified)


def is_of_segment(node: ir.Node) -> bool:
    """Whether it is attention of some of the queries of a chunk: rule 1 of `context_attention`."""
    if node.op_type != "Attention" or node.domain != "":
        return False
    write, total = produced_by(_input(node, 1), "TensorScatter"), produced_by(_input(node, 6), "Add")
    begin = produced_by(total.inputs[0], "Add") if total is not None else None
    return write is not None and begin is not None and write.inputs[2] in begin.inputs


def to_group_query(node: ir.Node, lengths: dict[ir.Value, tuple[ir.Value, ir.Value]]) -> None:
    """Put one group query node in the place of `node` and its cache writes; `lengths`: those already made, by the write index."""
    query, keys, values, total = node.inputs[0], node.inputs[1], node.inputs[2], _input(node, 6)
    key_write, value_write = produced_by(keys, "TensorScatter"), produced_by(values, "TensorScatter")
    if query is None or total is None or key_write is None or value_write is None:
        raise ValueError(f"{node.name}: attention without a cache and lengths is not canonical")
    _check(node, key_write, value_write, total)
    new_keys = key_write.inputs[1]
    assert new_keys is not None
    heads, groups = static_dims(query)[1], static_dims(new_keys)[1]
    if heads is None or groups is None:
        raise ValueError(f"{node.name}: the number of heads is not known")
    channels = static_dims(query)[3]
    if channels is not None and channels % 8:
        raise ValueError(f"its attention takes heads of a multiple of 8 channels, not of {channels}")

    packed_query, where = _packed(query, heads, node), key_write.inputs[2]
    assert where is not None
    if where not in lengths:
        lengths[where] = _lengths(node, where, packed_query)
    last, longest = lengths[where]
    attributes: dict = {"num_heads": heads, "kv_num_heads": groups}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"].as_float()
    new = ir.node(
        "GroupQueryAttention",
        [
            packed_query,
            _packed(key_write.inputs[1], groups, node),
            _packed(value_write.inputs[1], groups, node),
            key_write.inputs[0],
            value_write.inputs[0],
            last,
            longest,
        ],
        attributes,
        domain=CONTRIB,
        num_outputs=3,
        name=node.name,
    )
    new.outputs[0].type = query.type
    # The caches' other users (only the graph's outputs in a canonical graph) now read what the new node writes.
    put_in_place_of(node, new, [(key_write.outputs[0], new.outputs[1]), (value_write.outputs[0], new.outputs[2])])
    _unpack_output(node, new.outputs[0], heads)
    drop_dead([node, key_write, value_write])


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def check_form(node: ir.Node) -> None:
    """ValueError unless attention is causal, over all keys, without a mask and with its cache outside."""
    integers = {"left_window_size": -1, "right_window_size": -1, "is_causal": 1, "qk_matmul_output_mode": 0}
    for name, wanted in integers.items():
        if name in node.attributes and node.attributes[name].as_int() != wanted:
            raise ValueError(f"{node.name}: {name} other than {wanted} is not canonical")
    if "is_causal" not in node.attributes or any(_input(node, i) is not None for i in (3, 4, 5)):
        raise ValueError(f"{node.name}: canonical attention is causal, has no mask and keeps its cache outside")
    if "softcap" in node.attributes and node.attributes["softcap"].as_float() != 0.0:
        raise ValueError(f"{node.name}: softcap is not canonical")
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        raise ValueError(f"{node.name}: only the first output of canonical attention is used")


def _check(node: ir.Node, key_write: ir.Node, value_write: ir.Node, total: ir.Value) -> None:
    check_form(node)
    where = key_write.inputs[2]
    for write in (key_write, value_write):
        if write.attributes["axis"].as_int() != 2 or write.inputs[2] is not where:
            raise ValueError(f"{node.name}: keys and values must be written alike, on axis 2")
    add = produced_by(total, "Add")
    other = next((v for v in add.inputs if v is not where), None) if add is not None and where in add.inputs else None
    if produced_by(other, "Shape") is None and produced_by(other, "Unsqueeze") is None:
        raise ValueError(f"{node.name}: nonpad_kv_seqlen must be the write index plus the number of new tokens")


def _lengths(node: ir.Node, past: ir.Value, packed: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(past + T - 1 per row, greatest past + T), both int32, made once per graph; T is dimension 1 of `packed`."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    tokens = ir.node("Shape", [packed], {"start": 1, "end": 2})
    total = ir.node("Add", [past, tokens.outputs[0]])
    less = ir.node("Sub", [total.outputs[0], constant_before(node, np.array(1, np.int64))])
    last = ir.node("Cast", [less.outputs[0]], {"to": int(ir.DataType.INT32)})
    most = ir.node("ReduceMax", [total.outputs[0]], {"keepdims": 0})
    longest = ir.node("Cast", [most.outputs[0]], {"to": int(ir.DataType.INT32)})
    for made in (tokens, total, less, last, most, longest):
        graph.insert_before(node, made)
    return last.outputs[0], longest.outputs[0]


def _packed(value: ir.Value | None, heads: int, node: ir.Node) -> ir.Value:
    """[B, heads, T, K] -> [B, T, heads * K], by undoing how it was made where that is possible."""
    assert value is not None
    assert isinstance(node.graph, ir.Graph)
    swap = value.producer()
    if swap is not None and swaps_tokens_and_heads(swap):
        split = produced_by(swap.inputs[0], "Reshape")
        source = split.inputs[0] if split is not None else None
        if source is not None and source.shape is not None and len(source.shape) == 3:
            return source
    rotary = produced_by(value, "RotaryEmbedding")
    if rotary is not None:
        packed = _packed(rotary.inputs[0], heads, node)
        attributes = [a for name, a in rotary.attributes.items() if name != "num_heads"]
        new = ir.Node(
            "", "RotaryEmbedding", [packed, *rotary.inputs[1:]], [*attributes, ir.AttrInt64("num_heads", heads)]
        )
        new.outputs[0].type, new.outputs[0].shape = value.type, packed.shape
        node.graph.insert_before(node, new)
        return new.outputs[0]
    back = ir.node("Transpose", [value], {"perm": [0, 2, 1, 3]})
    join = ir.node("Reshape", [back.outputs[0], constant_before(node, np.array([0, 0, -1], np.int64))])
    for made in (back, join):
        node.graph.insert_before(node, made)
    return join.outputs[0]


def _unpack_output(node: ir.Node, packed: ir.Value, heads: int) -> None:
    """Give the users of attention's [B, heads, T, K] output what they want from [B, T, heads * K]."""
    output = node.outputs[0]
    swap = sole_consumer(output, "Transpose")
    join = sole_consumer(swap.outputs[0], "Reshape") if swaps_tokens_and_heads(swap) and swap is not None else None
    if swap is not None and join is not None and join.outputs[0].shape is not None and len(join.outputs[0].shape) == 3:
        take_over(join.outputs[0], packed)
        drop_dead([join, swap])
        return
    split = ir.node("Reshape", [packed, constant_before(node, np.array([0, 0, heads, -1], np.int64))])
    back = ir.node("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]})
    assert isinstance(node.graph, ir.Graph)
    for made in (split, back):
        node.graph.insert_before(node, made)
    take_over(output, back.outputs[0])
