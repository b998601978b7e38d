"""Small helpers that the passes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"


def put_in_place_of(old: ir.Node, new: ir.Node, pairs: Sequence[tuple[ir.Value, ir.Value]]) -> None:
    """Insert `new` before `old`; for each (old value, new value) move name, type, shape and uses to the new value."""
    graph = old.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(old, new)
    for before, after in pairs:
        take_over(before, after)


def take_over(before: ir.Value, after: ir.Value) -> None:
    """Let `after` be what `before` was to its consumers and to the graph's outputs, under its name."""
    name, after.type = before.name, after.type or before.type
    if after.shape is None:
        after.shape = before.shape
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    before.name = None
    after.name = name


def drop_dead(nodes: Sequence[ir.Node | None]) -> None:
    """Remove those of `nodes` that no one uses any more; consumers must come before producers."""
    for node in nodes:
        if node is None or node.graph is None:
            continue
        if all(not out.uses() and not out.is_graph_output() for out in node.outputs):
            node.graph.remove(node, safe=True)


def constant_before(node: ir.Node, value: np.ndarray) -> ir.Value:
    """A Constant node in front of `node`; its value."""
    made = ir.node("Constant", [], {"value": ir.tensor(value)})
    made.outputs[0].shape = ir.Shape(value.shape)
    made.outputs[0].type = ir.TensorType(made.attributes["value"].as_tensor().dtype)
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, made)
    return made.outputs[0]


def produced_by(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that produces `value` if it is of this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def sole_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that uses `value`, if there is just one use and it is of this type."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type == op_type and node.domain == "" else None


def swaps_tokens_and_heads(node: ir.Node | None) -> bool:
    """Whether it is the transpose between [B, T, heads, K] and [B, heads, T, K]."""
    return node is not None and node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def static_dims(value: ir.Value) -> list[int | None]:
    """Dimensions of `value`, None where dynamic. Raises ValueError when the rank is unknown."""
    if value.shape is None:
        raise ValueError(f"the shape of {value.name} is not known; run shape inference before lowering")
    return [dim if isinstance(dim, int) else None for dim in value.shape]
