"""TensorRT's own parser reads our collectives as it should: same kind, same ranks, right shapes."""

from __future__ import annotations

import importlib.util

import onnx_ir as ir
import pytest

from export.parallel.collective import all_gather, all_reduce
from plugins.tensorrt_runtime import load_tensorrt


@pytest.mark.parametrize("group", [(), (1, 3, 5, 7)])
@pytest.mark.parametrize(("make", "rows"), [(all_reduce, 3), (all_gather, 12)])
def test_parser_takes_the_collectives(make, rows: int, group: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs the TensorRT-RTX wheels")
    trt = load_tensorrt("tensorrt-rtx")  # never imported directly: see plugins/tensorrt_runtime.py
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([3, 8]))
    node = make(value, 4, group)
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 24}, name="exchange")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()), parser.get_error(0).desc()
    layer = network[0]
    assert layer.type == trt.LayerType.DIST_COLLECTIVE
    assert layer.num_ranks == 4
    assert tuple(layer.get_output(0).shape) == (rows, 8)
