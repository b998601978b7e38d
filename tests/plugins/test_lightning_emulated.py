"""The prefill and decode kernels' own code, run on the CPU, against the fp64 token-by-token recurrence.

Bounds: bf16 results carry three roundings of about 1.7e-3 RMS (scores or state as an operand, and the output itself), together
2.3e-3, so 4e-3 is the output's bound; the state is fp32 throughout, its bound is 2e-4 (the emulator adds exactly, so what is
seen here is near 2e-6 and the tests ask for 2e-5).
"""

from __future__ import annotations

import ctypes

import lightning_host as host
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_reference import make_case, recurrence, relative_rms

OUT_BOUND = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 1e-6}
STATE_BOUND = 2e-5

PLANS = {  # for 128-wide heads; segment_chunks is filled in
    "plain": lambda chunks: (0, 1, 1, chunks),
    "values": lambda chunks: (0, 2, 1, chunks),
    "segments": lambda chunks: (0, 1, 1, chunks) if chunks < 2 else (0, 1, -(-chunks // 2), 2),
    "both": lambda chunks: (0, 2, 1, chunks) if chunks < 2 else (0, 2, -(-chunks // -(-chunks // 2)), -(-chunks // 2)),
}


def plan_for(name: str, tokens: int) -> tuple[int, int, int, int]:
    return PLANS[name](-(-tokens // 64))


def check(case, plan4=None, dtype="bfloat16", **options):
    out, state = host.run(case, plan4, **options)
    want_out, want_state = recurrence(case)
    named = range(len(out)) if case.slots is None else map(int, case.slots)
    slots = [slot for slot in named if 0 <= slot < len(case.state)]
    assert relative_rms(out, want_out) <= OUT_BOUND[dtype]
    assert relative_rms(state[slots], want_state[slots]) <= STATE_BOUND
    before = case.state if options.get("in_place") else np.full_like(case.state, host.POISON)
    others = [slot for slot in range(len(case.state)) if slot not in slots]
    np.testing.assert_array_equal(state[others], before[others])
    return out, state


@pytest.mark.parametrize("layer", [0, 40, 78])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 500, 1000])
def test_prefill_at_the_sensitive_lengths(tokens, layer):
    rng = np.random.default_rng(tokens * 100 + layer)
    for name in PLANS if layer == 40 else ("plain", "segments"):
        check(make_case(rng, 1, tokens, 2, 128, layer=layer), plan_for(name, tokens))


@pytest.mark.parametrize("form", [(1, 1), (1, 2), (2, 2)])  # whole heads; value halves in a cluster; apart
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 500, 1000])
def test_sm90_prefill_at_the_sensitive_lengths(tokens, form):
    rng = np.random.default_rng(tokens)
    for layer in (0, 40, 78):
        check(make_case(rng, 1, tokens, 1, 128, layer=layer), (*form, 1, -(-tokens // 64)))


@pytest.mark.parametrize("plan4", [(1, 1, 1, 4), (1, 2, 1, 4), (1, 1, 2, 2), (1, 2, 4, 1)])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sm90_prefill_with_ragged_lengths_slots_and_both_decays(dtype, per_token, plan4):
    case = make_case(
        np.random.default_rng(18),
        5,
        200,
        1,
        128,
        dtype=dtype,
        per_token=per_token,
        scale=0.125,
        lengths=[200, 0, 1, 129, 64],
        slots=[4, 0, 6, 2, 5],
        pool=7,
    )
    check(case, plan4, dtype, in_place=per_token)


def test_sm90_every_schedule_gives_the_same_bits():
    """Copies and products as late as their waits allow, or at once; warps in several orders; nine chunks, so that rings turn over."""
    case = make_case(np.random.default_rng(19), 1, 570, 1, 128, per_token=True, lengths=[560])
    for plan4 in ((1, 1, 1, 9), (1, 2, 1, 9), (2, 2, 1, 9), (1, 1, 2, 5)):
        results = [host.run(case, plan4, schedule=schedule) for schedule in (0, 1, 2, 3, 5, 9)]
        for out, state in results[1:]:
            np.testing.assert_array_equal(out, results[0][0])
            np.testing.assert_array_equal(state, results[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 40, 78])
def test_prefill_of_4096_tokens(layer):
    case = make_case(np.random.default_rng(layer), 1, 4096, 1, 128, layer=layer)
    for plan4 in ((0, 1, 1, 64), (0, 1, 7, 10), (1, 1, 1, 64), (1, 2, 1, 64), (1, 1, 7, 10)):
        check(case, plan4)


def test_sm90_outputs_past_a_length_are_zeros_whatever_their_chunk_holds():
    case = make_case(np.random.default_rng(20), 1, 130, 1, 128, lengths=[70])
    case.v[0, 69] = np.inf
    for plan4 in ((1, 1, 1, 3), (1, 2, 1, 3), (1, 1, 3, 1)):
        out, _ = host.run(case, plan4)
        assert not np.isfinite(out[0, 69].astype(np.float32)).all()
        assert (out[0, 70:].astype(np.float32) == 0).all()


@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("per_token", [False, True])
def test_prefill_with_ragged_lengths_slots_scale_and_both_decays(per_token, name):
    rng = np.random.default_rng(7)
    case = make_case(
        rng,
        5,
        200,
        2,
        128,
        per_token=per_token,
        lengths=[200, 0, 1, 129, 64],
        slots=[4, 0, 6, 2, 5],
        pool=7,
        scale=0.125,
    )
    check(case, plan_for(name, 200))
    check(case, plan_for(name, 200), in_place=True)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prefill_of_narrow_heads(dtype, per_token):
    rng = np.random.default_rng(8)
    case = make_case(rng, 2, 150, 3, 64, dtype=dtype, per_token=per_token, lengths=[150, 70])
    check(case, (0, 1, 1, 3), dtype)
    check(case, (0, 1, 3, 1), dtype)


def test_prefill_in_half_precision():
    check(make_case(np.random.default_rng(9), 1, 130, 2, 128, dtype="float16"), (0, 1, 1, 3), "float16")


def test_prefill_without_a_state_starts_from_zero():
    case = make_case(np.random.default_rng(10), 1, 130, 1, 128)
    case.state[...] = 0
    for plan4 in ((0, 1, 1, 3), (0, 1, 3, 1)):
        check(case, plan4, zero_state=True)


def test_lengths_out_of_range_are_taken_into_it_and_unused_slots_left_alone():
    case = make_case(np.random.default_rng(11), 4, 70, 1, 64, slots=[1, -1, 5, 0], pool=3)
    case.lengths = np.array([1000, 70, 70, -3], np.int32)
    for plan4 in ((0, 1, 1, 2), (0, 1, 2, 1)):
        out, state = check(case, plan4)
        assert (out[1:].astype(np.float32) == 0).all()
        np.testing.assert_array_equal(state[0], case.state[0])  # length 0: carried over as it is


def test_every_schedule_gives_the_same_bits():
    """A missing barrier or a copy used before it is waited for would show as a difference (shared memory starts as NaN)."""
    case = make_case(np.random.default_rng(12), 1, 260, 1, 128, per_token=True, lengths=[250])
    for plan4 in ((0, 1, 1, 5), (0, 2, 1, 5), (0, 1, 3, 2)):
        results = [host.run(case, plan4, schedule=schedule) for schedule in range(8)]
        for out, state in results[1:]:
            np.testing.assert_array_equal(out, results[0][0])
            np.testing.assert_array_equal(state, results[0][1])


def test_continuing_equals_one_run_and_single_steps():
    rng = np.random.default_rng(13)
    case = make_case(rng, 1, 140, 2, 128, layer=40)
    whole_out, whole_state = check(case)

    def piece(begin, end, state):
        part = make_case(rng, 1, end - begin, 2, 128, layer=40)
        part.q, part.k, part.v = (np.ascontiguousarray(x[:, begin:end]) for x in (case.q, case.k, case.v))
        part.state = state
        return part

    first_out, first_state = host.run(piece(0, 101, case.state))
    second_out, second_state = host.run(piece(101, 140, first_state))
    assert relative_rms(np.concatenate([first_out, second_out], 1), whole_out) <= OUT_BOUND["bfloat16"]
    assert relative_rms(second_state, whole_state) <= STATE_BOUND

    state, outs = case.state, []
    for t in range(140):
        out, state = host.run(piece(t, t + 1, state), decode_splits=4)
        outs.append(out)
    assert relative_rms(np.concatenate(outs, 1), whole_out) <= OUT_BOUND["bfloat16"]
    assert relative_rms(state, whole_state) <= STATE_BOUND


def test_strong_and_absent_decay():
    """A log-decay of -inf forgets everything, 0 keeps everything, and nothing in between overflows."""
    case = make_case(np.random.default_rng(14), 1, 200, 1, 64, per_token=True)
    case.log_decay[...] = 0.0
    check(case)
    case.log_decay[0, ::50] = -200.0
    case.log_decay[0, 130] = -np.inf
    check(case)
    steep = make_case(np.random.default_rng(15), 1, 200, 1, 64)
    steep.slopes[...] = 80.0
    check(steep)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode(head_dim, splits, dtype):
    rng = np.random.default_rng(16)
    bounds = {"bfloat16": 2e-3, "float16": 3e-4, "float32": 1e-6}  # one rounding of the output
    for per_token in (False, True):
        case = make_case(rng, 3, 1, 2, head_dim, dtype=dtype, per_token=per_token, slots=[3, 0, 2], pool=5, scale=0.5)
        for in_place in (False, True):
            out, _ = check(case, decode_splits=splits, in_place=in_place, dtype=dtype)
            assert relative_rms(out, recurrence(case)[0]) <= bounds[dtype]
    case = make_case(rng, 4, 1, 2, head_dim, dtype=dtype, lengths=[1, 0, 1, 0], slots=[3, 0, 9, 1], pool=4)
    for in_place in (False, True):
        check(case, decode_splits=splits, in_place=in_place, dtype=dtype)
    case.state[...] = 0
    check(case, decode_splits=splits, zero_state=True, dtype=dtype)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_tokens_carry_the_states_over(head_dim, decode):
    case = make_case(np.random.default_rng(17), 2, 0, 2, head_dim, slots=[2, 0], pool=3)
    for zero_state in (False, True):
        _, state = host.run(case, decode_splits=int(decode), zero_state=zero_state)
        for slot in (0, 2):
            np.testing.assert_array_equal(state[slot], 0 if zero_state else case.state[slot])
        assert (state[1] == np.float32(host.POISON)).all()
    _, state = host.run(case, decode_splits=int(decode), in_place=True)
    np.testing.assert_array_equal(state, case.state)


def test_no_sequences_are_nothing_to_do():
    params = host.LightningParams(batch=0, tokens=5, heads=8, head_dim=128, dtype=2, scale=1.0)
    assert host.library().host_prefill(ctypes.byref(params), (ctypes.c_int * 4)(0, 1, 1, 1), 0) == host.OK


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_and_any_plan(data):
    head_dim = data.draw(st.sampled_from([64, 128]))
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    tokens = data.draw(st.integers(1, 330))
    lengths = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    seed = data.draw(st.integers(0, 2**16))
    case = make_case(
        np.random.default_rng(seed),
        batch,
        tokens,
        heads,
        head_dim,
        per_token=data.draw(st.booleans()),
        layer=data.draw(st.sampled_from([0, 40, 78])),
        lengths=lengths,
    )
    chunks = -(-tokens // 64)
    segment_chunks = data.draw(st.integers(1, chunks))
    splits = data.draw(st.sampled_from([1, 2])) if head_dim == 128 else 1
    check(
        case,
        (0, splits, -(-chunks // segment_chunks), segment_chunks),
        schedule=data.draw(st.integers(0, 5)),
        in_place=data.draw(st.booleans()),
    )
