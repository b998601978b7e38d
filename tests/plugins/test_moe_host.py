"""Planner, workspace and refusals of the mixture-of-experts launcher, without a GPU."""

from __future__ import annotations

import ctypes

import pytest
from moe_host import (
    ARCHITECTURE,
    INVALID,
    OK,
    POINTERS,
    UNSUPPORTED,
    WORKSPACE,
    MoeParams,
    environment,
    last_error,
    library,
    plan,
    prepare,
)
from moe_reference import make_case

TOKENS = sorted({0, 1, 2, 3, 7, 8, 9, 16, 31, 32, 33, 48, 64, 127, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025, 1536, 1537}
                | {2048, 4096, 16383, 16384, 16385, 32768, 32769, 49153, 100_000, 1 << 20, (1 << 31) - 1})  # fmt: skip


@pytest.mark.parametrize("experts", [1, 2, 8, 32, 64, 256])
def test_plans_cover_every_token_once(experts: int) -> None:
    for tokens in TOKENS:
        for top_k in range(1, min(8, experts) + 1):
            made = plan(tokens, experts, top_k)
            if tokens == 0:
                assert made.piece_tokens == 0
                continue
            assert 1 <= made.piece_tokens <= 16384
            assert (made.pieces - 1) * made.piece_tokens < tokens <= made.pieces * made.piece_tokens
            assert made.small_route == (made.piece_tokens <= 32)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("experts", [8, 32, 256])
@pytest.mark.parametrize("sm90", [False, True])
def test_more_tokens_never_go_back_to_a_path_for_fewer(experts: int, top_k: int, sm90: bool) -> None:
    rank = {"stream": 0, "grouped64": 1, "grouped128": 2, "sm90": 3}
    ranks = [rank[plan(tokens, experts, top_k, sm90=sm90).path] for tokens in TOKENS if 0 < tokens <= 16384]
    assert ranks == sorted(ranks)
    assert ranks[0] == 0
    assert ranks[-1] == (3 if sm90 else (2 if 16384 * top_k > 96 * experts else 1))


def test_the_model_this_is_tuned_for() -> None:
    """32 experts, 2 per token."""
    expected = {
        1: "stream",
        64: "stream",
        128: "stream",
        129: "grouped64",
        1024: "grouped64",
        1536: "grouped64",
        1537: "grouped128",
    }
    assert {tokens: plan(tokens, 32, 2).path for tokens in expected} == expected
    assert plan(1024, 32, 2, sm90=True).path == "sm90"
    assert plan(1023, 32, 2, sm90=True).path == "grouped64"


def test_sm90_only_where_it_runs() -> None:
    for capability in (80, 86, 89, 90, 100, 120):
        for int8 in (False, True):
            for bfloat16 in (False, True):
                made = plan(4096, 32, 2, int8=int8, bfloat16=bfloat16, capability=capability, sm90=True)
                assert (made.path == "sm90") == (capability == 90 and bfloat16 and not int8)
                assert plan(4096, 32, 2, int8=int8, bfloat16=bfloat16, capability=capability).path == "grouped128"


def shape(tokens: int, **changes: int) -> MoeParams:
    fields = {"hidden": 6144, "inner": 9216, "experts": 32, "top_k": 2, "normalize": 1, "dtype": 2, "weight_dtype": 2}
    return MoeParams(tokens=tokens, **{**fields, **changes})


def workspace(params: MoeParams) -> int:
    return int(library().host_workspace(ctypes.byref(params)))


@pytest.mark.parametrize("weight_dtype", [2, 3])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_workspace_is_monotone_and_bounded(top_k: int, weight_dtype: int) -> None:
    sizes = [workspace(shape(tokens, top_k=top_k, weight_dtype=weight_dtype)) for tokens in TOKENS]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0
    assert sizes[-1] == sizes[TOKENS.index(16384)]


def test_workspace_of_refused_shapes_is_zero() -> None:
    assert workspace(shape(16, hidden=100)) == 0
    assert workspace(shape(16, top_k=33)) == 0


@pytest.mark.parametrize("tokens", [1, 33, 1024, 16384, 16385, 40_000])
@pytest.mark.parametrize("sm90", [None, "1"])
def test_workspace_is_enough_for_every_plan(tokens: int, sm90: str | None) -> None:
    case = make_case(0, 1, 16, 16, 4, 2)
    with environment(MXC_MOE_SM90=sm90, MXC_MOE_PATH=None):
        call = prepare(case)
        call.params.tokens = tokens
        call.params.workspace_bytes = workspace(call.params)
        # Far apart, so that nothing overlaps: these pointers are never followed.
        for i, name in enumerate((*POINTERS, "workspace")):
            setattr(call.params, name, (i + 1) << 40)
        assert library().host_check(ctypes.byref(call.params), 90) == OK, last_error()


def test_workspace_depends_on_shapes_alone() -> None:
    """Whoever reserves the memory (an engine's builder) need not know the environment of the launch."""
    sizes = set()
    for sm90 in (None, "1"):
        for path in (None, "stream", "sm90"):
            with environment(MXC_MOE_SM90=sm90, MXC_MOE_PATH=path):
                sizes.add(workspace(shape(4096)))
    assert len(sizes) == 1


REFUSED = [
    ({"tokens": -1}, INVALID, "tokens -1 is negative"),
    ({"experts": 0}, INVALID, "0 experts"),
    ({"experts": 257}, INVALID, "257 experts"),
    ({"top_k": 0}, INVALID, "top_k 0"),
    ({"top_k": 9}, INVALID, "top_k 9"),
    ({"top_k": 5}, INVALID, "top_k 5 is larger than the number of experts 4"),
    ({"first_local": -1}, INVALID, "out of range"),
    ({"local_experts": -1}, INVALID, "out of range"),
    ({"first_local": 3, "local_experts": 2}, INVALID, "local experts 3 to 4 are out of range; there are 4"),
    ({"first_local": 1, "local_experts": 0}, INVALID, "out of range"),
    ({"first_local": 2**31 - 1, "local_experts": 2**31 - 1}, INVALID, "out of range"),
    ({"hidden": 12}, INVALID, "hidden 12 is not supported; use a multiple of 8"),
    ({"hidden": 0}, INVALID, "hidden 0"),
    ({"inner": -8}, INVALID, "inner -8"),
    ({"inner": 4}, INVALID, "inner 4 is not supported"),
    ({"hidden": 2**21}, INVALID, "up to 1048576"),
    ({"dtype": 0}, UNSUPPORTED, "dtype 0 is not supported; use fp16 or bf16"),
    ({"dtype": 3}, UNSUPPORTED, "dtype 3"),
    ({"dtype": 1}, UNSUPPORTED, "weights of dtype 2 with dtype 1"),
    ({"weight_dtype": 0}, UNSUPPORTED, "weights of dtype 0"),
    ({"weight_dtype": 3, "hidden": 24}, INVALID, "use a multiple of 16"),
    ({"weight_dtype": 3, "scale_dtype": 1}, UNSUPPORTED, "scales of dtype 1"),
    ({"weight_dtype": 3, "scale_dtype": 3}, UNSUPPORTED, "scales of dtype 3"),
    ({"weight_dtype": 3}, INVALID, "fc1_scale is null"),
    ({"router_dtype": 3}, UNSUPPORTED, "router logits of dtype 3"),
    ({"router_dtype": -1}, UNSUPPORTED, "router logits of dtype -1"),
    *(({name: None}, INVALID, f"{name} is null") for name in ("x", "router_logits", "fc1", "fc2", "out")),
    ({"workspace": None}, WORKSPACE, "the workspace has 0 bytes"),
    ({"workspace_bytes": 100}, WORKSPACE, "the workspace has 100 bytes"),
]


@pytest.mark.parametrize(("changes", "status", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(changes: dict[str, int | None], status: int, message: str) -> None:
    with environment(MXC_MOE_PATH=None, MXC_MOE_SM90=None):
        call = prepare(make_case(0, 5, 16, 16, 4, 2))
        assert library().host_check(ctypes.byref(call.params), 90) == OK, last_error()
        for name, value in changes.items():
            setattr(call.params, name, value)
        assert library().host_check(ctypes.byref(call.params), 90) == status
        assert message in last_error()
        assert last_error().startswith("moe: ")


@pytest.mark.parametrize(
    ("name", "by"), [("x", 8), ("fc1", 2), ("fc2", 8), ("out", 2), ("workspace", 16), ("router_logits", 2)]
)
def test_misaligned_pointers_are_refused(name: str, by: int) -> None:
    call = prepare(make_case(0, 5, 16, 16, 4, 2))
    setattr(call.params, name, getattr(call.params, name) + by)
    assert library().host_check(ctypes.byref(call.params), 90) == INVALID
    assert "is not aligned" in last_error()


def test_overlap_is_refused() -> None:
    call = prepare(make_case(0, 5, 16, 16, 4, 2))
    out = call.params.out
    for name in ("x", "fc1", "fc2", "router_logits"):
        call.params.out = getattr(call.params, name) + 16
        assert library().host_check(ctypes.byref(call.params), 90) == INVALID
        assert "out overlaps" in last_error()
    call.params.out = call.params.workspace
    assert library().host_check(ctypes.byref(call.params), 90) == INVALID
    assert "the workspace overlaps out" in last_error()
    call.params.out = out
    assert library().host_check(ctypes.byref(call.params), 90) == OK


def test_old_gpus_are_refused() -> None:
    call = prepare(make_case(0, 5, 16, 16, 4, 2))
    assert library().host_check(ctypes.byref(call.params), 75) == ARCHITECTURE
    assert "compute capability 7.5 is too old" in last_error()


def test_path_by_name() -> None:
    call = prepare(make_case(0, 5, 16, 16, 4, 2))
    with environment(MXC_MOE_PATH="fast"):
        assert library().host_check(ctypes.byref(call.params), 90) == INVALID
        assert "MXC_MOE_PATH names no path" in last_error()
    with environment(MXC_MOE_PATH="sm90"):
        assert library().host_check(ctypes.byref(call.params), 80) == ARCHITECTURE
        assert "sm_90a" in last_error()
        assert library().host_check(ctypes.byref(call.params), 90) == OK


def test_no_tokens_needs_no_pointers() -> None:
    params = shape(0)
    assert library().host_check(ctypes.byref(params), 90) == OK
