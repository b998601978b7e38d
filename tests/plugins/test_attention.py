"""Softmax attention with lengths: its kernels run on the CPU emulator against fp64; refusals; splits.

Bound (fixed before any run): the weights are rounded to the element type before they meet the values and the result once
more, so 2^-8 of the largest value for bf16 and 2^-11 for fp16, with a factor of 2 for both together.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DTYPES = {"float16": (1, np.dtype(np.float16), 2**-10), "bfloat16": (2, np.dtype(ml_dtypes.bfloat16), 2**-7)}
OK, INVALID, UNSUPPORTED, WORKSPACE = 0, 1, 2, 4
Array = npt.NDArray[np.float64]


class Params(ctypes.Structure):
    """mxc::SoftmaxAttentionParams."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "past_lengths", "new_lengths")),
        ("wide_lengths", ctypes.c_bool),
        *((name, ctypes.c_int32) for name in ("batch", "tokens", "heads", "kv_heads", "capacity", "head_dim")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("attention") / "attention.so"
    sources = [HERE / "attention_harness.cpp", ROOT / "plugins" / "attention" / "plan.cpp"]
    includes = [f"-I{path}" for path in (ROOT / "plugins", ROOT / "plugins" / "include", HERE / "emulator")]
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    compiler = shutil.which("c++") or "c++"
    subprocess.run([compiler, *options, *includes, *map(str, sources), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.host_last_error.restype = ctypes.c_char_p
    for name in ("host_size", "host_workspace", "host_max_workspace"):
        getattr(library, name).restype = ctypes.c_size_t
    assert library.host_size() == ctypes.sizeof(Params)
    return library


@dataclass
class Case:
    """One call: arrays of the element type, garbage (NaN) behind the valid part of the cache."""

    q_BHTK: npt.NDArray[np.generic]
    k_BGSK: npt.NDArray[np.generic]
    v_BGSK: npt.NDArray[np.generic]
    past: list[int]
    new: list[int]
    scale: float

    def expected(self) -> Array:
        """fp64, one query at a time; zeros for tokens past the new length."""
        q, k, v = (x.astype(np.float64) for x in (self.q_BHTK, self.k_BGSK, self.v_BGSK))
        batch, heads, tokens, _ = q.shape
        out = np.zeros_like(q)
        capacity = k.shape[2]
        for b in range(batch):
            past = min(max(self.past[b], 0), capacity)
            for t in range(min(max(self.new[b], 0), tokens, capacity - past)):
                for h in range(heads):
                    g = h // (heads // k.shape[1])
                    scores = self.scale * k[b, g, : past + t + 1] @ q[b, h, t]
                    weights = np.exp(scores - scores.max())
                    out[b, h, t] = weights / weights.sum() @ v[b, g, : past + t + 1]
        return out


def make_case(
    dtype: str,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    past: list[int],
    new: list[int],
) -> Case:
    random = np.random.default_rng(batch * 1000 + tokens * 100 + capacity)
    element = DTYPES[dtype][1]
    q = random.standard_normal((batch, heads, tokens, head_dim)).astype(element)
    k, v = (random.standard_normal((batch, kv_heads, capacity, head_dim)).astype(element) for _ in range(2))
    for b in range(batch):
        last = min(max(past[b], 0) + min(max(new[b], 0), tokens), capacity)
        k[b, :, last:] = np.nan
        v[b, :, last:] = np.nan
        q[b, :, max(new[b], 0) :] = np.nan
    return Case(q, k, v, past, new, head_dim**-0.5)


def run(
    host: ctypes.CDLL,
    case: Case,
    element_type: str,
    splits: int,
    schedule: int = 0,
    wide: bool = False,
    **changes: object,
) -> npt.NDArray[np.generic]:
    code, element, _ = DTYPES[element_type]
    batch, heads, tokens, head_dim = case.q_BHTK.shape
    out = np.full(case.q_BHTK.shape, np.nan, element)
    lengths = [np.array(x, np.int64 if wide else np.int32) for x in (case.past, case.new)]
    params = Params(
        *(x.ctypes.data for x in (case.q_BHTK, case.k_BGSK, case.v_BGSK, out, *lengths)),
        wide, batch, tokens, heads, case.k_BGSK.shape[1], case.k_BGSK.shape[2], head_dim, case.scale, code,
    )  # fmt: skip
    needed = host.host_workspace(ctypes.byref(params), splits)
    memory = np.full(needed + 256, 0xFF, np.uint8)
    params.workspace = (memory.ctypes.data + 255) // 256 * 256
    params.workspace_bytes = needed
    for name, value in changes.items():
        setattr(params, name, value)
    status = host.host_run(ctypes.byref(params), splits, schedule)
    if status != OK:
        raise ValueError(f"{status}: {host.host_last_error().decode()}")
    return out


def check(out: npt.NDArray[np.generic], case: Case, dtype: str) -> None:
    expected = case.expected()
    largest = max(np.abs(expected).max(), 1e-3)
    assert np.abs(out.astype(np.float64) - expected).max() <= DTYPES[dtype][2] * largest


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim"), [(1, 8, 1, 128), (1, 2, 2, 64), (5, 6, 2, 128), (40, 2, 1, 64)]
)
def test_against_fp64(
    host: ctypes.CDLL, dtype: str, splits: int, tokens: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    case = make_case(dtype, 2, tokens, heads, kv_heads, 200, head_dim, past=[137, 0], new=[tokens, max(1, tokens - 3)])
    check(run(host, case, dtype, splits), case, dtype)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_lengths(host: ctypes.CDLL, data: st.DataObject) -> None:
    """Also negative and too long ones, which count as none and as what still fits."""
    tokens = data.draw(st.integers(1, 20))
    capacity = data.draw(st.integers(tokens, 150))
    past = data.draw(st.lists(st.integers(-3, capacity + 3), min_size=2, max_size=2))
    new = data.draw(st.lists(st.integers(-2, tokens + 2), min_size=2, max_size=2))
    splits, schedule = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 5))
    case = make_case("bfloat16", 2, tokens, 4, 2, capacity, 64, past, new)
    out = run(host, case, "bfloat16", splits, schedule, wide=data.draw(st.booleans()))
    check(out, case, "bfloat16")
    for b in range(2):
        assert not out[b, :, max(0, min(new[b], capacity - min(max(past[b], 0), capacity))) :].astype(np.float64).any()


def test_result_does_not_depend_on_thread_order(host: ctypes.CDLL) -> None:
    case = make_case("bfloat16", 1, 3, 8, 2, 300, 128, past=[280], new=[3])
    outs = [run(host, case, "bfloat16", 2, schedule).view(np.uint16) for schedule in range(6)]
    assert all(np.array_equal(outs[0], out) for out in outs)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (dict(head_dim=96), "head_dim 96 is not supported; use 64 or 128"),
        (dict(dtype=0), "dtype 0 is not supported"),
        (dict(batch=-1), "batch -1"),
        (dict(tokens=-1), "tokens -1"),
        (dict(tokens=101), "101 new tokens do not fit a capacity of 100"),
        (dict(kv_heads=3), "must be a multiple of kv_heads 3"),
        (dict(kv_heads=0), "must be a multiple of kv_heads 0"),
        (dict(scale=float("nan")), "scale is not finite"),
        (dict(q=0), "q is null"),
        (dict(v=8), "v is not aligned to 16 bytes"),
        (dict(past_lengths=2), "past_lengths is not aligned"),
        (dict(workspace_bytes=16), "the workspace has 16 bytes"),
        (dict(workspace=0), "the workspace has 0 bytes"),
        (dict(workspace=32), "not aligned to 256 bytes"),
    ],
)
def test_refusals(host: ctypes.CDLL, changes: dict[str, object], wrong: str) -> None:
    case = make_case("bfloat16", 1, 1, 4, 2, 100, 64, past=[50], new=[1])
    with pytest.raises(ValueError, match=wrong):
        run(host, case, "bfloat16", 2, **changes)


def test_empty_batch_and_no_tokens_are_nothing_to_do(host: ctypes.CDLL) -> None:
    case = make_case("bfloat16", 1, 1, 4, 2, 100, 64, past=[50], new=[1])
    for changes in (dict(batch=0), dict(tokens=0)):
        assert np.isnan(run(host, case, "bfloat16", 1, **changes).astype(np.float64)).all()


def test_splits_fill_the_gpu_within_the_bound(host: ctypes.CDLL) -> None:
    for head_dim in (64, 128):
        bound = host.host_max_workspace(head_dim)
        for batch in (1, 2, 3, 17, 64, 1000):
            for tokens in (1, 2, 100, 8192):
                for capacity in (8192, 10_000_000):
                    params = Params(
                        batch=batch, tokens=tokens, heads=64, kv_heads=8, capacity=capacity, head_dim=head_dim
                    )
                    for sm_count in (1, 78, 132, 256, 1000):
                        splits = host.host_splits(ctypes.byref(params), sm_count)
                        assert 1 <= splits <= 64
                        assert host.host_workspace(ctypes.byref(params), splits) <= bound
    decode = Params(batch=1, tokens=1, heads=64, kv_heads=8, capacity=131072, head_dim=128)
    assert host.host_splits(ctypes.byref(decode), 132) * 8 >= 132
    short = Params(batch=1, tokens=1, heads=64, kv_heads=8, capacity=64, head_dim=128)
    assert host.host_splits(ctypes.byref(short), 132) == 1
