"""Which nodes of a lowered graph ONNX Runtime's CUDA provider has no kernel for: those run on the CPU, with copies in every step.

The table beside this, `cuda_kernels.json`, was read from the library itself; its head says which version and when. Per operator it has the
version of its definition in the opset that engines declare, the names of its inputs' and outputs' types, and for each kernel what
types those names may stand for (a name that a kernel does not restrict may stand for any).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
# What has no kernel there by design: constants are folded into the graph.
_NO_KERNEL_NEEDED = ("Constant",)


@cache
def table() -> dict[str, Any]:
    """The table as it lies in the file: `library`, `read` (a date), `opset`, and `operators`."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "cuda_kernels.json").read_text())
    return found


def without_kernel(model: ir.Model) -> list[str]:
    """Operators of `model`, with their types, that have no CUDA kernel: "GroupQueryAttention (float32)"; each once, in order.

    Operators that the table does not know count as without. The runtime may put others on the CPU by its own choice: small integer
    arithmetic on lengths that a host value begins with, say.
    """
    types: dict[ir.Value, str] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype is not None:
            types[value] = _name(value.dtype)
    lacking: dict[str, None] = {}
    for node in model.graph:
        row = table()["operators"].get(f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
        found = _bound(node, row, types) if row is not None else {}
        _give_types(node, row, found, types)
        if node.op_type in _NO_KERNEL_NEEDED or (row is not None and any(_fits(k, found) for k in row["kernels"])):
            continue
        first = next((types[value] for value in node.inputs if value in types), "")
        lacking[f"{node.op_type} ({first})" if first else node.op_type] = None
    return list(lacking)


def _name(dtype: ir.DataType) -> str:
    return _NAMES.get(dtype, dtype.name.lower())


def _formal(names: list[str], index: int) -> str:
    """The type's name of an actual input or output; the last formal one may stand for many."""
    return names[min(index, len(names) - 1)]


def _bound(node: ir.Node, row: dict[str, Any], types: dict[ir.Value, str]) -> dict[str, str]:
    """What each name of a type stands for at this node, as far as its inputs and outputs tell."""
    found: dict[str, str] = {}
    for values, names in ((node.inputs, row["inputs"]), (node.outputs, row["outputs"])):
        for index, value in enumerate(values):
            if value is None:
                continue
            kind = types.get(value) or (_name(value.dtype) if value.dtype is not None else None)
            if kind is not None:
                found.setdefault(_formal(names, index), kind)
    if node.op_type == "Cast":
        found[row["outputs"][0]] = _name(ir.DataType(node.attributes["to"].as_int()))
    return found


def _give_types(node: ir.Node, row: dict[str, Any] | None, found: dict[str, str], types: dict[ir.Value, str]) -> None:
    """Note the types of the node's outputs for the nodes behind it; traced values bring their own."""
    for index, value in enumerate(node.outputs):
        formal = _formal(row["outputs"], index) if row is not None and row["outputs"] else ""
        if node.op_type == "Cast" or value.dtype is None:
            kind = found.get(formal) or (formal if formal in ("int64", "bool") else None)
        else:
            kind = _name(value.dtype)
        if kind is None and node.op_type == "Constant" and "value" in node.attributes:
            kind = _name(node.attributes["value"].as_tensor().dtype)
        if kind is not None:
            types[value] = kind


def _fits(kernel: dict[str, list[str]], found: dict[str, str]) -> bool:
    return all(found[name] in allowed for name, allowed in kernel.items() if name in found)
