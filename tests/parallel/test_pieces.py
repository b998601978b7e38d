"""The parts of an engine of several ranks that need no processes: lowering, cutting, the file of pieces, messages, heads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import EngineError
from engines.onnxruntime.lowering import GroupExperts, LowerCollectives, LowerExpertRange
from engines.parallel.cut import cut
from engines.parallel.heads import head_range, join, pieces
from engines.parallel.message import decode, encode
from engines.parallel.pieces import MAGIC, PieceFile, read, to_bytes
from export.parallel.collective import all_gather, all_reduce

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=FLOAT, shape=ir.Shape(shape))


def named(node: ir.Node, name: str, *shape: int | str) -> ir.Value:
    output = node.outputs[0]
    output.name, output.type, output.shape = name, FLOAT, ir.Shape(shape)
    return output


# --- experts of one rank -------------------------------------------------------------------------------------------------------


def experts(
    first: int | None, fc1: np.ndarray, fc2: np.ndarray, k: int, all_experts: int, grouped: Path | None = None
) -> ort.InferenceSession:
    """One rank's experts in the form for single tokens, or grouped (then the weights go into a file in that folder)."""
    hidden = fc1.shape[2]
    x, router = value("x", 1, "tokens", hidden), value("router", "tokens", all_experts)
    weights = [
        ir.Value(name=name, type=FLOAT, shape=ir.Shape(array.shape), const_value=stored(array, name, grouped))
        for name, array in (("fc1", fc1), ("fc2", fc2))
    ]
    attributes = dict(
        k=k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )
    if first is not None:
        attributes["first_local_expert"] = first
    node = ir.node("MoE", [x, router, weights[0], None, weights[1]], attributes, domain="com.microsoft")
    output = named(node, "y", 1, "tokens", hidden)
    opsets = {"": 24, "com.microsoft": 1}
    graph = ir.Graph([x, router], [output], nodes=[node], initializers=weights, opset_imports=opsets, name="experts")
    model = ir.Model(graph, ir_version=10)
    if grouped is None:
        LowerExpertRange()(model)
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    GroupExperts()(model)
    (grouped / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    return ort.InferenceSession(grouped / "model.onnx", providers=["CPUExecutionProvider"])


def stored(array: np.ndarray, name: str, folder: Path | None) -> ir.TensorProtocol:
    if folder is None:
        return ir.tensor(array, name=name)
    (folder / name).write_bytes(array.tobytes())
    return ir.ExternalTensor(name, 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([(2, 4), (4, 2), (8, 1), (2, 1), (1, 3)]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_shares_of_all_expert_ranges_add_up(
    sizes: tuple[int, int], tokens: int, k: int, grouped: bool, seed: int
) -> None:
    ranges, local = sizes
    total = ranges * local
    k = min(k, total)
    random = np.random.default_rng(seed)
    fc1 = (random.standard_normal((total, 16, 8)) / 3).astype(np.float32)
    fc2 = (random.standard_normal((total, 8, 8)) / 3).astype(np.float32)
    feeds = {
        "x": random.standard_normal((1, tokens, 8)).astype(np.float32),
        "router": (3 * random.standard_normal((tokens, total))).astype(np.float32),
    }
    whole = experts(None, fc1, fc2, k, total).run(None, feeds)[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if grouped else None
        shares = [
            experts(start, fc1[start : start + local], fc2[start : start + local], k, total, place).run(None, feeds)[0]
            for start in range(0, total, local)
        ]
    # fp32 and sums in another order; the values are of size one
    assert np.abs(sum(shares) - whole).max(initial=0) < 1e-5


# --- cutting -------------------------------------------------------------------------------------------------------------------


def two_exchanges() -> onnx.ModelProto:
    """y = gather(relu(reduce(x * 2)) + x): a constant used twice, a value that skips a piece, a weight in the last one."""
    x = value("x", "batch", "tokens")
    two = ir.node("Constant", [], {"value": ir.tensor(np.float32(2))})
    two.outputs[0].name = "two"
    double = ir.node("Mul", [x, two.outputs[0]])
    doubled = named(double, "double", "batch", "tokens")
    first = all_reduce(doubled, 2)
    relu = ir.node("Relu", [first.outputs[0]])
    named(relu, "relu", "batch", "tokens")
    half = ir.node("Div", [relu.outputs[0], two.outputs[0]])
    named(half, "half", "batch", "tokens")
    add = ir.node("Add", [half.outputs[0], doubled])
    summed = named(add, "sum", 3, "tokens")
    second = all_gather(summed, 2)
    weight = ir.Value(name="w", type=FLOAT, shape=ir.Shape([1]), const_value=ir.tensor(np.float32([10]), name="w"))
    last = ir.node("Add", [second.outputs[0], weight])
    output = named(last, "y", 6, "tokens")
    graph = ir.Graph(
        [x],
        [output],
        nodes=[two, double, first, relu, half, add, second, last],
        initializers=[weight],
        opset_imports={"": 24},
        name="g",
    )
    model = ir.Model(graph, ir_version=10)
    LowerCollectives()(model)
    return ir.to_proto(model)


def test_pieces_and_exchanges_alternate() -> None:
    pieces_, models = cut(two_exchanges())
    assert [piece.inputs for piece in pieces_] == [["x"], ["double.all_reduce", "double"], ["sum.all_gather"]]
    assert [piece.outputs for piece in pieces_] == [["double"], ["sum"], ["y"]]
    assert [piece.weights for piece in pieces_] == [[], [], ["w"]]
    assert [piece.exchange and piece.exchange.operation for piece in pieces_] == ["all_reduce", "all_gather", None]
    assert pieces_[0].exchange is not None
    assert pieces_[0].exchange.dims == ["batch", "tokens"]
    sessions = [ort.InferenceSession(model, providers=["CPUExecutionProvider"]) for model in models]
    x = np.array([[1, -2], [3, 4], [-5, 6]], np.float32)
    (double,) = sessions[0].run(None, {"x": x})
    (summed,) = sessions[1].run(None, {"double.all_reduce": 2 * double, "double": double})
    (y,) = sessions[2].run(None, {"sum.all_gather": np.concatenate([summed, summed])})
    assert np.array_equal(y, np.concatenate([np.maximum(2 * x, 0) + 2 * x] * 2) + 10)


def test_an_unknown_collective_is_refused() -> None:
    x = value("x", 2)
    node = all_reduce(x, 2)
    node.attributes["reduce_op"] = ir.AttrString("reduce_op", "max")
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24}, name="g"), ir_version=10)
    with pytest.raises(ValueError, match="all_reduce max has no implementation"):
        LowerCollectives()(model)


# --- the file ------------------------------------------------------------------------------------------------------------------


def test_file_round_trip_and_damage(tmp_path: Path) -> None:
    content, models = cut(two_exchanges())
    written = PieceFile(1, 2, "build", content)
    data, file = to_bytes(written, models), tmp_path / "rank1.pieces"
    file.write_bytes(data)
    assert read(file) == (written, models)
    header_end = 16 + int.from_bytes(data[8:16], "little")
    damaged = {
        "not a file of graph pieces": [
            b"",
            data[:12],
            b"X" + data[1:],
            MAGIC + (1 << 40).to_bytes(8, "little") + data[16:],
        ],
        "cannot be understood": [
            data[:header_end],
            data[:16] + b"[" + data[17:],
            data.replace(b"all_gather", b"all_father"),
            data.replace(b'"batch"', b'"bench"'),
            data.replace(b'"offset": 0', b'"offset": "'),
        ],
    }
    for words, versions in damaged.items():
        for version in versions:
            file.write_bytes(version)
            with pytest.raises(EngineError, match=words):
                read(file)


# --- messages and heads --------------------------------------------------------------------------------------------------------


def test_messages_round_trip() -> None:
    message = {
        "do": "forward",
        "ids": np.arange(6).reshape(2, 3),
        "empty": np.zeros((3, 0), np.float32),
        "scalar": np.float32([1.5]),
        "positions": "last",
        "chunk": None,
        "taps": {"a.b": np.ones((2, 2), np.float32)},
        "key": {7: np.zeros((1, 4), np.float32)},
        "flag": True,
    }
    found = decode(encode(message))
    assert list(found) == list(message)
    for key, expected in message.items():
        if isinstance(expected, np.ndarray):
            assert found[key].dtype == expected.dtype
            assert np.array_equal(found[key], expected)
        elif isinstance(expected, dict):
            assert list(found[key]) == list(expected)
            assert all(np.array_equal(found[key][name], array) for name, array in expected.items())
        else:
            assert found[key] == expected
    found["ids"][0, 0] = 9  # a copy that may be changed


@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_heads_put_together_are_the_whole(small: int, factor: int, more_ranks: bool) -> None:
    heads, ranks = (small, small * factor) if more_ranks else (small * factor, small)
    whole = np.random.default_rng(0).standard_normal((2, heads, 3))
    parts = [whole[:, head_range(heads, ranks, rank)] for rank in range(ranks)]
    assert len({part.shape for part in parts}) == 1
    assert np.array_equal(join(parts, heads, 1), whole)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(EngineError, match="6 heads cannot be shared by 4 ranks"):
        pieces(6, 4)
