"""Quantized experts as the plugin `QMoEInt8` takes them.

TensorRT's parser keeps the name QMoE for its own 4-bit form, and our plugin multiplies signed bytes.

Rules:
1. `com.microsoft::QMoE` becomes `com.microsoft::QMoEInt8`; inputs and attributes stay.
2. Its weights, uint8 of which 128 is 0, become int8: the top bit is flipped, when somebody asks for the bytes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from engines.rewrite import CONTRIB

WEIGHTS = (2, 5)  # inputs


class SignedExperts(ir.passes.InPlacePass):
    """Give quantized experts to the plugin (rules above)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type != "QMoE" or node.domain != CONTRIB:
                continue
            node.op_type = "QMoEInt8"
            for index in WEIGHTS:
                value = node.inputs[index]
                if value is None or value.const_value is None or value.dtype != ir.DataType.UINT8:
                    raise ValueError(f"{node.name}: input {index} is not a quantized weight")
                value.const_value = signed(value.const_value)
                value.type = ir.TensorType(ir.DataType.INT8)
            modified = True
        return ir.passes.PassResult(model, modified)


def signed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """Rule 2."""

    def made() -> ir.TensorProtocol:
        unsigned = np.require(tensor.numpy(), requirements="W")  # made for us; a copy only where it was not
        np.bitwise_xor(unsigned, np.uint8(128), out=unsigned)
        return ir.tensor(unsigned.view(np.int8), name=tensor.name)

    return ir.LazyTensor(
        made, dtype=ir.DataType.INT8, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name, cache=False
    )
