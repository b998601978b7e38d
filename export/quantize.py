"""Experts in int8: `com.microsoft::MoE` -> `com.microsoft::QMoE`, quantized from the checkpoint while the weights are written.

Rules:
1. Weights take the form the operator defines: uint8, of which 128 is 0, and one fp32 scale per expert and output row
   (`model_defs.quantization`). Inputs are then x, router logits, fc1, its scales, no bias, fc2, its scales.
2. The weights keep their names, their scales are called NAME.scale. Attributes are kept; `expert_weight_bits` is 8.
3. Only bound graphs (`export.weights`, `export.parallel.weights`) can be quantized: the numbers come from the stored tensors, one expert
   at a time. Nothing is read before somebody asks for a weight.
4. A rank that holds some columns of fc2 scales its rows by those columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ExportError
from export.weights import ExpertTensor
from model_defs.quantization import INT8, dequantize_rows, quantize_rows

DOMAIN = "com.microsoft"
ZERO = 128


@dataclass
class QuantizationError:
    """Sums over all weights that were quantized so far."""

    squared_error: float = 0.0
    squared_weight: float = 0.0

    def __add__(self, other: QuantizationError) -> QuantizationError:
        """Of both together: of several ranks."""
        return QuantizationError(self.squared_error + other.squared_error, self.squared_weight + other.squared_weight)

    @property
    def relative(self) -> float:
        """Root of the mean squared error over that of the weights."""
        return float(np.sqrt(self.squared_error / self.squared_weight)) if self.squared_weight else 0.0

    def described(self) -> dict[str, object]:
        """For the engine's configuration; true once all weights are written."""
        return {
            "experts": INT8,
            "scales": "symmetric, one per expert and output row",
            "relative_weight_error": round(self.relative, 6),
        }


class QuantizeExperts(ir.passes.InPlacePass):
    """Quantize the experts of a bound graph (rules above). `error` grows while the weights are read."""

    def __init__(self) -> None:
        super().__init__()
        self.error = QuantizationError()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "MoE" and node.domain == DOMAIN:
                self._quantize(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _quantize(self, graph: ir.Graph, node: ir.Node) -> None:
        if (len(node.inputs) > 5 and any(value is not None for value in node.inputs[5:])) or node.inputs[3] is not None:
            raise ExportError(f"{node.name}: experts with biases or a third matrix cannot be quantized")
        x, router, fc1, _, fc2 = node.inputs[:5]
        assert fc1 is not None
        assert fc2 is not None
        inputs = [x, router, *self._weight(graph, node, fc1), None, *self._weight(graph, node, fc2)]
        made = ir.Node(DOMAIN, "QMoE", inputs, node.attributes.values(), name=node.name)
        made.attributes["expert_weight_bits"] = ir.AttrInt64("expert_weight_bits", 8)
        old, new = node.outputs[0], made.outputs[0]
        graph.insert_before(node, made)
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        new.name, old.name = old.name, None
        graph.remove(node, safe=True)

    def _weight(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The weight, now uint8, and its scales."""
        source = value.const_value
        if not isinstance(source, ExpertTensor):
            raise ExportError(f"{node.name}: {value.name} is not bound to a checkpoint's experts")
        value.type = ir.TensorType(ir.DataType.UINT8)
        value.const_value, scales = quantized(source, self.error)
        scale = ir.Value(name=scales.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(scales.shape.numpy()))
        scale.const_value = scales
        graph.register_initializer(scale)
        return value, scale


def quantized(source: ExpertTensor, error: QuantizationError) -> tuple[ir.LazyTensor, ir.LazyTensor]:
    """The weights, uint8 [experts, rows, columns], and their scales, fp32 [experts, rows]; both made when somebody asks."""
    made, rows = _Quantized(source, error), ir.Shape(source.shape.numpy()[:2])
    weights = ir.LazyTensor(
        made.weights, dtype=ir.DataType.UINT8, shape=ir.Shape(source.shape.numpy()), name=source.name, cache=False
    )
    scales = ir.LazyTensor(made.scales, dtype=ir.DataType.FLOAT, shape=rows, name=f"{source.name}.scale", cache=False)
    return weights, scales


class _Quantized:
    """One weight of all local experts. Memory holds the int8 weights, one expert as it is stored, and some of its rows in fp32."""

    def __init__(self, source: ExpertTensor, error: QuantizationError) -> None:
        self._source, self._error = source, error
        self._scales: NDArray[np.float32] | None = None

    def weights(self) -> ir.TensorProtocol:
        values = np.empty(self._source.shape.numpy(), np.int8)
        scales = np.empty(values.shape[:2], np.float32)
        squared_error = squared_weight = 0.0
        for expert, stored in enumerate(self._source.experts()):
            try:
                scales[expert] = quantize_rows(stored, values[expert])
            except ValueError as error:
                raise ExportError(f"expert {expert} of {self._source.name} cannot be quantized: {error}") from error
            # Some rows tell the error of all; every row would be read and widened once more.
            step = max(1, len(stored) // 64)
            some = stored[::step].astype(np.float32)
            difference = some - dequantize_rows(values[expert, ::step], scales[expert, ::step])
            squared_error += float(np.square(difference).sum(dtype=np.float64))
            squared_weight += float(np.square(some).sum(dtype=np.float64))
        if self._scales is None:
            self._error.squared_error += squared_error
            self._error.squared_weight += squared_weight
        self._scales = scales
        unsigned = values.view(np.uint8)
        np.bitwise_xor(unsigned, np.uint8(ZERO), out=unsigned)  # in place: the matrices of a layer are gigabytes
        return ir.tensor(unsigned, name=self._source.name)

    def scales(self) -> ir.TensorProtocol:
        if self._scales is None:
            self.weights()
        assert self._scales is not None
        return ir.tensor(self._scales, name=f"{self._source.name}.scale")
