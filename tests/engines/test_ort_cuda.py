"""Engines for ONNX Runtime's CUDA provider, as far as a machine without a GPU takes them.

The lowered graph is held against the table of kernels that was read from the library, and runs on the CPU provider beside the fp64
model, its states and weights in a device of host memory. Tolerances as in test_ort_session.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import small_graph
from small_engine import build_small
from small_graph import N, Sequence64

import engines.onnxruntime.cuda as cuda
import engines.onnxruntime.session as session_module
from engines.onnxruntime.kernels import table, without_kernel
from engines.onnxruntime.lowering import LowerCudaRouting, lower, lower_for_cuda
from engines.onnxruntime.session import OrtSession, load
from model_defs.presets import preset
from mxcompile.exporting import graph

sys.path.append(str(Path(__file__).resolve().parents[1] / "trt"))

from host_device import HostDevice

LOGITS = 2e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_node_of_a_lowered_model_has_a_cuda_kernel(dtype: str) -> None:
    traced = graph(preset("tiny"), dtype)
    lower_for_cuda(traced)
    assert without_kernel(traced) == []
    operators = {node.op_type for node in traced.graph}
    assert ("GroupQueryAttention" in operators) == (dtype != "float32")
    assert ("Attention" in operators) == (dtype == "float32")
    for node in traced.graph:  # one type for tokens, weights and logits
        if node.op_type == "MoE":
            assert {value.dtype for value in node.inputs if value is not None} == {ir.DataType[_ONNX[dtype]]}


_ONNX = {"float32": "FLOAT", "bfloat16": "BFLOAT16", "float16": "FLOAT16"}


def test_what_the_cpu_lowering_would_send_to_the_cpu_is_named() -> None:
    model = small_graph.model(small_graph.random_weights())
    lower(model)
    assert without_kernel(model) == ["GroupQueryAttention (float32)"]


def test_an_operator_that_the_table_does_not_know_counts_as_without() -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Det", [value])
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 24}), ir_version=10)
    assert without_kernel(model) == ["Det (float32)"]


def test_the_table_says_where_it_is_from() -> None:
    assert table()["library"].startswith("onnxruntime-gpu 1.")
    assert len(table()["operators"]) > 60


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """Host memory for the device's, and the CPU provider for CUDA's."""
    device = HostDevice()
    monkeypatch.setattr(device, "_inside", lambda address, nbytes: None)  # weights lie in the runtime's own memory
    monkeypatch.setattr(cuda, "open_device", lambda: device)
    monkeypatch.setattr(cuda, "NAME", "cpu")
    monkeypatch.setattr(session_module, "providers", lambda wanted: ["CPUExecutionProvider"])
    monkeypatch.setattr(session_module, "check_started", lambda session, wanted: None)
    return device


@pytest.fixture
def session(host: HostDevice, tmp_path: Path) -> OrtSession:
    return load(build_small(tmp_path, device="cuda").path, threads=1)


def test_rows_prefill_and_decode_in_device_states_like_the_oracle(session: OrtSession) -> None:
    state = session.new_state(3)
    assert isinstance(state, cuda.DeviceState)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, N, length) for length in (5, 40, 1)]
    found = [session.prefill(prompts, state)]
    steps = rng.integers(0, N, (3, 4))
    found += [session.decode(tokens, state) for tokens in steps.T]
    for row, prompt in enumerate(prompts):
        sequence = Sequence64(small_graph.random_weights())
        expected = sequence.push_all(np.concatenate([prompt, steps[row]]))[len(prompt) - 1 :]
        assert sequence.closest_choice > 1e-4  # no tie that rounding decides
        assert np.abs(np.stack(found)[:, row] - expected).max() < LOGITS
    assert list(state.lengths) == [9, 44, 5]


def test_a_row_moves_to_another_state(session: OrtSession) -> None:
    first, second = session.new_state(2), session.new_state(2)
    session.prefill([[1, 2, 3, 4], [5, 6]], first)
    second.write_row(1, first.read_row(0))
    second.clear_row(0)
    there = session.decode([0, 9], second)[1]
    assert np.abs(there - session.decode([9, 9], first)[0]).max() < LOGITS


def test_taps_come_from_the_same_graph(session: OrtSession) -> None:
    state = session.new_state(1)
    result = session.forward(np.array([[3, 4, 5]]), np.array([3]), state, taps=small_graph.TAPS)
    assert set(result.taps) == set(small_graph.TAPS)
    assert all(np.abs(tap).max() > 0 for tap in result.taps.values())


def test_routing_in_16_bits_chooses_in_float32() -> None:
    """Two experts whose logits are the same number in bfloat16: the larger is chosen, and its weight is right."""
    value = {
        name: ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        for name, kind, shape in (
            ("x", ir.DataType.BFLOAT16, [1, 2]),
            ("router", ir.DataType.FLOAT, [1, 4]),
            ("fc1", ir.DataType.BFLOAT16, [4, 2, 2]),
            ("fc2", ir.DataType.BFLOAT16, [4, 2, 1]),
        )
    }
    attributes = {"k": 2, "normalize_routing_weights": 1, "activation_type": "swiglu", "swiglu_fusion": 1}
    inputs = [value["x"], value["router"], value["fc1"], None, value["fc2"]]
    node = ir.node("MoE", inputs, attributes, domain="com.microsoft")
    opsets = {"": 24, "com.microsoft": 1}
    model = ir.Model(ir.Graph(list(value.values()), node.outputs, nodes=[node], opset_imports=opsets), ir_version=10)
    assert LowerCudaRouting()(model).modified
    logits = model.graph[-1].inputs[1]
    assert logits is not None
    assert logits.dtype == ir.DataType.BFLOAT16
    model.graph.remove(node)
    logits.name = "logits"
    model.graph.outputs[:] = [logits]
    for unused in ("x", "fc1", "fc2"):
        model.graph.inputs.remove(value[unused])
    from onnx.reference import ReferenceEvaluator

    router = np.array([[4.4, 4.401, -3.0, 7.003]], np.float32)
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"router": router})
    found = np.asarray(found, np.float32)
    assert sorted(np.argsort(found[0])[:2]) == [0, 2]
    assert found[0, :3:2].max() < -1e4
    assert (
        abs((found[0, 3] - found[0, 1]) - (7.003 - 4.401)) < 2.602 * 2**-16
    )  # eight bits more than one bfloat16 number has
