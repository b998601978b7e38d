"""Faults planted into a copy of the PyTorch definition are caught, and their layer and kind are named."""

from __future__ import annotations

import pytest
import torch
from plain_models import plain_checkpoint

from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.backends.weights import Rounding, load_model
from mxcompile.validation import ValidationOptions, validate

OPTIONS = ValidationOptions(quick=True, lengths=(1, 65), threads=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return plain_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint")


def session(model, **limits):
    return PyTorchSession(model, threads=1, max_seq_len=320, max_batch_size=4, **limits)


def swap_experts(model):
    weight = model.layers[1].block_sparse_moe.fc2.weight
    weight[[1, 4]] = weight[[4, 1]].clone()


def decay_of_the_next_layer(model):
    model.layers[1].self_attn.slopes = oracle_slopes(2)


def oracle_slopes(layer):
    from plain_models import PLAIN

    from model_defs.constants import decay_slopes

    return decay_slopes(PLAIN, layer).tolist()


def full_rotary(model):
    from model_defs.constants import rotary_frequencies

    model.frequencies = rotary_frequencies(model.config.head_dim, model.config.rope_theta).tolist()


def lightning_norm_eps(model):
    model.layers[3].self_attn.eps = model.config.rms_norm_eps  # 1e-5 for 1e-6


def swap_norms(model):
    layer = model.layers[1]
    first, second = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def swap_router_rows(model):
    weight = model.layers[0].block_sparse_moe.gate.weight
    weight[[0, 3]] = weight[[3, 0]].clone()


def wrong_final_norm(model):
    model.norm.weight.copy_(model.layers[0].input_layernorm.weight)


def state_in_bf16(model):
    """What the transformers port does to a 16-bit model; here only the state is rounded."""
    attention = model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda x, context, past: forward(x, context, past.bfloat16().float())


FAULTS = [
    (swap_experts, "float32", 1, "experts", "experts 1, 4"),
    (decay_of_the_next_layer, "float32", 1, "lightning", "decay"),
    (full_rotary, "float32", 2, "softmax", "rotary"),
    (lightning_norm_eps, "float64", 3, "lightning", "norm"),
    (swap_norms, "float32", 1, "lightning", "input norm"),
    (swap_router_rows, "float32", 0, "router", "router"),
    (wrong_final_norm, "float32", None, "head", "final norm"),
    (state_in_bf16, "float32", 0, "lightning", "recurrent state"),
]


@pytest.mark.parametrize(
    ("plant", "dtype", "layer", "kind", "word"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS]
)
def test_a_fault_is_caught_and_named(checkpoint, plant, dtype, layer, kind, word):
    faulty = load_model(checkpoint, checkpoint.config, Rounding(dtype))
    with torch.no_grad():
        plant(faulty)
    reference = session(load_model(checkpoint, checkpoint.config, Rounding(dtype)))
    report = validate(session(faulty), reference, OPTIONS)
    assert not report.passed
    assert report.fault is not None
    assert (report.fault.layer, report.fault.kind) == (layer, kind), report.fault.text
    assert word in report.fault.text
    assert report.fault.text[1:] in report.verdict
    assert "disagrees" in report.verdict


def test_the_same_model_passes(checkpoint):
    same = [session(load_model(checkpoint, checkpoint.config)) for _ in range(2)]
    report = validate(*same, OPTIONS)
    assert report.passed, report.verdict
    assert report.fault is None
    assert not report.not_run
    assert {check.case for check in report.checks if check.group == "Prefill logits against PyTorch"} == {
        "1 token",
        "65 tokens",
    }
    assert report.greedy[0].own_agreed == report.greedy[0].tokens == 50


class Untapped:
    """A session that gives no inside values away, as some engines do."""

    def __init__(self, inner):
        import dataclasses

        self._inner = inner
        self.config = dataclasses.replace(inner.config, taps=[])

    def __getattr__(self, name):
        return getattr(self._inner, name)


def test_without_taps_the_states_tell_where(checkpoint):
    faulty = load_model(checkpoint, checkpoint.config)
    with torch.no_grad():
        decay_of_the_next_layer(faulty)
    report = validate(Untapped(session(faulty)), session(load_model(checkpoint, checkpoint.config)), OPTIONS)
    assert (report.fault.layer, report.fault.kind) == (1, "lightning")
    assert "no taps" in report.fault.text
    assert any("no taps" in item.reason for item in report.not_run)


class Wrong:
    """A session with a fault outside the model: in how pieces, rows or padding are handled."""

    def __init__(self, inner, forward):
        self._inner, self._forward = inner, forward

    def forward(self, ids, new_lengths, state, positions="last", taps=False):
        return self._forward(self._inner, ids, new_lengths, state, positions, taps)

    def prefill(self, prompts, state, chunk=None):
        return self._inner.prefill(prompts, state, chunk)

    def __getattr__(self, name):
        return getattr(self._inner, name)


def padding_decays(inner, ids, new_lengths, state, positions, taps):
    """Right padding fades a row's state: the fault of the original."""
    result = inner.forward(ids, new_lengths, state, positions, taps)
    for row, new in enumerate(new_lengths):
        if new < ids.shape[1]:
            state.tensors[0][row] *= 0.99
    return result


def later_pieces_forget(inner, ids, new_lengths, state, positions, taps):
    """A second chunk starts from an empty state."""
    if max(new_lengths) > 1:
        state.tensors[1].zero_()
    return inner.forward(ids, new_lengths, state, positions, taps)


@pytest.mark.parametrize(
    ("forward", "group"),
    [(padding_decays, "Ragged batch against single rows"), (later_pieces_forget, "Chunked prefill against one piece")],
)
def test_faults_of_batches_and_chunks_are_caught(checkpoint, forward, group):
    model = load_model(checkpoint, checkpoint.config)
    report = validate(Wrong(session(model), forward), session(model), OPTIONS)
    failed = {check.group for check in report.failed}
    assert group in failed or f"States of {group[0].lower()}{group[1:]}" in failed
    assert "Prefill logits against PyTorch" not in failed
    assert report.fault is not None


def test_idle_rows_that_change_are_caught(checkpoint):
    model = load_model(checkpoint, checkpoint.config)
    report = validate(Wrong(session(model), padding_decays), session(model), OPTIONS)
    assert "Idle rows keep their states" in {check.group for check in report.failed}


def test_not_a_number_fails(checkpoint):
    faulty = load_model(checkpoint, checkpoint.config)
    faulty.layers[1].self_attn.norm.weight[3] = float("nan")
    report = validate(session(faulty), session(load_model(checkpoint, checkpoint.config)), OPTIONS)
    assert not report.passed
    assert (report.fault.layer, report.fault.kind) == (1, "lightning")
    assert report.to_dict()["fault"]["value"] is None
