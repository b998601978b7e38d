"""`com.microsoft::MoE` and `QMoE` -> tokens sorted by expert, and plain matrix products per expert; for several tokens at once.

ONNX Runtime's MoE node never packs its weights and runs its activation one value at a time. From eight or so
tokens on, packed products in the order of the experts take 0.6 to 0.8 of its time
(`docs/lowering-onnxruntime.md`); for single tokens the node is the faster one, so decode keeps it.

Rules:
1. Matches MoE with interleaved SwiGLU (`swiglu_fusion=1`, alpha 1, beta 0), normalised routing weights, no biases,
   and fc1 [E, 2I, D], fc2 [E, D, I] as initializers; anything else is refused.
2. Expert e's weight `name@e` is an initializer that refers to the e-th part of `name`'s bytes: no byte is stored twice.
3. Softmax over the selected logits equals softmax over all, selected and normalised.
4. Each token's k assignments are sorted by expert (stable order is not needed), split by count (0 is fine), and put
   back by the inverse permutation.
5. With `first_local_expert`, the weights are those of a range of the experts: assignments to other experts are sorted
   behind all local ones, are left out of the products, and read a row of zeros when all is put back.
6. Of QMoE, those with one scale per block (`block_size`) are taken: the products are MatMulNBits, whose weights are the same bytes in three
   dimensions. With one scale per row the node stays.

On an exact tie between two experts' logits this takes the lower index, MoE the higher.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.onnxruntime.lowering.expert_range import ATTRIBUTE
from engines.rewrite import CONTRIB, drop_dead, take_over


def part_name(name: str, expert: int) -> str:
    """Name of the initializer that is `name[expert]`."""
    return f"{name}@{expert}"


class GroupExperts(ir.passes.InPlacePass):
    """Mixture of experts as products per expert (rules above). `parts` is what `engines.weights.Manifest` has of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, int | list[int]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain == CONTRIB and (
                node.op_type == "MoE" or (node.op_type == "QMoE" and "block_size" in node.attributes)
            ):
                self._group(model.graph, node)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _group(self, graph: ir.Graph, node: ir.Node) -> None:
        quantized = node.op_type == "QMoE"
        scales: dict[ir.Value | None, ir.Value | None] = {}
        if quantized:
            x, router, fc1, scale1, bias1, fc2, scale2, *more = node.inputs
            scales = {fc1: scale1, fc2: scale2}
        else:
            x, router, fc1, bias1, fc2, *more = node.inputs
        if bias1 is not None or any(value is not None for value in more) or not _is_canonical(node):
            raise ValueError(f"{node.name}: MoE other than normalised interleaved SwiGLU without biases")
        assert fc1 is not None
        assert fc2 is not None
        assert x is not None
        experts, doubled, _ = (fc1.shape or ir.Shape([])).numpy()
        hidden, inner = (fc2.shape or ir.Shape([])).numpy()[1], doubled // 2
        tape = ir.tape.Tape()
        op, several = tape.op, tape.op_multi_out

        def numbers(*values: int) -> ir.Value:
            return op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})

        def number(value: int) -> ir.Value:
            return op("Constant", [], {"value": ir.tensor(np.array(value, np.int64))})

        count = node.attributes["k"].as_int()
        rows = op("Reshape", [x, numbers(-1, hidden)])
        top, chosen = several("TopK", [router, numbers(count)], {"axis": -1}, num_outputs=2)
        share = op("Unsqueeze", [op("Softmax", [top], {"axis": -1}), numbers(2)])
        assigned = op("Reshape", [chosen, numbers(-1)])
        first = node.attributes.get(ATTRIBUTE)
        if first is not None:  # experts of other ranks all become the number behind the last local one
            local = op("Sub", [assigned, number(first.as_int())])
            here = op("And", [op("GreaterOrEqual", [local, number(0)]), op("Less", [local, number(experts)])])
            assigned = op("Where", [here, local, number(experts)])
        total = op("Shape", [assigned])
        _, order = several("TopK", [assigned, total], {"axis": 0, "largest": 0}, num_outputs=2)
        _, back = several("TopK", [order, total], {"axis": 0, "largest": 0}, num_outputs=2)
        places = experts if first is None else experts + 1
        counts = op(
            "ReduceSum",
            [op("OneHot", [assigned, number(places), numbers(0, 1)], {"axis": -1}), numbers(0)],
            {"keepdims": 0},
        )
        if first is not None:
            counts = op("Slice", [counts, numbers(0), numbers(experts)])
            total = op("ReduceSum", [counts, numbers(0)], {"keepdims": 1})
            order = op("Slice", [order, numbers(0), total])

        def by_expert(values: ir.Value, weight: ir.Value) -> ir.Value:
            pieces = several("Split", [values, counts], {"axis": 0}, num_outputs=experts)
            if not quantized:
                parts = self._parts(graph, weight)
                products = [op("Gemm", [piece, part], {"transB": 1}) for piece, part in zip(pieces, parts, strict=True)]
                return op("Concat", products, {"axis": 0})
            scale = scales[weight]
            assert scale is not None
            rows, blocks = (scale.shape or ir.Shape([])).numpy()[1:]
            bits, block = (node.attributes[name].as_int() for name in ("expert_weight_bits", "block_size"))
            product = {"K": blocks * block, "N": rows, "bits": bits, "block_size": block}
            product |= {"accuracy_level": node.attributes["accuracy_level"].as_int()}
            parts = self._parts(graph, weight, [rows, blocks, block * bits // 8])
            return op(
                "Concat",
                [
                    op("MatMulNBits", list(inputs), product, domain=CONTRIB)
                    for inputs in zip(pieces, parts, self._parts(graph, scale), strict=True)
                ],
                {"axis": 0},
            )

        sorted_rows = op("Gather", [rows, op("Div", [order, number(count)])], {"axis": 0})
        pairs = op("Reshape", [by_expert(sorted_rows, fc1), numbers(-1, inner, 2)])
        gate, up = several("Split", [pairs], {"axis": 2, "num_outputs": 2}, num_outputs=2)
        silu = op("QuickGelu", [gate], {"alpha": 1.0}, domain=CONTRIB)
        mixed = by_expert(op("Reshape", [op("Mul", [silu, up]), numbers(-1, inner)]), fc2)
        if first is not None:
            zeros = op("Constant", [], {"value": ir.tensor(np.zeros((1, hidden), np.float32))})
            mixed, back = op("Concat", [mixed, zeros], {"axis": 0}), op("Min", [back, total])
        restored = op("Reshape", [op("Gather", [mixed, back], {"axis": 0}), numbers(-1, count, hidden)])
        summed = op("ReduceSum", [op("Mul", [restored, share]), numbers(1)], {"keepdims": 0})
        output = op("Reshape", [summed, op("Shape", [x])])
        for made in tape.nodes:
            graph.insert_before(node, made)
        output.type = node.outputs[0].type
        take_over(node.outputs[0], output)
        drop_dead([node])
        for weight in (fc1, fc2, *scales.values()):
            if weight is not None and not weight.uses():
                assert weight.name is not None
                graph.initializers.pop(weight.name)

    def _parts(self, graph: ir.Graph, weight: ir.Value, wanted: list[int] | None = None) -> list[ir.Value]:
        """One initializer per expert, each a slice of the stacked weight's bytes, in the shape `wanted` or the weight's own."""
        tensor, name = weight.const_value, weight.name
        if not isinstance(tensor, ir.ExternalTensor) or name is None:
            raise ValueError(f"{name}: expert weights must have their place in a file before they are grouped")
        experts, *shape = tensor.shape.numpy()
        self.parts[name] = experts if wanted is None else [experts, *wanted]
        shape = wanted or shape
        length = (tensor.length or 0) // experts
        values = []
        for expert in range(experts):
            part = ir.ExternalTensor(
                tensor.location,
                (tensor.offset or 0) + expert * length,
                length,
                tensor.dtype,
                shape=ir.Shape(shape),
                name=part_name(name, expert),
            )
            value = ir.Value(name=part.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=part)
            graph.register_initializer(value)
            values.append(value)
        return values


def _is_canonical(node: ir.Node) -> bool:
    wanted = {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 1,
    }
    stored = ("expert_weight_bits", "block_size", "accuracy_level")
    given = {
        name: attribute.value for name, attribute in node.attributes.items() if name not in ("k", ATTRIBUTE, *stored)
    }
    given = {name: value for name, value in given.items() if (name, value) != ("use_sparse_mixer", 0)}
    return given == wanted
