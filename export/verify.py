"""What must hold for a canonical graph; checked after every pass and before a graph is written."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir

from export.contract import CANONICAL_OPSET, LOGITS, TOKEN_INPUTS, hidden_tap, image_inputs, router_tap, state_specs
from export.errors import ExportError
from export.schemas import CONTRIB_DOMAIN
from model_defs.config import ModelConfig
from model_defs.weights import weight_recipes

# Every operator a canonical graph may hold. A longer list means that tracing has found a new way to spell something.
ALLOWED_OPERATORS = frozenset(
    "Add Attention Cast Concat Constant Cos Expand Gather GatherElements Less LinearAttention MatMul Mul RMSNormalization Range "
    "Reshape RotaryEmbedding Shape Sigmoid Sin Split Squeeze TensorScatter Transpose Unsqueeze".split()
) | {f"{CONTRIB_DOMAIN}::MoE"}
# What a graph that takes image features may hold besides.
IMAGE_OPERATORS = frozenset({"Max", "Where"})


def verify_structure(model: ir.Model) -> None:
    """Single assignment, topological order, no dangling value: what any pass could break. Raises ExportError."""
    seen = {id(value) for value in [*model.graph.inputs, *model.graph.initializers.values()]}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and id(value) not in seen:
                raise ExportError(f"node {node.name!r} ({node.op_type}) reads {value.name!r} before it is computed")
        seen.update(id(value) for value in node.outputs)
    for value in model.graph.outputs:
        if id(value) not in seen:
            raise ExportError(f"graph output {value.name!r} is never computed")


def verify_canonical(model: ir.Model, config: ModelConfig) -> None:
    """The rules of the canonical form. Raises ExportError naming the first one broken."""
    verify_structure(model)
    graph = model.graph
    inputs = [*TOKEN_INPUTS, *(s.input_name for s in state_specs(config)), *image_inputs(config)]
    same_names("inputs", [v.name for v in graph.inputs], inputs)
    same_names("outputs", [v.name for v in graph.outputs], [LOGITS, *(s.output_name for s in state_specs(config))])
    _verify_state_dims(graph, config)
    allowed = ALLOWED_OPERATORS | (IMAGE_OPERATORS if config.vision is not None else frozenset())
    unknown = Counter(operator_of(node) for node in graph if operator_of(node) not in allowed)
    if unknown:
        raise ExportError(f"operators outside the canonical set: {dict(unknown)}")
    counts = Counter(operator_of(node) for node in graph)
    expected = {
        "LinearAttention": len(config.lightning_layers),
        "Attention": len(config.softmax_layers),
        "TensorScatter": 2 * len(config.softmax_layers),
        f"{CONTRIB_DOMAIN}::MoE": config.num_layers,
        "RMSNormalization": 2 * config.num_layers + len(config.lightning_layers) + 1,
    }
    for operator, count in expected.items():
        if counts[operator] != count:
            raise ExportError(f"{counts[operator]} {operator} nodes, expected {count}")
    missing = sorted(set(weight_recipes(config)) - set(graph.initializers))
    if missing:
        raise ExportError(f"no initializer for {missing[0]!r} ({len(missing)} missing)")
    if model.opset_imports.get("") != CANONICAL_OPSET:
        raise ExportError(f"opset {model.opset_imports.get('')}, expected {CANONICAL_OPSET}")
    names = {output.name for node in graph for output in node.outputs}
    for layer in range(config.num_layers):
        for tap in (hidden_tap(layer), router_tap(layer)):
            if tap not in names:
                raise ExportError(f"the value {tap!r} is gone")


def verify_with_onnx(model: ir.Model) -> None:
    """Let onnx check every node against its schema and infer all types. Raises ExportError with its message.

    Initializers are checked by type and shape; their bytes are not looked at.
    """
    proto = ir.to_proto(_without_weights(model))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid ONNX: {error}") from error


def _without_weights(model: ir.Model) -> ir.Model:
    """A copy in which large initializers are graph inputs: the checker wants bytes or files for initializers."""
    copy = model.clone()
    for name, value in list(copy.graph.initializers.items()):
        if value.const_value is None or value.const_value.size > 1024:
            del copy.graph.initializers[name]
            copy.graph.inputs.append(value)
    return copy


def _verify_state_dims(graph: ir.Graph, config: ModelConfig) -> None:
    values = {value.name: value for value in [*graph.inputs, *graph.outputs]}
    for spec in state_specs(config):
        for name in (spec.input_name, spec.output_name):
            shape = values[name].shape
            dims = tuple(d if isinstance(d, int) else d.value for d in shape) if shape is not None else None
            if dims != spec.dims:
                raise ExportError(f"{name} has dimensions {dims}, expected {spec.dims}")
        if spec.kind == "recurrent_state" and values[spec.input_name].dtype != ir.DataType.FLOAT:
            raise ExportError(f"{spec.input_name} must be fp32, not {values[spec.input_name].dtype}")


def same_names(what: str, found: list[str | None], expected: list[str]) -> None:
    """Raises ExportError with the first name that differs."""
    if found != expected:
        wrong = next(
            (pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), (len(found), len(expected))
        )
        raise ExportError(f"graph {what} differ from the contract: {wrong[0]!r} where {wrong[1]!r} is expected")


def operator_of(node: ir.Node) -> str:
    """The node's operator, with its domain where that is not ONNX's own."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type
