"""The whole model in 8 or 4 bits: linear layers -> `com.microsoft::MatMulNBits`, experts -> `com.microsoft::QMoE`, both by blocks.

Rules:
1. Which weights, and in how many bits: `model_defs.quantization.block_scheme`. All others stay as they are.
2. MatMul(x, Transpose(weight)) with a weight [N, K] becomes MatMulNBits with the weight uint8 [N, blocks, bytes] and one fp32 scale per
   block, [N, blocks]. MoE becomes QMoE with uint8 [E, rows, bytes] and scales [E, rows, blocks].
3. `accuracy_level` 4: products take activations in int8, one scale per token and block. The other levels widen the weights at each
   step, which in 8 bits is 50 times slower than fp32 (docs/quantization.md).
4. Only bound graphs (`export.weights`, `export.parallel.weights`) can be quantized. A rank quantizes the slices that it holds; their
   columns are whole blocks (`check_blocks`), so its numbers and scales are slices of those of one rank.
5. Weights keep their names, their scales are called NAME.scale. Nothing is read before somebody asks for a weight; memory then holds
   one quantized matrix (of all experts of a layer) and some rows in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ExportError
from export.parallel.mapping import ParallelMapping
from export.quantize import DOMAIN, QuantizationError
from export.weights import ConvertedTensor, ExpertTensor
from model_defs.config import ModelConfig
from model_defs.quantization import WHOLE, BlockScheme, block_scheme, dequantize_blocks, quantize_blocks

INT8_ACTIVATIONS = 4  # the operators' accuracy_level
_SAMPLED_ROWS = 64  # of a matrix: they tell the error of all


def check_blocks(config: ModelConfig, quantize: str, mapping: ParallelMapping | None = None) -> None:
    """Raises ExportError where a width of the model is no multiple of the block size, or ranks of `mapping` would cut a block."""
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": config.attention_width,
    }
    # lm_head is in 8 bits always.
    for name, scheme in (("hidden_size", WHOLE["int8"]), *((name, WHOLE[quantize]) for name in widths)):
        if widths[name] % scheme.block:
            raise ExportError(
                f"quantization to {quantize} takes blocks of {scheme.block} weights, and {name} is {widths[name]}, no multiple of it; "
                "build without --quantize"
            )
    if mapping is not None:
        try:
            mapping.check(config, WHOLE[quantize].block)
        except ExportError as error:
            raise ExportError(f"quantization to {quantize}: {error}") from error


class QuantizeWeights(ir.passes.InPlacePass):
    """Quantize a bound graph (rules above). `error` grows while the weights are read."""

    def __init__(self, quantize: str) -> None:
        super().__init__()
        self.quantize = quantize
        self.error = QuantizationError()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "MoE" and node.domain == DOMAIN:
                self._experts(model.graph, node)
                modified = True
            elif node.op_type == "MatMul" and node.domain == "":
                modified |= self._linear(model.graph, node)
        model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified)

    def _linear(self, graph: ir.Graph, node: ir.Node) -> bool:
        x, turned = node.inputs
        producer = turned.producer() if turned is not None else None
        weight = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
        scheme = (
            None if weight is None or not weight.is_initializer() else block_scheme(weight.name or "", self.quantize)
        )
        if scheme is None:
            return False
        assert weight is not None
        assert producer is not None
        assert weight.shape is not None
        rows, columns = weight.shape.numpy()
        inputs = [x, *self._weight(graph, weight, scheme)]
        sizes = {"K": columns, "N": rows, "bits": scheme.bits, "block_size": scheme.block}
        attributes = sizes | {"accuracy_level": INT8_ACTIVATIONS}
        _replace(graph, node, ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name))
        if not producer.outputs[0].uses():
            graph.remove(producer, safe=True)
        return True

    def _experts(self, graph: ir.Graph, node: ir.Node) -> None:
        if (len(node.inputs) > 5 and any(value is not None for value in node.inputs[5:])) or node.inputs[3] is not None:
            raise ExportError(f"{node.name}: experts with biases or a third matrix cannot be quantized")
        x, router, fc1, _, fc2 = node.inputs[:5]
        assert fc1 is not None
        assert fc2 is not None
        scheme = WHOLE[self.quantize]
        inputs = [x, router, *self._weight(graph, fc1, scheme), None, *self._weight(graph, fc2, scheme)]
        made = ir.Node(DOMAIN, "QMoE", inputs, node.attributes.values(), name=node.name)
        for name, value in (
            ("expert_weight_bits", scheme.bits),
            ("block_size", scheme.block),
            ("accuracy_level", INT8_ACTIVATIONS),
        ):
            made.attributes[name] = ir.AttrInt64(name, value)
        _replace(graph, node, made)

    def _weight(self, graph: ir.Graph, value: ir.Value, scheme: BlockScheme) -> tuple[ir.Value, ir.Value]:
        """The weight, now uint8, and its scales."""
        source = value.const_value
        if source is None:
            raise ExportError(f"{value.name} is not bound to a checkpoint")
        value.const_value, scales = quantized_blocks(source, scheme, self.error)
        value.type, value.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(value.const_value.shape.numpy())
        scale = ir.Value(name=scales.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(scales.shape.numpy()))
        scale.const_value = scales
        graph.register_initializer(scale)
        return value, scale


def described(quantize: str, error: QuantizationError) -> dict[str, object]:
    """What the configuration of an engine says about its quantization."""
    scheme, head = WHOLE[quantize], WHOLE["int8"]
    return {
        "weights": quantize,
        "scales": f"symmetric, one per {scheme.block} inputs of an output row"
        + ("" if scheme is head else f"; lm_head in int8, one per {head.block}"),
        "activations": "int8 in products with these weights, one scale per token and block",
        "relative_weight_error": round(error.relative, 6),
    }


def quantized_blocks(
    source: ir.TensorProtocol, scheme: BlockScheme, error: QuantizationError
) -> tuple[ir.LazyTensor, ir.LazyTensor]:
    """A weight [rows, columns] or of experts [E, rows, columns] as rule 2 wants it, and its scales; both made when somebody asks."""
    *lead, columns = source.shape.numpy()
    blocks = columns // scheme.block
    made = _Quantized(source, scheme, error)
    width = scheme.stored_width(columns)
    shape = ir.Shape([*lead, width] if len(lead) == 2 else [*lead, blocks, width // blocks])
    weights = ir.LazyTensor(made.weights, dtype=ir.DataType.UINT8, shape=shape, name=source.name, cache=False)
    scales = ir.LazyTensor(
        made.scales, dtype=ir.DataType.FLOAT, shape=ir.Shape([*lead, blocks]), name=f"{source.name}.scale", cache=False
    )
    return weights, scales


class _Quantized:
    """One weight; the scales are kept from the time the weights are read, as they are asked for right behind."""

    def __init__(self, source: ir.TensorProtocol, scheme: BlockScheme, error: QuantizationError) -> None:
        self._source, self._scheme, self._error = source, scheme, error
        self._scales: NDArray[np.float32] | None = None

    def _matrices(self) -> Iterator[NDArray]:
        """The weight, or each expert's, in the type it is stored in."""
        if isinstance(self._source, ExpertTensor):
            yield from self._source.experts()
        elif isinstance(self._source, ConvertedTensor):
            yield self._source.stored()
        elif isinstance(self._source, ir.ExternalTensor):
            # A mapping of its own, gone after use: the tensor would keep one of the whole file.
            source = self._source
            yield np.memmap(source.path, source.dtype.numpy(), "r", source.offset or 0, tuple(source.shape.numpy()))
        else:
            yield self._source.numpy()

    def weights(self) -> ir.TensorProtocol:
        scheme = self._scheme
        *lead, columns = self._source.shape.numpy()
        experts, rows = (lead[0], lead[1]) if len(lead) == 2 else (1, lead[0])
        blocks = columns // scheme.block
        values = np.empty((experts, rows, blocks, scheme.stored_width(scheme.block)), np.uint8)
        scales = np.empty((experts, rows, blocks), np.float32)
        squared_error = squared_weight = 0.0
        for index, matrix in enumerate(self._matrices()):
            try:
                values[index], scales[index] = quantize_blocks(matrix, scheme)
            except ValueError as error:
                raise ExportError(f"{self._source.name} (matrix {index}) cannot be quantized: {error}") from error
            step = max(1, rows // _SAMPLED_ROWS)
            some = matrix[::step].astype(np.float32)
            difference = some - dequantize_blocks(values[index, ::step], scales[index, ::step], scheme)
            # A matrix counts with its number of rows, however many of them were sampled.
            squared_error += float(np.square(difference).sum(dtype=np.float64)) * rows / len(some)
            squared_weight += float(np.square(some).sum(dtype=np.float64)) * rows / len(some)
        if self._scales is None:
            self._error.squared_error += squared_error
            self._error.squared_weight += squared_weight
        self._scales = scales.reshape(*lead, blocks)
        flat = (*lead, -1) if len(lead) == 2 else (*lead, blocks, -1)
        return ir.tensor(values.reshape(flat), name=self._source.name)

    def scales(self) -> ir.TensorProtocol:
        if self._scales is None:
            self.weights()
        assert self._scales is not None
        return ir.tensor(self._scales, name=f"{self._source.name}.scale")


def _replace(graph: ir.Graph, node: ir.Node, made: ir.Node) -> None:
    old, new = node.outputs[0], made.outputs[0]
    graph.insert_before(node, made)
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None
    graph.remove(node, safe=True)
