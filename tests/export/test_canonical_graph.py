"""The canonical graph against the PyTorch definition, run by onnx's own reference evaluator: an implementation of each standard
operator that shares no code with torch or ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from random_text_model import random_model

from export.errors import ExportError
from export.trace import trace_model
from export.verify import verify_canonical, verify_with_onnx
from model_defs.config import ModelConfig, ResidualScale
from model_defs.presets import hybrid_pattern, preset
from model_defs.text_model import TextModel

# fp32 against fp32 over both kinds of layers, logit scale about 4: each rounds differently, a few ulps per layer.
TOLERANCE = 5e-5


def tiny_config(**changes: object) -> ModelConfig:
    """Three layers of a model of eight, both kinds in both neighbourhoods; tracing more shows nothing new."""
    kinds = ("lightning", "softmax", "lightning")
    sizes = dict(layer_kinds=kinds, hidden_size=32, head_dim=16, rotary_dim=8, intermediate_size=24, vocab_size=64)
    return dataclasses.replace(preset("tiny"), **(sizes | changes))


class MoE(OpRun):  # the evaluator finds it by this name
    """com.microsoft::MoE token by token in numpy; written apart from model_defs.ops.moe."""

    op_domain = "com.microsoft"

    def _run(self, x, router, fc1, _bias1, fc2, _bias2=None, k=None, **_attributes):  # type: ignore[no-untyped-def]
        tokens = x.reshape(-1, x.shape[-1])
        out = np.zeros_like(tokens)
        for n, (token, logits) in enumerate(zip(tokens, router, strict=True)):
            chosen = np.argsort(-logits, kind="stable")[:k]
            weights = np.exp(logits[chosen] - logits[chosen].max())
            for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
                gate, up = fc1[expert][0::2] @ token, fc1[expert][1::2] @ token
                out[n] += weight * (fc2[expert] @ (gate / (1 + np.exp(-gate)) * up))
        return (out.reshape(x.shape),)


@pytest.fixture(scope="module")
def pair() -> tuple[ReferenceEvaluator, TextModel]:
    # Factors that differ, and are not 1: the graph must hold each in its place.
    scales = dict(
        lightning_scale=ResidualScale(2.0, 0.9),
        softmax_scale=ResidualScale(1.8, 1.2),
        mlp_scale=ResidualScale(1.9, 1.1),
    )
    config = tiny_config(**scales)
    graph, model = trace_model(config), random_model(config)
    for name, parameter in model.named_parameters():
        graph.graph.initializers[name].const_value = ir.tensor(parameter.data.numpy(), name=name)
    return ReferenceEvaluator(ir.to_proto(graph), new_ops=[MoE]), model


def run_both(pair, ids, new, past, states):  # type: ignore[no-untyped-def]
    evaluator, model = pair
    batch, tokens = ids.shape
    positions = np.tile(np.arange(tokens), (batch, 1))
    arrays = [ids, np.asarray(new), np.asarray(past), positions]
    names = [value for value in evaluator.input_names if not value.startswith("past_key_values")]
    feeds = dict(zip(names, arrays, strict=True))
    feeds |= dict(zip([n for n in evaluator.input_names if n not in names], [s.numpy() for s in states], strict=True))
    with torch.no_grad():
        logits, presents, _ = model(*map(torch.from_numpy, arrays), states)
    return evaluator.run(None, feeds), [logits.numpy(), *(p.numpy() for p in presents)], presents


def test_ragged_prefill_then_ragged_continuation_equals_pytorch(pair) -> None:  # type: ignore[no-untyped-def]
    random = np.random.default_rng(0)
    states = pair[1].new_states(2, 24)
    past = np.zeros(2, dtype=np.int64)
    for new in ([9, 5], [3, 1], [0, 4]):
        ids = random.integers(0, 64, (2, max(new)))
        onnx_results, torch_results, states = run_both(pair, ids, new, past, states)
        valid = np.arange(max(new)) < np.array(new)[:, None]
        assert np.abs(onnx_results[0] - torch_results[0])[valid].max() < TOLERANCE
        for ours, theirs in zip(onnx_results[1:], torch_results[1:], strict=True):
            assert np.abs(ours - theirs).max() < TOLERANCE
        past = past + new


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_graph_is_valid_onnx_in_every_dtype(dtype: str) -> None:
    config = tiny_config()
    graph = trace_model(config, dtype)
    verify_with_onnx(graph)
    wanted = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}[dtype]
    inputs = {value.name: value for value in graph.graph.inputs}
    assert inputs["past_key_values.1.key"].dtype == wanted
    assert inputs["past_key_values.0.recurrent_state"].dtype == ir.DataType.FLOAT
    assert graph.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_graph_holds_no_trace_of_the_machine() -> None:
    text = ir.to_proto(trace_model(tiny_config())).SerializeToString()
    assert b".py" not in text
    assert b"site-packages" not in text


def test_verifier_refuses_a_lost_lightning_layer() -> None:
    config = tiny_config(layer_kinds=hybrid_pattern(2))
    graph = trace_model(config)
    with pytest.raises(ExportError, match="graph inputs differ"):
        verify_canonical(graph, tiny_config(layer_kinds=hybrid_pattern(3)))
    node = next(node for node in graph.graph if node.op_type == "LinearAttention")
    node.op_type = "Attention"
    with pytest.raises(ExportError, match="LinearAttention nodes, expected 2"):
        verify_canonical(graph, config)


def test_decay_and_rotary_numbers_are_baked_in_fp32() -> None:
    from model_defs.constants import decay_slopes, rotary_frequencies

    config = tiny_config(mlp_scale=ResidualScale(1.9, 0.7))
    graph = trace_model(config, "bfloat16")
    constants = [n.attributes["value"].as_tensor().numpy() for n in graph.graph if "value" in n.attributes]
    for expected in (-decay_slopes(config, 0), -decay_slopes(config, 2), rotary_frequencies(8, 1e7)):
        assert any(c.dtype == np.float32 and np.array_equal(c, expected) for c in constants)
    factors = {}
    for node in graph.graph:
        if "value_float" in node.attributes:
            factors[node.attributes["value_float"].value] = [use.node for use in node.outputs[0].uses()]
    assert factors.keys() >= {1.9, 0.7}
    for product in (*factors[1.9], *factors[0.7]):  # a residual's factor of 16 bits would be off by up to 2e-3
        widened = product.inputs[0].producer()
        assert (product.op_type, widened.op_type) == ("Mul", "Cast")
        assert widened.attributes["to"].value == ir.DataType.FLOAT


def test_nodes_say_what_runtimes_must_do() -> None:
    """What the evaluator's own forms above take for granted must stand in the graph: engines read it there."""
    config = tiny_config(num_experts_per_tok=3)
    wanted = {
        "MoE": {
            "k": 3,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
            "normalize_routing_weights": 1,
        },
        "LinearAttention": {"q_num_heads": 4, "kv_num_heads": 4, "update_rule": "gated", "scale": 1.0},
        "Attention": {"is_causal": 1},
        "RotaryEmbedding": {"rotary_embedding_dim": 8},
        "TensorScatter": {"axis": 2},
    }
    norms = Counter()
    for node in trace_model(config).graph:
        found = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type in wanted:
            assert wanted[node.op_type].items() <= found.items()  # beside what has its default
        if node.op_type == "RMSNormalization":
            norms[round(found.pop("epsilon"), 9)] += 1
            assert found.items() >= {"axis": -1, "stash_type": 1}.items()
    assert norms == {1e-6: 2, 1e-5: 7}  # that of each lightning layer, and the others
