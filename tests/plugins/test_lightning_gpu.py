"""The lightning attention kernels on a GPU, through the C interface, against fp64.

Bounds (fixed before any run): bf16 output 4e-3 relative RMS (three roundings of 1.7e-3 make 2.3e-3), state 2e-4.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from lightning_gpu import device_plan, make_inputs, params_of, reference, relative_rms, run  # noqa: E402

from plugins.errors import KernelError  # noqa: E402
from plugins.library import LightningPlan  # noqa: E402

pytestmark = pytest.mark.gpu

OUT_BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
STATE_BOUND = 2e-4
KERNELS = ["portable", "sm90", "sm90-apart"]  # LightningPlan.kernel 0, 1, 2


@pytest.fixture(autouse=True, scope="module")
def _device(kernel_library):
    kernel_library.check_device()


def plan_of(kernel: str, mode: str, tokens: int) -> LightningPlan:
    """A plan of that kernel with that split, or a skip."""
    if kernel != "portable" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm_90a kernel needs compute capability 9.0")
    if kernel == "sm90-apart" and "values" not in mode:
        pytest.skip("differs from sm90 in value halves only")
    chunks = -(-tokens // 64)
    plan = LightningPlan(
        kernel=KERNELS.index(kernel), value_splits=2 if "values" in mode else 1, segments=1, segment_chunks=chunks
    )
    if "segments" in mode:
        plan.segment_chunks = max(1, -(-chunks // 5))
        plan.segments = -(-chunks // plan.segment_chunks)
    return plan


def check(library, inputs, plan=None, **options):
    out, state = run(library, inputs, plan, **options)
    want_out, want_state = reference(inputs)
    slots = list(range(len(out))) if inputs.slots is None else inputs.slots.tolist()
    slots = [slot for slot in slots if 0 <= slot < len(state)]
    others = [slot for slot in range(len(state)) if slot not in slots]
    assert relative_rms(out, want_out) <= OUT_BOUND[out.dtype]
    assert relative_rms(state[slots], want_state[slots]) <= STATE_BOUND
    untouched = inputs.state if options.get("in_place") else torch.full_like(inputs.state, float("nan"))
    assert torch.equal(state[others].view(torch.int32), untouched[others].view(torch.int32))
    return out, state


def test_the_oracle_is_the_token_by_token_recurrence():
    inputs = make_inputs(2, 150, 3, per_token=True, lengths=[150, 70])
    for chunked, single in zip(reference(inputs), reference(inputs, chunk=1), strict=True):
        assert relative_rms(chunked, single) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["plain", "values", "segments", "values+segments"])
@pytest.mark.parametrize("layer", [0, 40, 78])
def test_prefill_lengths(kernel_library, kernel, mode, layer):
    for tokens in (1, 63, 64, 65, 127, 500, 1000, 4096):
        inputs = make_inputs(2, tokens, 8, layer=layer, seed=tokens)
        check(kernel_library, inputs, plan_of(kernel, mode, tokens))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("tokens", [8192, 131072])
def test_prefill_long(kernel_library, kernel, tokens):
    for mode in ("plain", "segments"):
        check(kernel_library, make_inputs(1, tokens, 4, layer=78), plan_of(kernel, mode, tokens))


def test_prefill_as_planned(kernel_library):
    for batch, tokens, heads in ((1, 8192, 64), (1, 8192, 8), (4, 1000, 64)):
        check(kernel_library, make_inputs(batch, tokens, heads))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["plain", "values", "segments"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefill_ragged_slots_and_decays(kernel_library, dtype, per_token, mode, kernel):
    inputs = make_inputs(
        6,
        400,
        8,
        dtype=dtype,
        per_token=per_token,
        lengths=[400, 0, 1, 129, 64, 399],
        slots=[4, 0, 6, 2, 5, 9],
        pool=9,
        scale=0.1,
    )
    inputs.lengths[5] = 400
    for in_place in (False, True):
        out, _ = run(kernel_library, inputs, plan_of(kernel, mode, 400), in_place=in_place)
        assert (out[5] == 0).all(), "slot 9 of 9 marks an unused row"
        check(kernel_library, inputs, plan_of(kernel, mode, 400), in_place=in_place)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
def test_prefill_narrow_heads(kernel_library, per_token, dtype):
    inputs = make_inputs(3, 300, 5, 64, dtype=dtype, per_token=per_token, lengths=[300, 65, 2])
    for mode in ("plain", "segments"):
        check(kernel_library, inputs, plan_of("portable", mode, 300))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_decode(kernel_library, batch, dtype, head_dim):
    slots = [(7 * b + 3) % (batch + 5) for b in range(batch)] if (batch + 5) % 7 else list(range(batch))
    for per_token in (False, True):
        for in_place in (False, True):
            inputs = make_inputs(batch, 1, 64, head_dim, dtype=dtype, per_token=per_token, slots=slots, pool=batch + 5)
            check(kernel_library, inputs, decode=True, in_place=in_place)
    check(kernel_library, make_inputs(4, 1, 8, head_dim, dtype=dtype, lengths=[1, 0, 0, 1]), decode=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_continuing_equals_one_run_and_single_steps(kernel_library, kernel):
    inputs = make_inputs(2, 300, 8)
    whole_out, whole_state = run(kernel_library, inputs, plan_of(kernel, "plain", 300))

    def piece(begin, end, state):
        part = make_inputs(2, end - begin, 8)
        part.q, part.k, part.v = (x[:, begin:end].contiguous() for x in (inputs.q, inputs.k, inputs.v))
        part.state = state
        return part

    first, state = run(kernel_library, piece(0, 177, inputs.state), plan_of(kernel, "plain", 177))
    second, state = run(kernel_library, piece(177, 300, state), plan_of(kernel, "plain", 123))
    assert relative_rms(torch.cat([first, second], 1), whole_out) <= 4e-3
    assert relative_rms(state, whole_state) <= STATE_BOUND
    state, outs = inputs.state, []
    for t in range(300):
        out, state = run(kernel_library, piece(t, t + 1, state), decode=True)
        outs.append(out)
    assert relative_rms(torch.cat(outs, 1), whole_out) <= 4e-3
    assert relative_rms(state, whole_state) <= STATE_BOUND


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["plain", "values", "segments"])
def test_prefill_is_bit_equal_over_repeats(kernel_library, mode, kernel):
    inputs = make_inputs(2, 1000, 32, per_token=True, lengths=[1000, 777])
    plan = plan_of(kernel, mode, 1000)
    out, state = run(kernel_library, inputs, plan)
    for _ in range(300):
        again_out, again_state = run(kernel_library, inputs, plan)
        assert torch.equal(out.view(torch.int16), again_out.view(torch.int16))
        assert torch.equal(state.view(torch.int32), again_state.view(torch.int32))


def test_decode_is_bit_equal_over_repeats(kernel_library):
    inputs = make_inputs(16, 1, 64)
    out, state = run(kernel_library, inputs, decode=True)
    for _ in range(300):
        again_out, again_state = run(kernel_library, inputs, decode=True)
        assert torch.equal(out.view(torch.int16), again_out.view(torch.int16))
        assert torch.equal(state.view(torch.int32), again_state.view(torch.int32))


def test_no_tokens_carry_the_states_over(kernel_library):
    inputs = make_inputs(2, 0, 8, slots=[2, 0], pool=3)
    for decode in (False, True):
        _, state = run(kernel_library, inputs, LightningPlan(segments=1, value_splits=1), decode=decode)
        assert torch.equal(state[[0, 2]], inputs.state[[0, 2]])
        assert state[1].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", ["plain", "values", "segments"])
def test_prefill_memory_clean(kernel_library, mode, kernel):
    """Small enough for compute-sanitizer; full chunks, a cut one and an empty row."""
    inputs = make_inputs(3, 200, 2, lengths=[200, 0, 130])
    check(kernel_library, inputs, plan_of(kernel, mode, 200))


def test_decode_memory_clean(kernel_library):
    check(kernel_library, make_inputs(3, 1, 2), decode=True)


def test_launches_can_be_captured_in_a_graph(kernel_library):
    inputs = make_inputs(1, 1000, 8)
    want, _ = run(kernel_library, inputs)  # also loads the kernels, which a capture may not
    out, state = torch.zeros_like(inputs.q), torch.zeros_like(inputs.state)
    plan = device_plan(kernel_library, inputs)
    needed = kernel_library.lightning_workspace_bytes(plan, 1, 8, 128)
    workspace = torch.zeros(needed, dtype=torch.uint8, device="cuda")
    params = params_of(inputs, out, inputs.state, state)
    params.workspace, params.workspace_bytes = workspace.data_ptr(), needed
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel_library.lightning_prefill(params, plan, torch.cuda.current_stream().cuda_stream)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.view(torch.int16), want.view(torch.int16))


def test_refusals_leave_the_device_usable(kernel_library):
    inputs = make_inputs(1, 200, 8)
    out = torch.full_like(inputs.q, float("nan"))
    params = params_of(inputs, out, inputs.state, torch.empty_like(inputs.state))
    for field, value in (("head_dim", 96), ("tokens", -1), ("q", params.q + 2), ("scale", float("nan"))):
        good = getattr(params, field)
        setattr(params, field, value)
        with pytest.raises(KernelError, match="lightning prefill"):
            kernel_library.lightning_prefill(params)
        setattr(params, field, good)
    with pytest.raises(KernelError, match="workspace"):
        kernel_library.lightning_prefill(params, LightningPlan(value_splits=1, segments=2, segment_chunks=2))
    torch.cuda.synchronize()
    assert out.isnan().all(), "a refused launch writes nothing"
    check(kernel_library, inputs)
