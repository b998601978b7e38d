"""The inputs, outputs and states of a graph as an engine's configuration lists them. For building: needs onnx_ir."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from engines.config import Kind, Port, StateTensor
from engines.errors import EngineError


def port(value: ir.Value) -> Port:
    """Name, type and dimensions of a graph input or output. EngineError when one of them is not known."""
    if value.name is None or value.dtype is None or value.shape is None:
        raise EngineError(f"graph input or output {value.name} has no type or shape")
    dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return Port(value.name, value.dtype.numpy().name, dims)


def states(graph: ir.Graph) -> Iterator[StateTensor]:
    """The states among the graph's inputs, each with its output, by the names of the canonical contract."""
    outputs = {value.name: value for value in graph.outputs}
    kinds: dict[str, Kind] = {"recurrent_state": "lightning", "key": "softmax", "value": "softmax"}
    for value in graph.inputs:
        prefix, layer, role = [*(value.name or "").split("."), "", ""][:3]
        if prefix != "past_key_values":
            continue
        present = f"present.{layer}.{role}"
        if role not in kinds or not layer.isdigit() or present not in outputs:
            raise EngineError(f"graph input {value.name} is not a state of the canonical contract")
        own = port(value)
        dims = (
            ["batch", *own.dims[1:]] if role == "recurrent_state" else ["batch", own.dims[1], "capacity", own.dims[3]]
        )
        assert value.name is not None
        yield StateTensor(int(layer), kinds[role], role, value.name, present, own.dtype, dims)  # type: ignore[arg-type]
