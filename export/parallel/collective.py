"""Exchange nodes between ranks, as TensorRT's ONNX parser reads them: operator `DistCollective` in the default domain.

TensorRT-RTX 1.7.1 and TensorRT 11 take `collective_operation` and `reduce_op` in lower case, `root` -1 where there is none, and
`nb_rank`, how many take part; without `groups`, all ranks do and `group_size` must be left out. With it, `groups` lists the ranks
of the group that this rank belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

OPERATOR = "DistCollective"
ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"


def all_reduce(value: ir.Value, ranks: int, group: Sequence[int] = ()) -> ir.Node:
    """Sum of `value` over `ranks` ranks: those of `group`, or all; on each of them, in the type of `value`. Not yet in a graph."""
    return _collective(value, ALL_REDUCE, "sum", ranks, group, value.shape)


def all_gather(value: ir.Value, ranks: int, group: Sequence[int] = ()) -> ir.Node:
    """`value` of `ranks` ranks, those of `group` or all, one behind the other along axis 0. Not yet in a graph."""
    assert value.shape is not None
    first, *rest = value.shape
    assert isinstance(first, int)
    return _collective(value, ALL_GATHER, "none", ranks, group, ir.Shape([first * ranks, *rest]))


def _collective(
    value: ir.Value, operation: str, reduce_op: str, ranks: int, group: Sequence[int], shape: ir.Shape | None
) -> ir.Node:
    attributes: dict[str, str | int | Sequence[int]] = {
        "collective_operation": operation,
        "reduce_op": reduce_op,
        "root": -1,
        "nb_rank": ranks,
    }
    if group:
        attributes |= {"groups": list(group), "group_size": len(group)}
    node = ir.node(OPERATOR, [value], attributes, name=f"{value.name}.{operation}")
    output = node.outputs[0]
    output.name, output.type = f"{value.name}.{operation}", value.type
    output.shape = None if shape is None else ir.Shape(list(shape))
    return node


def register_schema() -> None:
    """Make DistCollective known to the onnx package of this process, for its checker. Safe to call again."""
    if onnx.defs.has(OPERATOR, ""):
        return
    attribute, kind = OpSchema.Attribute, OpSchema.AttrType
    onnx.defs.register_schema(
        OpSchema(
            OPERATOR,
            "",
            1,
            doc="An exchange between the ranks of a parallel run, as TensorRT's ONNX parser defines it.",
            inputs=[OpSchema.FormalParameter("input", "T", "this rank's values")],
            outputs=[OpSchema.FormalParameter("output", "T", "the same on all ranks")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
            attributes=[
                attribute("collective_operation", kind.STRING, "all_reduce or all_gather"),
                attribute("reduce_op", kind.STRING, "sum or none"),
                attribute("root", kind.INT, "-1: none", required=False),
                attribute("nb_rank", kind.INT, "ranks that take part", required=False),
                attribute("groups", kind.INTS, "the ranks that take part; all without it", required=False),
                attribute("group_size", kind.INT, "length of groups", required=False),
            ],
        )
    )
