"""The C interface through ctypes: versions, refusals and errors that need no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins import catalog, library
from plugins.errors import KernelError, LibraryError, PluginsUsageError
from plugins.library import AttentionParams, Library, LightningParams, MoeParams, dtype_code, load

_MEMORY = ctypes.create_string_buffer(1 << 16)
ALIGNED = (ctypes.addressof(_MEMORY) + 255) // 256 * 256  # host memory: refusals happen before anything is read


def lightning(**changes: object) -> LightningParams:
    """A launch that is right but for `changes`: one sequence, one token, one head of 128."""
    pointers = {name: ALIGNED + 1024 * i for i, name in enumerate(("q", "k", "v", "out", "slopes"))}
    sizes = dict(batch=1, tokens=1, heads=1, head_dim=64, dtype=dtype_code("bfloat16"), scale=1.0)
    state = dict(state_in=ALIGNED + 8192, state_out=ALIGNED + 8192 + 16384)
    return LightningParams(**{**pointers, **sizes, **state, **changes})


def moe(**changes: object) -> MoeParams:
    """A launch that is right but for `changes`: one token, 4 experts of width 16."""
    pointers = {name: ALIGNED + 4096 * i for i, name in enumerate(("x", "router_logits", "fc1", "fc2", "out"))}
    sizes = dict(tokens=1, hidden=16, inner=16, experts=4, top_k=2, normalize=1, router_dtype=0)
    types = dict(dtype=dtype_code("bfloat16"), weight_dtype=dtype_code("bfloat16"))
    workspace = dict(workspace=ALIGNED + 32768, workspace_bytes=1 << 21)
    return MoeParams(**{**pointers, **sizes, **types, **workspace, **changes})


def attention(**changes: object) -> AttentionParams:
    """A launch that is right but for `changes`: one token over a cache of 8."""
    pointers = {
        name: ALIGNED + 1024 * i for i, name in enumerate(("q", "k", "v", "out", "past_lengths", "new_lengths"))
    }
    sizes = dict(batch=1, tokens=1, heads=2, kv_heads=1, capacity=8, head_dim=64, scale=0.125)
    return AttentionParams(**{**pointers, **sizes, "dtype": dtype_code("float16"), **changes})


def test_library_knows_what_it_was_built_for(kernel_library: Library) -> None:
    assert set(kernel_library.architectures) <= set(catalog.ARCHITECTURES)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("80",), 80, True),
        (("80",), 86, True),
        (("86",), 80, False),
        (("80",), 90, False),
        (("90a",), 90, True),
        (("90a",), 100, False),
        (("80", "90a"), 90, True),
        (("120",), 121, True),
        (("120",), 90, False),
        (("80", "86", "89"), 75, False),
    ],
)
def test_which_gpu_runs_which_architecture(
    kernel_library: Library, architectures: tuple[str, ...], capability: int, runs: bool
) -> None:
    assert kernel_library.architecture_runs(capability, architectures) is runs


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (dict(head_dim=96), "head_dim 96 is not supported"),
        (dict(tokens=-1), "tokens -1"),
        (dict(batch=-1), "batch -1"),
        (dict(heads=0), "heads"),
        (dict(q=ALIGNED + 2), "aligned"),
        (dict(dtype=dtype_code("int8")), "dtype"),
        (dict(dtype=17), "dtype 17"),
        (dict(slopes=0), "slopes"),
        (dict(workspace_bytes=-1), "workspace"),
    ],
)
@pytest.mark.parametrize("launcher", ["lightning_decode", "lightning_prefill"])
def test_lightning_refuses(kernel_library: Library, launcher: str, changes: dict[str, object], wrong: str) -> None:
    with pytest.raises(KernelError, match=wrong) as raised:
        getattr(kernel_library, launcher)(lightning(**changes))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (dict(top_k=5), "top_k|k "),
        (dict(top_k=0), "top_k|k "),
        (dict(tokens=-1), "tokens"),
        (dict(hidden=15), "hidden"),
        (dict(x=ALIGNED + 2), "aligned"),
        (dict(first_local=3, local_experts=2), "expert"),
        (dict(dtype=99), "dtype 99"),
    ],
)
def test_moe_refuses(kernel_library: Library, changes: dict[str, object], wrong: str) -> None:
    with pytest.raises(KernelError, match=wrong) as raised:
        kernel_library.moe(moe(**changes))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (dict(head_dim=96), "head_dim 96 is not supported"),
        (dict(tokens=9), "9 new tokens do not fit a capacity of 8"),
        (dict(k=0), "k is null"),
        (dict(dtype=dtype_code("float32")), "use fp16 or bf16"),
    ],
)
def test_attention_refuses(kernel_library: Library, changes: dict[str, object], wrong: str) -> None:
    with pytest.raises(KernelError, match=wrong) as raised:
        kernel_library.softmax_attention(attention(**changes))
    assert raised.value.exit_code == 2


def test_empty_batch_is_nothing_to_do(kernel_library: Library) -> None:
    kernel_library.softmax_attention(attention(batch=0))
    kernel_library.lightning_decode(lightning(batch=0))
    kernel_library.moe(moe(tokens=0))


LAUNCHES: list[Callable[[Library], None]] = [
    lambda lib: lib.lightning_decode(lightning()),
    lambda lib: lib.lightning_prefill(lightning()),
    lambda lib: lib.moe(moe()),
    lambda lib: lib.softmax_attention(attention()),
    lambda lib: lib.check_device(),
]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_no_gpu_is_said_so(kernel_library: Library, has_gpu: bool, launch: Callable[[Library], None]) -> None:
    if has_gpu:
        pytest.skip("this machine has a GPU")
    with pytest.raises(KernelError, match="no usable GPU") as raised:
        launch(kernel_library)
    assert raised.value.exit_code == 3


def test_struct_of_another_version_is_refused(kernel_library: Library) -> None:
    params = lightning()
    params.struct_bytes = 8
    assert kernel_library.handle.mxc_lightning_decode(ctypes.byref(params), None) == 1
    assert "different versions" in kernel_library.last_error()
    assert kernel_library.handle.mxc_moe(None, None) == 1


def test_plan_covers_every_token(kernel_library: Library) -> None:
    plan = kernel_library.plan_prefill(1, 8192, 8, 128, 132, 90)
    assert plan.segments * plan.segment_chunks * 64 >= 8192
    assert kernel_library.lightning_workspace_bytes(plan, 1, 8, 128) >= 0


def test_moe_workspace_grows_with_tokens(kernel_library: Library) -> None:
    sizes = [kernel_library.moe_workspace_bytes(moe(tokens=tokens)) for tokens in (1, 64, 4096)]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0


def test_missing_library_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="mxcompile plugins build") as raised:
        load(tmp_path)
    assert raised.value.exit_code == 3


def test_something_else_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / library.KERNELS_LIBRARY).write_bytes(b"not a library")
    with pytest.raises(LibraryError, match="not a library of this package"):
        load(tmp_path)


def test_library_of_another_interface_is_refused(kernel_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ABI_VERSION", 99)
    library._load.cache_clear()
    with pytest.raises(LibraryError, match="interface 2, this package 99"):
        load(kernel_library.path.parent)
    library._load.cache_clear()


@pytest.mark.parametrize("name", ["float64", "", "bf16"])
def test_unknown_dtype_is_refused(name: str) -> None:
    with pytest.raises(PluginsUsageError, match="use one of float32, float16, bfloat16, int8"):
        dtype_code(name)
