"""The PyTorch definition against the fp64 recurrence and against the transformers port with its known faults patched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import oracle, plain_checkpoint

from model_defs.config import ResidualScale
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.backends.weights import Rounding, load_model

# All apart, as the published ones are not: a factor in another's place must show.
SCALES = dict(
    lightning_scale=ResidualScale(1.7, 0.9), softmax_scale=ResidualScale(1.5, 1.2), mlp_scale=ResidualScale(1.6, 1.1)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return plain_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", **SCALES)


@pytest.fixture(scope="module")
def session(checkpoint):
    return PyTorchSession.load(checkpoint, "float64", threads=1)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, count)


def forward(model, ids: np.ndarray, states=None, past: int = 0):
    """Logits at every position, states and taps of one row, in the model's own types."""
    states = model.new_states(1, past + len(ids)) if states is None else states
    count = torch.tensor([len(ids)])
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None], count, torch.tensor([past]), torch.arange(len(ids))[None], states)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 2e-4)])
def test_it_computes_the_recurrence(checkpoint, dtype, tolerance):
    """fp64: both do the same sums in another order. fp32: the tolerance of engines. 130 tokens cross two chunks."""
    ids = tokens(130)
    steps, memory = oracle(checkpoint).run(ids)
    logits, states, taps = forward(load_model(checkpoint, checkpoint.config, Rounding(dtype)), ids)
    expected = np.stack([step.logits_N for step in steps])
    assert 3 < np.abs(expected).max(-1).mean() < 12  # the scale at which the tolerance means something
    np.testing.assert_allclose(logits[0].numpy(), expected, rtol=0, atol=tolerance)
    for layer in range(4):
        hidden = np.stack([step.hidden[layer] for step in steps])
        router = np.stack([step.router[layer] for step in steps])
        np.testing.assert_allclose(taps.hidden[layer][0].numpy(), hidden, rtol=0, atol=tolerance)
        np.testing.assert_allclose(taps.router_logits[layer][0].numpy(), router, rtol=0, atol=tolerance)
    remaining = iter(states)
    for layer, kind in enumerate(checkpoint.config.layer_kinds):
        if kind == "lightning":
            assert relative(next(remaining)[0].numpy(), memory.states[layer]) < tolerance
        else:
            for cache in (memory.keys[layer], memory.values[layer]):
                assert relative(next(remaining)[0, :, :130].numpy(), np.stack(cache, axis=1)) < tolerance


@pytest.mark.parametrize(
    "changes",
    [
        dict(layer_kinds=("lightning",), num_attention_heads=1, num_key_value_heads=1, num_local_experts=1),
        dict(layer_kinds=("softmax",), num_attention_heads=6, num_key_value_heads=3, rotary_dim=32, rope_theta=1e4),
        dict(layer_kinds=("softmax", "lightning"), head_dim=6, rotary_dim=2, num_key_value_heads=4, hidden_size=20),
        dict(layer_kinds=("lightning", "lightning"), num_attention_heads=16, head_dim=4, rotary_dim=4, vocab_size=7),
        dict(layer_kinds=("lightning", "softmax", "softmax"), head_dim=128, rotary_dim=64, num_key_value_heads=1),
    ],
)
@pytest.mark.parametrize("top", [1, 4])
def test_odd_models_compute_the_recurrence(tmp_path, changes, top):
    """Patterns, head counts and widths that no published model has; one expert or four on a token; a chunk and a bit."""
    experts = max(changes.get("num_local_experts", 5), top)
    sizes = {"slope_layers": len(changes["layer_kinds"]), "num_experts_per_tok": top, "intermediate_size": 9}
    odd = plain_checkpoint(tmp_path / "odd", **(SCALES | sizes | changes | {"num_local_experts": experts}))
    ids = np.random.default_rng(top).integers(0, odd.config.vocab_size, 67)
    steps, _ = oracle(odd).run(ids)
    logits, _, _ = forward(load_model(odd, odd.config, Rounding("float64")), ids)
    np.testing.assert_allclose(logits[0].numpy(), np.stack([step.logits_N for step in steps]), rtol=0, atol=1e-9)


def relative(mine: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(mine - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("count", [70, 300])  # within one block of the port's 256 tokens, and beyond it
def test_it_computes_what_the_patched_port_computes(checkpoint, monkeypatch, count):
    """Patched: half rotary, the slopes' divisor (L - 1 + 1e-5 for L - 1, which counts in the last layer of a shallow model), and
    explicit positions. The state's type needs no patch in an fp32 model. 5e-5 is what was measured between the patched port and
    the recurrence at a logit scale of 6.7.
    """
    pytest.importorskip("transformers")
    from transformers.models.minimax import modeling_minimax

    from mxcompile.backends.transformers import TransformersSession

    port = TransformersSession.load(checkpoint, "float32", threads=1).model
    ids = tokens(count)
    last = 5  # tokens of the end that are decoded
    mine = load_model(checkpoint, checkpoint.config)
    logits, states, _ = forward(mine, ids)

    def run():
        parts, cache = [], None
        with torch.inference_mode():
            for start, end in [(0, count - last), *((i, i + 1) for i in range(count - last, count))]:
                out = port(
                    input_ids=torch.from_numpy(ids)[None, start:end],
                    position_ids=torch.arange(start, end)[None],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = out.past_key_values
                parts.append(out.logits[0].float().numpy())
        return np.concatenate(parts), cache

    unpatched, _ = run()
    assert np.abs(unpatched - logits[0].numpy()).max() > 0.5, "the port has changed: its rotary fault is gone"

    rotary, theta, original = (
        checkpoint.config.rotary_dim,
        checkpoint.config.rope_theta,
        modeling_minimax.apply_rotary_pos_emb,
    )
    frequencies = 1.0 / (theta ** (torch.arange(0, rotary, 2, dtype=torch.float) / rotary))

    def half_rotary(q, k, cos, sin, *args, **kwargs):
        turned = original(q[..., :rotary], k[..., :rotary], cos, sin, *args, **kwargs)
        return tuple(torch.cat((t, x[..., rotary:]), -1) for t, x in zip(turned, (q, k), strict=True))

    monkeypatch.setattr(modeling_minimax, "apply_rotary_pos_emb", half_rotary)
    monkeypatch.setattr(port.model.rotary_emb, "inv_freq", frequencies)
    for layer, kind in enumerate(checkpoint.config.layer_kinds):
        if kind == "lightning":
            attention = port.model.layers[layer].self_attn
            slopes = [oracle(checkpoint).slope(layer, head) for head in range(4)]
            attention.slope_rate = torch.tensor(slopes)[:, None, None]
            attention.query_decay, attention.key_decay, attention.diagonal_decay = attention.decay_factors(
                attention.slope_rate
            )
    patched, cache = run()
    np.testing.assert_allclose(patched, logits[0].numpy(), rtol=0, atol=5e-5)
    assert relative(states[0].numpy(), cache.get_linear_cache(0).numpy()) < 2e-5


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=4).filter(any),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    decoded=st.integers(0, 3),
)
def test_any_way_through_the_same_tokens_is_the_same(session, lengths, cuts, decoded):
    """Ragged batches, chunks and single steps against single rows in one piece. fp64 inside; sessions give fp32 out."""
    rows = [tokens(length + decoded * (length > 0), seed=row) for row, length in enumerate(lengths)]
    state = session.new_state(len(rows))
    given_B = np.zeros(len(rows), np.int64)
    got: list[list[np.ndarray]] = [[] for _ in rows]
    stray = np.random.default_rng(9)
    step = 0
    while (given_B < [len(row) for row in rows]).any():
        room_B = np.array([len(row) for row in rows]) - given_B
        size = cuts[step % len(cuts)]
        new_B = np.minimum(room_B, size)
        ending = room_B <= decoded
        new_B[ending] = np.minimum(room_B[ending], 1)  # the end of every row goes token by token
        ids_BT = stray.integers(0, 96, (len(rows), int(new_B.max())))
        for row, ids in enumerate(rows):
            ids_BT[row, : new_B[row]] = ids[given_B[row] : given_B[row] + new_B[row]]
        logits = session.forward(ids_BT, new_B, state, positions="all").logits
        for row in range(len(rows)):
            got[row].append(logits[row, : new_B[row]])
            assert not logits[row, new_B[row] :].any()
        given_B += new_B
        step += 1
    for row, ids in enumerate(rows):
        if not len(ids):
            assert not any(array.any() for array in state.read_row(row).recurrent.values())
            continue
        alone = session.new_state(1)
        expected = session.forward(ids[None], [len(ids)], alone, positions="all").logits[0]
        np.testing.assert_allclose(np.concatenate(got[row]), expected, rtol=0, atol=2e-6)
        mine, single = state.read_row(row), alone.read_row(0)
        for part in ("recurrent", "key", "value"):
            for layer, array in getattr(mine, part).items():
                np.testing.assert_allclose(array, getattr(single, part)[layer], rtol=1e-5, atol=2e-6)


def test_padding_leaves_states_as_they_are(session):
    """A row without new tokens keeps every bit, whatever ids its padding holds and however long it is."""
    state = session.new_state(2)
    session.prefill([tokens(20), tokens(33, 1)], state)
    before = state.read_row(0)
    session.forward(tokens(80, 2).reshape(2, 40), [0, 40], state)
    after = state.read_row(0)
    assert after.length == 20
    for part in ("recurrent", "key", "value"):
        for layer, array in getattr(before, part).items():
            assert (array == getattr(after, part)[layer]).all()


def test_a_truncated_model_computes_what_its_layers_do_in_the_full_one(checkpoint):
    """Slopes are spread over the full depth, whatever part of it is built."""
    ids = tokens(40)
    whole = forward(load_model(checkpoint, checkpoint.config, Rounding("float64")), ids)[2]
    cut = forward(load_model(checkpoint, checkpoint.config.truncated(2), Rounding("float64")), ids)[2]
    assert len(cut.hidden) == 2
    for layer in range(2):
        assert torch.equal(cut.hidden[layer], whole.hidden[layer])


def test_sixteen_bit_models_keep_their_wide_parts(checkpoint):
    model = load_model(checkpoint, checkpoint.config, Rounding("bfloat16"))
    logits, states, taps = forward(model, tokens(70))
    assert logits.dtype == torch.float32
    assert [state.dtype for state in states] == [torch.float32] * 2 + [torch.bfloat16] * 2 + [torch.float32]
    assert taps.router_logits[0].dtype == torch.float32
    _, memory = oracle(checkpoint).run(tokens(70))
    # bf16 rounds to 0.2 %; ten roundings lie before the state of the first layer.
    assert relative(states[0][0].numpy(), memory.states[0]) < 0.02


def test_sixteen_bit_models_turn_by_wide_angles(tmp_path):
    """Keys at position 3,000, where an angle of 16 bits is off by whole turns, against those of the fp64 model."""
    checkpoint = plain_checkpoint(tmp_path / "c", layer_kinds=("softmax",), slope_layers=1)
    ids, past = tokens(8), 3000
    exact, rounded = (
        forward(model, ids, model.new_states(1, past + len(ids)), past)[1][0][0, :, past:].double()
        for model in (load_model(checkpoint, checkpoint.config, Rounding(dtype)) for dtype in ("float64", "bfloat16"))
    )
    # Embedding, norm, its weight, projection and the turned key are rounded, each to 2^-9 at most.
    assert relative(rounded.numpy(), exact.numpy()) < 0.01
