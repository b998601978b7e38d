"""Each lowering pass alone: what it makes, that results stay, and what it refuses.

Reference for results: the same graph before the pass, run by ONNX Runtime where it has kernels, else numpy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
import small_graph
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from engines.onnxruntime.lowering import (
    GroupExperts,
    LowerAttention,
    LowerLinear,
    LowerLinearAttention,
    LowerOpset,
    lower,
)

HEADER = '<ir_version: 11, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'


def parse(text: str, opset: int = 24) -> ir.Model:
    return ShapeInferencePass()(ir.from_proto(onnx.parser.parse_model(HEADER.format(opset=opset) + text))).model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Constant"]


ATTENTION = """g (float[B,T,32] q, float[B,T,16] k, float[B,T,16] v, float[B,2,S,8] pk, float[B,2,S,8] pv, int64[B] past,
    float[B,T,2] cos, float[B,T,2] sin) => (float[B,T,32] y, float[B,2,S,8] nk, float[B,2,S,8] nv) {{
  qs = Constant<value = int64[4] {{0, 0, 4, 8}}>()  ks = Constant<value = int64[4] {{0, 0, 2, 8}}>()
  ys = Constant<value = int64[3] {{0, 0, 32}}>()
  q4 = Reshape(q, qs)  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  k4 = Reshape(k, ks)  kt = Transpose<perm = [0, 2, 1, 3]>(k4)
  v4 = Reshape(v, ks)  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  {query}  kr = RotaryEmbedding<rotary_embedding_dim = 4>(kt, cos, sin)
  nk = TensorScatter<axis = 2>(pk, kr, past)
  nv = TensorScatter<axis = 2>(pv, vt, past)
  t = Shape<start = 2, end = 3>(qr)
  total = Add({added}, t)
  a = Attention<{attributes}>(qr, nk, nv, , , , total)
  at = Transpose<perm = [0, 2, 1, 3]>({output})
  y = Reshape(at, ys)
}}"""
PLAIN = {
    "query": "qr = RotaryEmbedding<rotary_embedding_dim = 4>(qt, cos, sin)",
    "added": "past",
    "attributes": "is_causal = 1",
    "output": "a",
}


def attention_feeds(batch: int, tokens: int, past: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"q": (tokens, 32), "k": (tokens, 16), "v": (tokens, 16), "pk": (2, 20, 8), "pv": (2, 20, 8)}
    feeds = {n: rng.standard_normal((batch, *s), dtype=np.float32) for n, s in sizes.items()}
    angle = rng.standard_normal((batch, tokens, 2))
    feeds |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    return feeds | {"past": np.array(past)}


@pytest.mark.parametrize(
    ("batch", "tokens", "past"),
    [(1, 1, [0]), (1, 1, [7]), (1, 5, [0]), (1, 5, [9]), (3, 1, [0, 4, 19]), (3, 6, [0, 0, 0])],
)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attributes": "is_causal = 1, scale = 0.3"},
        {
            "query": "qn = Neg(qt)  qr = RotaryEmbedding<rotary_embedding_dim = 4>(qn, cos, sin)"
        },  # not made by a reshape
        {"output": "an", "attributes": "is_causal = 1"},
    ],
)
def test_attention_becomes_one_group_query_node(batch: int, tokens: int, past: list[int], change: dict) -> None:
    text = ATTENTION.format(**(PLAIN | change))
    if change.get("output") == "an":
        text = text.replace("at = Transpose", "an = Neg(a)\n  at = Transpose")
    feeds = attention_feeds(batch, tokens, past)
    expected = run(parse(text), feeds)
    model = parse(text)
    result = LowerAttention()(model)
    assert result.modified
    RemoveUnusedNodesPass()(model)
    made = operators(model)
    assert made.count("GroupQueryAttention") == 1
    assert not {"Attention", "TensorScatter"} & set(made)
    if not change:
        assert "Transpose" not in made
    onnx.checker.check_model(ir.to_proto(model))
    found = run(model, feeds)
    assert np.abs(found[0] - expected[0]).max() < 1e-5
    for cache, reference in zip(found[1:], expected[1:], strict=True):
        for row in range(batch):  # beyond its length a cache holds whatever it likes
            end = past[row] + tokens
            assert np.abs(cache[row, :, :end] - reference[row, :, :end]).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": "is_causal = 0"}, "is_causal"),
        ({"attributes": "softcap = 1.0, is_causal = 1"}, "softcap"),
        ({"added": "other"}, "write index plus"),
    ],
)
def test_attention_that_means_something_else_is_refused(change: dict, message: str) -> None:
    text = ATTENTION.format(**(PLAIN | change)).replace("t = Shape<start", "other = Neg(past)\n  t = Shape<start")
    with pytest.raises(Exception, match=message):
        LowerAttention()(parse(text))


def test_heads_that_the_kernel_does_not_take_are_refused_at_the_build() -> None:
    narrow = ATTENTION.format(**PLAIN).replace("0, 0, 4, 8", "0, 0, 8, 4").replace("0, 0, 2, 8", "0, 0, 4, 4")
    with pytest.raises(Exception, match="multiple of 8 channels, not of 4"):
        LowerAttention()(parse(narrow.replace("[B,2,S,8]", "[B,4,S,4]")))


LINEAR_ATTENTION = """g (float[1,T,8] q, float[1,T,8] k, float[1,T,8] v, float[1,2,4,4] s, float[1,T,2] d)
    => (float[1,T,8] y, float[1,2,4,4] ns) {{
  y, ns = LinearAttention<q_num_heads = 2, kv_num_heads = 2, update_rule = "gated"{scale}>(q, k, v, s, d)
}}"""


def test_linear_attention_matches_the_recurrence() -> None:
    rng = np.random.default_rng(1)
    feeds = {n: rng.standard_normal((1, 9, 8), dtype=np.float32) for n in "qkv"}
    feeds |= {"s": rng.standard_normal((1, 2, 4, 4), dtype=np.float32), "d": -rng.random((1, 9, 2), dtype=np.float32)}
    model = parse(LINEAR_ATTENTION.format(scale=", scale = 1.0"), opset=27)
    LowerLinearAttention()(model)
    LowerOpset()(model)
    assert [(n.domain, n.op_type) for n in model.graph] == [("com.microsoft", "LinearAttention")]
    y, state = run(model, feeds)
    expected = feeds["s"][0].astype(np.float64)
    for t in range(9):
        q, k, v = (feeds[n][0, t].astype(np.float64).reshape(2, 4) for n in "qkv")
        expected = np.exp(feeds["d"][0, t].astype(np.float64))[:, None, None] * expected + k[:, :, None] * v[:, None]
        assert np.abs(y[0, t].reshape(2, 4) - np.einsum("hk,hkv->hv", q, expected)).max() < 1e-5
    assert np.abs(state[0] - expected).max() < 1e-5


def test_linear_attention_without_a_scale_is_refused() -> None:
    with pytest.raises(Exception, match="scale"):
        LowerLinearAttention()(parse(LINEAR_ATTENTION.format(scale=""), opset=27))


def test_linear_layers_take_weights_as_they_are() -> None:
    text = """g (float[B,T,6] x) => (float[B,T,5] y, float[B,T,4] z) {{
      wt = Transpose<perm = [1, 0]>(w)  y = MatMul(x, wt)
      u = Constant<value = float[6,4] {{{}}}>()  z = MatMul(x, u)
    }}""".format(", ".join(["0.5"] * 24))
    weight = np.random.default_rng(2).standard_normal((5, 6), dtype=np.float32)
    proto = onnx.parser.parse_model(HEADER.format(opset=24) + text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = ShapeInferencePass()(ir.from_proto(proto)).model
    x = np.random.default_rng(3).standard_normal((2, 3, 6), dtype=np.float32)
    assert LowerLinear()(model).modified
    assert operators(model) == ["FusedMatMul", "MatMul"]
    y, z = run(model, {"x": x})
    assert np.abs(y - x @ weight.T).max() < 1e-5
    assert np.abs(z - x.sum(-1, keepdims=True) * 0.5).max() < 1e-5


MOE = """g (float[B,T,6] x, float[n,5] r) => (float[B,T,6] y) {{
  y = com.microsoft.MoE<k = {k}, activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = {alpha},
    activation_beta = 0.0, normalize_routing_weights = 1>(x, r, w1, , w2)
}}"""


def moe_model(folder: Path, k: int = 2, alpha: float = 1.0) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """A mixture of 5 experts, hidden 6, inner 8, its weights in a file as a build leaves them."""
    rng = np.random.default_rng(4)
    w1 = rng.standard_normal((5, 16, 6), dtype=np.float32)
    w2 = rng.standard_normal((5, 6, 8), dtype=np.float32)
    (folder / "w.bin").write_bytes(b"\0" * 64 + w1.tobytes() + w2.tobytes())
    proto = onnx.parser.parse_model(HEADER.format(opset=24) + MOE.format(k=k, alpha=alpha))
    for name, array, offset in (("w1", w1, 64), ("w2", w2, 64 + w1.nbytes)):
        tensor = proto.graph.initializer.add(name=name, data_type=1, dims=array.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "w.bin"), ("offset", str(offset)), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=value)
    return ir.from_proto(proto), w1, w2


@pytest.mark.parametrize(("batch", "tokens", "k"), [(1, 1, 2), (2, 3, 2), (1, 40, 2), (3, 5, 1), (1, 7, 5)])
def test_grouped_experts_match_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, tokens: int, k: int
) -> None:
    model, w1, w2 = moe_model(tmp_path, k)
    monkeypatch.chdir(tmp_path)  # where the runtime looks for the weights of a model that comes as bytes
    rng = np.random.default_rng((batch, tokens))
    x = rng.standard_normal((batch, tokens, 6), dtype=np.float32)
    r = rng.standard_normal((batch * tokens, 5), dtype=np.float32)
    r[: len(r) // 2] = r[0]  # some experts get many tokens, some none
    group = GroupExperts()
    assert group(model).modified
    assert group.parts == {"w1": 5, "w2": 5}
    assert "MoE" not in operators(model)
    assert sorted(model.graph.initializers) == [f"w{i}@{e}" for i in (1, 2) for e in range(5)]
    onnx.checker.check_model(ir.to_proto(model))
    (found,) = run(model, {"x": x, "r": r})
    for row, (token, logits) in enumerate(zip(x.reshape(-1, 6).astype(np.float64), r.astype(np.float64), strict=True)):
        order = np.argsort(-logits)[:k]
        share = np.exp(logits[order]) / np.exp(logits[order]).sum()
        expected = np.zeros(6)
        for expert, part in zip(order, share, strict=True):
            gate, up = w1[expert, 0::2] @ token, w1[expert, 1::2] @ token
            expected += part * (w2[expert] @ (gate / (1 + np.exp(-gate)) * up))
        assert np.abs(found.reshape(-1, 6)[row] - expected).max() < 1e-4


def test_experts_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="MoE other than"):
        GroupExperts()(moe_model(tmp_path, alpha=1.7)[0])


def test_a_newer_operator_that_reads_differently_is_refused() -> None:
    model = parse(
        "g (float[2] x) => (float[n] y) { one = Constant<value = float {1.0}>()  y = Range<stash_type = 1>(one, one, one) }",
        27,
    )
    with pytest.raises(Exception, match="Range"):
        LowerOpset()(model)


def test_lowering_is_complete_and_keeps_names() -> None:
    model = small_graph.model(small_graph.random_weights())
    before = [v.name for v in (*model.graph.inputs, *model.graph.outputs)]
    lower(model)
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == before
    assert model.graph.opset_imports == {"": 24, "com.microsoft": 1}
    names = {out.name for node in model.graph for out in node.outputs}
    assert set(small_graph.TAPS) <= names
    made = operators(model)
    assert "Transpose" not in made
    assert made.count("FusedMatMul") == 2 * 4 + 5 + 1
    again = list(made)
    lower(model)
    assert operators(model) == again
