"""The mixture-of-experts kernels on a GPU, through the C interface, against fp64.

Bounds (fixed before any run): bf16 4e-3 relative RMS (the result and silu(gate) * up are rounded once each, 2.4e-3), fp16 an eighth
of that, 5e-4. int8 against the dequantised weights.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moe_gpu import PATHS, Inputs, make_inputs, params_of, reference, relative_rms, run  # noqa: E402

from plugins.errors import KernelError  # noqa: E402

pytestmark = pytest.mark.gpu

BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(autouse=True, scope="module")
def _device(kernel_library):
    kernel_library.check_device()


def skip_unless_fits(path: str | None, inputs: Inputs) -> None:
    if path != "sm90":
        return
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the sm_90a kernels need compute capability 9.0")
    if inputs.x.dtype != torch.bfloat16 or inputs.fc1.dtype != torch.bfloat16:
        pytest.skip("the sm_90a kernels take bf16 alone")


def run_or_skip(library, inputs, path=None, **options):
    skip_unless_fits(path, inputs)
    try:
        return run(library, inputs, path, **options)
    except KernelError as error:
        if "without CUTLASS" in str(error):
            pytest.skip(str(error))
        raise


def check(library, inputs, path=None, first=0):
    out = run_or_skip(library, inputs, path, first=first)
    assert relative_rms(out, reference(inputs, first)) <= BOUND[out.dtype]
    return out


@pytest.mark.parametrize("path", [None, *PATHS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("int8", [False, True])
def test_any_number_of_tokens(kernel_library, path, dtype, int8):
    for tokens in (0, 1, 2, 7, 16, 64, 200, 1024):
        check(kernel_library, make_inputs(tokens, dtype=dtype, int8=int8, seed=tokens), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("hidden", "inner"), [(8, 8), (72, 200), (1000, 136), (6144, 88), (120, 9216)])
def test_odd_widths(kernel_library, path, hidden, inner):
    for tokens in (3, 130):
        check(kernel_library, make_inputs(tokens, hidden, inner, experts=5), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("int8", [False, True])
def test_skewed_routing_and_empty_experts(kernel_library, path, int8):
    for skew in (1.0, 4.0, 50.0):  # 50: all tokens on the first two experts
        for tokens in (40, 700):
            check(kernel_library, make_inputs(tokens, skew=skew, int8=int8), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (64, 8), (256, 8)])
def test_experts_and_choices(kernel_library, path, experts, top_k):
    for normalize in (False, True):
        check(kernel_library, make_inputs(90, 64, 48, experts, top_k, normalize=normalize), path)


@pytest.mark.parametrize("path", PATHS)
def test_ranks_add_up(kernel_library, path):
    inputs = make_inputs(150)
    total = torch.zeros(inputs.x.shape, dtype=torch.float64, device="cuda")
    for first, count in ((0, 8), (8, 1), (9, 23)):
        total += check(kernel_library, inputs.local(first, count), path, first).double()
    assert relative_rms(total, reference(inputs)) <= BOUND[torch.bfloat16]


@pytest.mark.parametrize("path", PATHS)
def test_the_width_of_the_model(kernel_library, path):
    for tokens in (1, 40, 300):
        check(kernel_library, make_inputs(tokens, 6144, 9216, experts=6), path)


@pytest.mark.parametrize("path", [None, *PATHS])
def test_repeats_are_bit_equal(kernel_library, path):
    inputs = make_inputs(333, skew=1.0)
    first = run_or_skip(kernel_library, inputs, path)
    for _ in range(30):
        assert torch.equal(run(kernel_library, inputs, path).view(torch.int16), first.view(torch.int16))


def test_more_tokens_than_one_piece(kernel_library):
    check(kernel_library, make_inputs(16384 * 2 + 77, 128, 64))


@pytest.mark.parametrize("router_dtype", [torch.float16, torch.bfloat16])
def test_router_types(kernel_library, router_dtype):
    for tokens in (5, 500):
        check(kernel_library, make_inputs(tokens, router_dtype=router_dtype))


def test_scales_in_the_tokens_type(kernel_library):
    for dtype in (torch.bfloat16, torch.float16):
        for path in ("stream", "grouped64"):
            check(kernel_library, make_inputs(30, dtype=dtype, int8=True, scale_dtype=dtype), path)


@pytest.mark.parametrize("path", PATHS)
def test_bad_tokens_touch_no_other(kernel_library, path):
    inputs = make_inputs(60)
    good = run_or_skip(kernel_library, inputs, path)
    inputs.x[3] = float("nan")
    inputs.logits[7, 5] = float("nan")
    inputs.logits[9] = float("inf")
    found = run(kernel_library, inputs, path)
    bad = [3, 7, 9]
    assert torch.isnan(found[bad]).all()
    rest = [token for token in range(60) if token not in bad]
    assert torch.equal(found[rest].view(torch.int16), good[rest].view(torch.int16))


@pytest.mark.parametrize("tokens", [1, 24, 400, 2500])
def test_graph_replays(kernel_library, tokens):
    """Captured once, replayed on other tokens and routings at the same addresses."""
    inputs = make_inputs(tokens)
    out = torch.full_like(inputs.x, float("nan"))
    params = params_of(inputs, out)
    needed = kernel_library.moe_workspace_bytes(params)
    workspace = torch.full((needed,), 255, dtype=torch.uint8, device="cuda")
    params.workspace, params.workspace_bytes = workspace.data_ptr(), needed
    kernel_library.moe(params, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel_library.moe(params, torch.cuda.current_stream().cuda_stream)
    for seed in range(1, 4):
        other = make_inputs(tokens, seed=seed, skew=seed - 1.0)
        inputs.x.copy_(other.x)
        inputs.logits.copy_(other.logits)
        graph.replay()
        torch.cuda.synchronize()
        assert relative_rms(out, reference(inputs)) <= BOUND[torch.bfloat16]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("int8", [False, True])
def test_memory_clean(kernel_library, path, int8):
    """Small enough for compute-sanitizer: every kernel, sizes that are no multiple of a tile."""
    for tokens in (5, 70):
        check(kernel_library, make_inputs(tokens, 144, 80, experts=5, int8=int8), path)


def test_refusals_reach_python(kernel_library):
    inputs = make_inputs(4)
    out = torch.empty_like(inputs.x)
    params = params_of(inputs, out)
    with pytest.raises(KernelError, match="the workspace has 0 bytes"):
        kernel_library.moe(params)
    params.top_k = 9
    with pytest.raises(KernelError, match="top_k 9"):
        kernel_library.moe(params)
