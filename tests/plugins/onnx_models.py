"""Small ONNX models of one node each, as TensorRT's parser meets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT8, INT32, INT64 = TensorProto.INT8, TensorProto.INT32, TensorProto.INT64
Shape = Sequence[int | str]
NO_ELEMENTS = "absent"  # an optional input that is not there


def model(
    op: str,
    domain: str,
    inputs: Mapping[str, tuple[int, Shape]],
    order: Sequence[str],
    outputs: Mapping[str, tuple[int, Shape]],
    **attributes: Any,
) -> bytes:
    """One node `op` named after it, its inputs in `order` being graph inputs; serialized."""
    node = helper.make_node(op, list(order), list(outputs), domain=domain, name=f"the_{op}", **attributes)
    values = [
        [helper.make_tensor_value_info(n, t, list(s)) for n, (t, s) in part.items()] for part in (inputs, outputs)
    ]
    absent = [helper.make_tensor(NO_ELEMENTS, FP16, [0], [])] if NO_ELEMENTS in order else []
    graph = helper.make_graph([node], "one_node", *values, absent)
    domains = {"": 27, "com.microsoft": 1, domain: 27 if domain == "" else 1}
    opsets = [helper.make_opsetid(name, version) for name, version in domains.items()]
    made: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(made.SerializeToString())


def linear_attention(
    domain: str = "",
    heads: int = 4,
    head_dim: int = 128,
    dtype: int = BF16,
    changes: Mapping[str, tuple[int, Shape]] | None = None,
    drop: Sequence[str] = (),
    **attributes: Any,
) -> bytes:
    """LinearAttention over dynamic batch B and length T; `changes` replaces the type and shape of an input."""
    rows = (dtype, ("B", "T", heads * head_dim))
    state = (FP32, ("B", heads, head_dim, head_dim))
    inputs = {"query": rows, "key": rows, "value": rows, "past_state": state, "decay": (FP32, ("B", "T", heads))}
    inputs = {name: value for name, value in {**inputs, **(changes or {})}.items() if name not in drop}
    standard = dict(q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0)
    given = {name: value for name, value in {**standard, **attributes}.items() if value is not None}
    outputs = {"output": rows, "present_state": state}
    return model("LinearAttention", domain, inputs, list(inputs), outputs, **given)


def moe(
    quantized: bool = False,
    changes: Mapping[str, tuple[int, Shape]] | None = None,
    bias: bool = False,
    op: str | None = None,
    **attributes: Any,
) -> bytes:
    """MoE or QMoEInt8 with 4 experts, hidden size 64 and expert width 48 over dynamic batch and length."""
    weight = INT8 if quantized else FP16
    inputs: dict[str, tuple[int, Shape]] = {
        "input": (FP16, ("B", "T", 64)),
        "router_probs": (FP16, ("N", 4)),
        "fc1": (weight, (4, 96, 64)),
        "fc2": (weight, (4, 64, 48)),
    }
    if quantized:
        inputs |= {"fc1_scales": (FP32, (4, 96)), "fc2_scales": (FP32, (4, 64))}
    if bias:
        inputs["bias"] = (FP16, (4, 96))
    inputs |= changes or {}
    absent = "bias" if bias else NO_ELEMENTS
    order = ["input", "router_probs", "fc1", absent, "fc2"]
    if quantized:
        order = ["input", "router_probs", "fc1", "fc1_scales", absent, "fc2", "fc2_scales"]
        attributes = {"expert_weight_bits": 8, **attributes}
    standard = dict(k=2, activation_type="swiglu", swiglu_fusion=1, normalize_routing_weights=1)
    given = {name: value for name, value in {**standard, **attributes}.items() if value is not None}
    name = op or ("QMoEInt8" if quantized else "MoE")
    return model(name, "com.microsoft", inputs, order, {"output": (FP16, ("B", "T", 64))}, **given)


def softmax_attention(
    changes: Mapping[str, tuple[int, Shape]] | None = None, drop: Sequence[str] = (), **attributes: Any
) -> bytes:
    """SoftmaxAttention with 8 heads on 2 key/value heads of 128 over dynamic batch, length and capacity."""
    cache = (BF16, ("B", 2, "S", 128))
    inputs: dict[str, tuple[int, Shape]] = {
        "query": (BF16, ("B", 8, "T", 128)),
        "key_cache": cache,
        "value_cache": cache,
        "past_lengths": (INT64, ("B",)),
        "new_lengths": (INT64, ("B",)),
    }
    inputs = {name: value for name, value in {**inputs, **(changes or {})}.items() if name not in drop}
    return model("SoftmaxAttention", "mxcompile", inputs, list(inputs), {"output": inputs["query"]}, **attributes)
