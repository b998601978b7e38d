"""From a lowered ONNX graph to a TensorRT network, with weights taken where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from engines.tensorrt.messages import failure

INLINE_LIMIT = 1024  # constants up to this many bytes travel inside the graph


def parse(trt: Any, network: Any, logger: Any, model: ir.Model, weights: dict[str, np.ndarray]) -> Any:
    """Fill `network` from `model`; `weights` are the arrays of its external initializers by name.

    TensorRT keeps pointers to the arrays: they must live until the engine is built. Returns the parser, which must live as long.
    Raises EngineError with the parser's reason.
    """
    parser = trt.OnnxParser(network, logger)
    proto = ir.serde.serialize_model(model).SerializeToString()
    if not parser.load_model_proto(proto):
        raise failure("reading the graph", logger)
    for name, array in weights.items():
        if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
            raise failure(f"taking weight {name}", logger)
    if not parser.parse_model_proto():
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            logger.errors.insert(
                0, f"{error.node_operator()} node {error.node_name()}: {error.desc()}".replace("\n", " ")
            )
        raise failure("parsing the graph", logger)
    return parser


def allow_collectives(trt: Any, config: Any) -> None:
    """Let engines exchange values between GPUs. TensorRT 10.16 has it as a preview, TensorRT 11 and TensorRT-RTX without asking."""
    feature = getattr(trt.PreviewFeature, "MULTIDEVICE_RUNTIME_10_16", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


def describe_layers(network: Any, model: ir.Model) -> list[dict[str, Any]]:
    """The network's layers for `mxcompile inspect`: name, type, plugin operator, and type and shape of what they give out."""
    operators = {node.name: node.op_type for node in model.graph}  # the parser names a layer after its node
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        kind = str(layer.type).rsplit(".", 1)[-1]
        layers.append(
            {
                "name": layer.name,
                "type": kind,
                "plugin": operators.get(layer.name) if kind.startswith("PLUGIN") else None,
                "outputs": [
                    {"dtype": _dtype_name(out.dtype), "dims": list(out.shape)} for out in outputs if out is not None
                ],
            }
        )
    return layers


def _dtype_name(dtype: Any) -> str:
    """TensorRT's DataType by numpy's name where the two differ."""
    name = str(dtype).rsplit(".", 1)[-1].lower()
    return {"float": "float32", "half": "float16", "bf16": "bfloat16"}.get(name, name)
