"""The lowered graph computes what the PyTorch definition does, in the engine's own 16-bit types.

An engine cannot run on a machine without a GPU; the graph it is built from can: onnx's reference evaluator runs it, with the plugin
operators as reference implementations (reference_ops.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lowered_graph import CAPACITY, Evaluated, canonical, lowered, numpy_of, random_model, small_config

from engines.tensorrt.lowering import Attention, FillAbsentInputs
from model_defs.config import ModelConfig

STEPS = ([9, 5], [3, 1], [0, 4])
# Against the fp32 result of the same weights, the graph may be off by what PyTorch in the same 16-bit type is, times three halves:
# both round as often, in another order, so their errors are two draws of one random walk.
RATIO = 1.5
# fp32 beside fp32, as tests/export/test_canonical_graph.py: a few ulps per layer on logits of about 4.
FP32_LIMIT = 5e-5


def relative_rms(found: np.ndarray, wanted: np.ndarray) -> float:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def assert_states_as_near(ours: Evaluated, theirs: Torch, truth: Torch) -> None:
    """The states of both rows, caches as far as they are filled, lie within RATIO of as near to the truth as PyTorch's."""
    for state, torch_state, true_state in zip(ours.states.values(), theirs.states, truth.states, strict=True):
        seen = [np.s_[row] if state.dtype == np.float32 else np.s_[row, :, : ours.past[row]] for row in range(2)]
        found, near, wanted = (
            np.concatenate([x[part].astype(np.float32).reshape(-1) for part in seen])
            for x in (state, numpy_of(torch_state), numpy_of(true_state))
        )
        assert relative_rms(found, wanted) < RATIO * relative_rms(near, wanted) + 1e-6


class Torch:
    """The definition, stepping."""

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        self.model = random_model(config, dtype)
        self.states, self.past = self.model.new_states(2, CAPACITY), np.zeros(2, np.int64)

    def step(self, ids: np.ndarray, new: list[int]) -> np.ndarray:
        positions = np.tile(np.arange(max(new)), (2, 1))
        arrays = [torch.from_numpy(np.asarray(x)) for x in (ids, new, self.past, positions)]
        with torch.no_grad():
            logits, self.states, _ = self.model(*arrays, self.states)
        self.past = self.past + np.array(new)
        return logits.numpy()


@pytest.mark.parametrize("attention", ["mask", "plugin"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ragged_prefill_and_continuation_equal_pytorch(dtype: str, attention: Attention) -> None:
    """With two experts of two per token: with more, a near tie that rounding decides makes any two 16-bit runs differ."""
    config = small_config(num_local_experts=2)
    truth, theirs = Torch(config, "float32"), Torch(config, dtype)
    ours = Evaluated.of(lowered(config, dtype, theirs.model, attention), batch=2)
    random = np.random.default_rng(1)
    logits: list[list[np.ndarray]] = [[], [], []]
    for new in STEPS:
        ids = random.integers(0, config.vocab_size, (2, max(new)))
        valid = np.arange(max(new)) < np.array(new)[:, None]
        for kept, who in zip(logits, (truth, theirs, ours), strict=True):
            kept.append(who.step(ids, new)[valid])
            assert kept[-1].dtype == np.float32
    wanted, torch_logits, our_logits = (np.concatenate(kept) for kept in logits)
    assert relative_rms(torch_logits, wanted) < 0.1  # else the comparison would prove nothing
    assert relative_rms(our_logits, wanted) < RATIO * relative_rms(torch_logits, wanted)
    assert_states_as_near(ours, theirs, truth)


@pytest.mark.parametrize("attention", ["mask", "plugin"])
def test_all_experts_in_fp32_equal_pytorch(attention: Attention) -> None:
    """The same passes on an fp32 graph: no rounding to hide a wrong wire, and routing among eight experts."""
    config = small_config()
    theirs = Torch(config, "float32")
    ours = Evaluated.of(lowered(config, "float32", theirs.model, attention), batch=2)
    random = np.random.default_rng(2)
    for new in STEPS:
        ids = random.integers(0, config.vocab_size, (2, max(new)))
        valid = np.arange(max(new)) < np.array(new)[:, None]
        assert np.abs(ours.step(ids, new) - theirs.step(ids, new))[valid].max() < FP32_LIMIT


def test_states_stay_fp32_and_caches_take_the_models_type() -> None:
    config = small_config()
    graph = lowered(config, "bfloat16", random_model(config, "bfloat16"), "plugin")
    types = {value.name: value.dtype.name for value in graph.graph.inputs}
    assert {types[f"past_key_values.{layer}.recurrent_state"] for layer in range(7)} == {"FLOAT"}
    assert types["past_key_values.7.key"] == "BFLOAT16"
    assert {value.name: value.dtype.name for value in graph.graph.outputs}["logits"] == "FLOAT"


def difference_by_garbage(graph, garbage: float) -> float:  # type: ignore[no-untyped-def]
    """Largest change of logits and states when the caches hold garbage behind the lengths; NaN counts as endless."""
    results = []
    for spoil in (False, True):
        run, random = Evaluated.of(graph, batch=2), np.random.default_rng(3)
        logits = []
        for new in ([6, 2], [1, 3], [1, 1]):
            if spoil:
                run.spoil_behind_lengths(garbage)
            valid = np.arange(max(new)) < np.array(new)[:, None]
            logits.append(run.step(random.integers(0, 64, (2, max(new))), new)[valid])
        recurrent = [state for name, state in run.states.items() if name.endswith("recurrent_state")]
        results.append(np.concatenate([x.reshape(-1) for x in (*logits, *recurrent)]))
    difference = np.abs(results[0] - results[1])
    return float("inf") if np.isnan(difference).any() else float(difference.max())


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 6e4])
@pytest.mark.parametrize("attention", ["mask", "plugin"])
def test_garbage_behind_the_length_never_leaks(attention: Attention, garbage: float) -> None:
    config = small_config()
    model = random_model(config, "float16")
    assert difference_by_garbage(lowered(config, "float16", model, attention), garbage) == 0


def test_the_form_that_tensorrt_would_make_of_the_canonical_graph_leaks() -> None:
    """Its parser drops nonpad_kv_seqlen. The test above must be able to fail: without lengths it does."""
    config = small_config()
    graph = canonical(config, "float16", random_model(config, "float16"))
    FillAbsentInputs()(graph)
    assert difference_by_garbage(graph, 6e4) == 0
    for node in graph.graph:
        if node.op_type == "Attention":
            node.replace_input_with(6, None)
            node.resize_inputs(3)
            node.attributes.pop("is_causal")
    assert difference_by_garbage(graph, 6e4) > 0.1
