"""Cut a lowered graph at its collectives.

Rules:
1. A node goes into the earliest piece in which all it reads is there; a collective stands behind the piece that computes its input.
2. Every boundary has exactly one exchange; all ranks have the same ones in the same order.
3. Constants are copied into every piece that reads them, so that each piece folds them; other values cross boundaries as inputs.
4. Weights go to the pieces that read them, by reference.
"""

from __future__ import annotations

import onnx

from engines.errors import EngineError
from engines.onnxruntime.lowering.collectives import DOMAIN, OPERATOR
from engines.parallel.pieces import DIMS, Exchange, Piece


def cut(model: onnx.ModelProto) -> tuple[list[Piece], list[bytes]]:
    """The pieces of `model` and their serialized models. Raises EngineError when a value that crosses has no known type."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type for v in [*graph.input, *graph.value_info, *graph.output] if v.type.WhichOneof("value")}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant" and node.domain == ""}
    nodes, exchanges = _stages(graph, constants)
    final = {value.name for value in graph.output}
    last_read = _last_read(nodes, exchanges, final)
    made: set[str] = set()
    pieces: list[Piece] = []
    models: list[bytes] = []
    offset = 0
    for index, mine in enumerate(nodes):
        produced = {name for node in mine for name in node.output if name}
        read = list(dict.fromkeys(name for node in mine for name in _reads(node)))
        outputs = [name for node in mine for name in node.output if name and (last_read.get(name, -1) > index)]
        inputs = [name for name in read if name not in produced and name not in weights and name not in constants]
        copies = [constants[name] for name in read if name in constants]
        values = {name: _info(name, types) for name in [*inputs, *outputs]}
        piece = onnx.helper.make_graph(
            [*copies, *mine],
            f"piece{index}",
            [values[name] for name in inputs],
            [values[name] for name in outputs],
            [weights[name] for name in read if name in weights],
            # No value_info for values inside: with the names that onnx makes up for unknown dimensions, ONNX Runtime 1.31
            # returned zeros for experts over a range (measured); it infers what it needs itself.
        )
        built = onnx.helper.make_model(piece, opset_imports=model.opset_import, ir_version=model.ir_version)
        data = built.SerializeToString() if mine else b""
        exchange = _exchange(exchanges[index], types) if index < len(exchanges) else None
        if exchange is not None and exchange.source not in made | produced:
            raise EngineError(f"the exchange of {exchange.source} comes before the value")
        made |= produced
        names = [name for name in read if name in weights]
        pieces.append(Piece(offset, len(data), inputs, outputs, names, exchange))
        models.append(data)
        offset += len(data)
    return pieces, models


def _stages(
    graph: onnx.GraphProto, constants: dict[str, onnx.NodeProto]
) -> tuple[list[list[onnx.NodeProto]], list[onnx.NodeProto]]:
    """Nodes of each piece, and the collective behind each piece but the last."""
    stage: dict[str, int] = {}
    nodes: dict[int, list[onnx.NodeProto]] = {}
    exchanges: dict[int, onnx.NodeProto] = {}
    for node in graph.node:
        if node.output[0] in constants:
            continue
        here = max((stage.get(name, 0) for name in _reads(node)), default=0)
        if node.op_type == OPERATOR and node.domain == DOMAIN:
            while here in exchanges:
                here += 1
            exchanges[here] = node
            stage[node.output[0]] = here + 1
            continue
        nodes.setdefault(here, []).append(node)
        stage.update(dict.fromkeys(node.output, here))
    count = len(exchanges)
    if sorted(exchanges) != list(range(count)) or max(nodes, default=0) > count:
        raise EngineError("the collectives of the graph do not follow one another")
    return [nodes.get(index, []) for index in range(count + 1)], [exchanges[index] for index in range(count)]


def _last_read(nodes: list[list[onnx.NodeProto]], exchanges: list[onnx.NodeProto], final: set[str]) -> dict[str, int]:
    """The last piece that reads a value; what an exchange or the caller reads counts as read after all pieces."""
    last = {name: index for index, mine in enumerate(nodes) for node in mine for name in _reads(node)}
    end = len(nodes)
    return last | {node.input[0]: end for node in exchanges} | dict.fromkeys(final, end)


def _reads(node: onnx.NodeProto) -> list[str]:
    return [name for name in node.input if name]


def _info(name: str, types: dict[str, onnx.TypeProto]) -> onnx.ValueInfoProto:
    if name not in types:
        raise EngineError(f"the type of {name}, which is needed in two pieces of the graph, is not known")
    return onnx.helper.make_value_info(name, types[name])


def _exchange(node: onnx.NodeProto, types: dict[str, onnx.TypeProto]) -> Exchange:
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    tensor = _info(node.input[0], types).type.tensor_type
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        raise EngineError(f"{node.input[0]} is exchanged between ranks but is not float32; build with --dtype float32")
    dims: list[int | str] = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    unknown = [dim for dim in dims if isinstance(dim, str) and dim not in DIMS]
    if unknown:
        raise EngineError(f"{node.input[0]} is exchanged between ranks but has the unknown dimension {unknown[0]!r}")
    operation, group = attributes["collective_operation"].decode(), list(attributes.get("groups", ()))
    return Exchange(operation, node.input[0], node.output[0], dims, group)
