"""The canonical form of attention over a cache with lengths, as the passes of this folder meet it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class CachedAttention:
    """`node` is Attention(q, K, V, nonpad_kv_seqlen=past + T) with is_causal=1, padding counted in; query i of a row sees 0 .. past + i."""

    node: ir.Node
    query: ir.Value  # [B, H, T, K]
    key: ir.Value  # [B, G, S, K]
    value: ir.Value  # [B, G, S, K]
    written: ir.Value  # int64 [B], past + T


def cached_attentions(graph: ir.Graph) -> Iterator[CachedAttention]:
    """All of a graph, in order. ValueError for attention of another form: its lengths would be lost."""
    for node in list(graph):
        if node.op_type != "Attention" or node.domain != "":
            continue
        inputs = list(node.inputs)
        causal = node.attributes.get("is_causal")
        if len(inputs) != 7 or any(inputs[3:6]) or not all([*inputs[:3], inputs[6]]) or causal is None:
            raise ValueError(f"{node.name}: attention without nonpad_kv_seqlen and is_causal is not canonical")
        query, key, value, written = inputs[0], inputs[1], inputs[2], inputs[6]
        assert query is not None
        assert key is not None
        assert value is not None
        assert written is not None
        yield CachedAttention(node, query, key, value, written)


def graph_input(graph: ir.Graph, name: str) -> ir.Value:
    """The graph input called `name`. ValueError where there is none."""
    found = next((value for value in graph.inputs if value.name == name), None)
    if found is None:
        raise ValueError(f"the graph has attention but no input {name}")
    return found
