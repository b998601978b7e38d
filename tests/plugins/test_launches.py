"""What the library asks of the CUDA runtime, from the C interface to each kernel's launch, on made-up memory and no GPU.

The library's own objects are linked with fake_cudart.cpp in the runtime's place. It plays an H200 (132 multiprocessors, 9.0) and writes
down every call; what it lacks (allocations, synchronisation, events) the library cannot have called: it would not link.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from plugins.build import KERNELS_LIBRARY, BuildResult
from plugins.errors import KernelError
from plugins.library import AttentionParams, Library, LightningParams, LightningPlan, MoeParams, dtype_code, load
from plugins.toolchain import find_nvcc

HERE = Path(__file__).resolve().parent
STREAM = 0x5EA0
MOST_SHARED = 227 * 1024  # of a CTA on an H200
NAMES = ("q", "k", "v", "out", "state_in", "state_out", "slopes", "workspace")
AT = {name: (i + 1) << 40 for i, name in enumerate(NAMES)}


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    cluster: tuple[int, ...]
    maps: dict[str, tuple[int, tuple[int, ...]]]  # PrefillSm90's: address and box


class Runtime:
    """The library on the fake runtime, and what was asked of it since the last `reset`."""

    def __init__(self, folder: Path) -> None:
        self.library: Library = load(folder)
        self.fake = ctypes.CDLL(str(folder / KERNELS_LIBRARY))
        self.fake.fake_log.restype = ctypes.c_char_p
        self.raised: dict[str, int] = {}  # kernels whose limit an earlier launch has raised

    def reset(self, device: int = 0) -> None:
        self.fake.fake_reset(device)

    def fail(self, name: str, code: int) -> None:
        self.fake.fake_fail(name.encode(), code)

    def calls(self) -> list[list[str]]:
        return [line.split("|") for line in self.fake.fake_log().decode().splitlines()]

    def launches(self) -> list[Launch]:
        """All launches, each checked: on our stream, with no more shared memory than a CTA has or the kernel may."""
        found: list[Launch] = []
        allowed: dict[str, int] = {}
        for kind, *rest in self.calls():
            assert kind in ("launch", "map", "shared", "memset"), [kind, *rest]
            if kind == "shared":
                allowed[rest[0]] = int(rest[1])
            elif kind == "memset":
                assert int(rest[0]) == STREAM
            elif kind == "map":
                found[-1].maps[rest[0]] = (int(rest[1]), numbers(rest[2]))
            else:
                kernel, grid, threads, shared, stream, cluster = rest
                made = Launch(kernel, numbers(grid), int(threads), int(shared), int(stream), numbers(cluster), {})
                assert made.stream == STREAM, kernel
                assert made.shared <= MOST_SHARED
                assert made.shared <= max(48 * 1024, allowed.get(kernel, 0), self.raised.get(kernel, 0)), kernel
                assert all(size % part == 0 for size, part in zip(made.grid, made.cluster, strict=True))
                assert 0 < made.threads <= 1024
                assert all(0 < size < 1 << 31 for size in made.grid)
                found.append(made)
        self.raised |= allowed
        return found


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


@pytest.fixture(scope="module")
def runtime(plugin_build: BuildResult, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("fake")
    plugins = HERE.parents[1] / "plugins"
    built = plugin_build.kernels.path.parent / "CMakeFiles/mxcompile_kernels_objects.dir"
    # Not the file that knows for what the library was built: this one is for the GPU that is played.
    objects = [path for path in sorted(built.rglob("*.o")) if path.name != "architectures.cpp.o"]
    assert len(objects) > 10, "the build has left no objects"
    command = [str(find_nvcc()), "-x", "c++", "-std=c++17", "-Xcompiler=-fPIC", '-DMXC_ARCHS="90a"']
    command += [f"-I{path}" for path in (plugins, plugins / "include", plugins / "lightning")]
    for source in (HERE / "fake_cudart.cpp", plugins / "src/architectures.cpp"):
        objects.append(folder / f"{source.name}.o")
        run([*command, "-c", str(source), "-o", str(objects[-1])])
    linker = os.environ.get("CXX") or shutil.which("g++") or "g++"
    options = ["-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", "-o", str(folder / KERNELS_LIBRARY)]
    run([linker, *options, *map(str, objects)])
    return Runtime(folder)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def lightning(
    runtime: Runtime, batch: int, tokens: int, heads: int, kernel: int, splits: int, segments: int, head_dim: int = 128
) -> list[Launch]:
    chunks = -(-tokens // 64)
    plan = LightningPlan(kernel=kernel, value_splits=splits, segments=segments, segment_chunks=-(-chunks // segments))
    params = LightningParams(**AT, batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, scale=1.0)
    params.dtype = dtype_code("bfloat16")
    params.workspace_bytes = runtime.library.lightning_workspace_bytes(plan, batch, heads, head_dim)
    runtime.library.lightning_prefill(params, plan, STREAM)
    return runtime.launches()


def test_a_cluster_shares_q_and_k_in_boxes_of_half_the_tokens(runtime: Runtime) -> None:
    runtime.reset()
    (launch,) = lightning(runtime, 2, 1000, 3, 1, 2, 1)
    assert "PrefillSm90" in launch.kernel
    assert (launch.grid, launch.threads, launch.cluster) == ((2 * 3 * 2, 1, 1), 384, (2, 1, 1))
    half, whole = (64, 1, 32, 1), (64, 1, 64, 1)
    assert launch.maps == {"q": (AT["q"], half), "k": (AT["k"], half), "v": (AT["v"], whole), "o": (AT["out"], whole)}


@pytest.mark.parametrize(("kernel", "splits", "threads"), [(1, 1, 512), (2, 2, 384)])
def test_without_a_cluster_each_cta_loads_whole_boxes(runtime: Runtime, kernel: int, splits: int, threads: int) -> None:
    runtime.reset()
    (launch,) = lightning(runtime, 2, 1000, 3, kernel, splits, 1)
    assert (launch.grid, launch.threads, launch.cluster) == ((6 * splits, 1, 1), threads, (1, 1, 1))
    assert {box for _, box in launch.maps.values()} == {(64, 1, 64, 1)}
    assert [launch.maps[name][0] for name in "qkvo"] == [AT["q"], AT["k"], AT["v"], AT["out"]]


def test_segments_are_summed_scanned_and_walked(runtime: Runtime) -> None:
    runtime.reset()
    summary, scan, walk = lightning(runtime, 1, 1024, 3, 1, 2, 4)
    assert summary.grid == (3 * 3, 1, 1)
    assert [summary.maps[name] for name in "kv"] == [(AT[name], (64, 1, 64, 1)) for name in "kv"]
    assert "SegmentScan" in scan.kernel
    assert scan.grid == (3 * 16, 1, 1)
    assert walk.grid == (3 * 4 * 2, 1, 1)
    assert walk.cluster == (2, 1, 1)
    assert walk.maps["k"] == (AT["k"], (64, 1, 32, 1))


@pytest.mark.parametrize(
    ("wanted", "shape", "kernels", "cluster"),
    [
        ("", (1, 8192, 64), ["PrefillPortable"], 1),
        ("0", (1, 8192, 8), ["PrefillPortable", "SegmentScan", "PrefillPortable"], 1),
        ("1", (1, 8192, 64), ["PrefillSm90"], 2),
        ("2", (1, 8192, 64), ["PrefillSm90"], 1),
        ("1", (8, 4096, 64), ["PrefillSm90"], 1),
        ("1", (1, 8192, 8), ["PrefillSm90", "SegmentScan", "PrefillSm90"], 1),
    ],
)
def test_the_librarys_own_plan(
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    shape: tuple[int, int, int],
    kernels: list[str],
    cluster: int,
) -> None:
    monkeypatch.setenv("MXC_LIGHTNING_SM90", wanted)
    runtime.reset()
    batch, tokens, heads = shape
    params = LightningParams(**AT, batch=batch, tokens=tokens, heads=heads, head_dim=128, scale=1.0)
    params.dtype, params.workspace_bytes = dtype_code("bfloat16"), 1 << 30
    runtime.library.lightning_prefill(params, None, STREAM)
    launches = runtime.launches()
    assert len(launches) == len(kernels)
    assert all(name in launch.kernel for name, launch in zip(kernels, launches, strict=True))
    assert launches[-1].cluster[0] == cluster


@pytest.mark.parametrize("head_dim", [64, 128])
def test_portable_prefill_and_decode_launch_on_the_stream(runtime: Runtime, head_dim: int) -> None:
    runtime.reset()
    assert len(lightning(runtime, 1, 1024, 3, 0, 1, 4, head_dim)) == 3
    assert len(lightning(runtime, 1, 1024, 3, 0, head_dim // 64, 1, head_dim)) == 4
    runtime.reset()
    for dtype in ("float32", "float16", "bfloat16"):
        params = LightningParams(
            **AT, batch=5, tokens=1, heads=3, head_dim=head_dim, dtype=dtype_code(dtype), scale=1.0
        )
        runtime.library.lightning_decode(params, STREAM)
    assert [launch.grid for launch in runtime.launches()] == [(5 * 3 * 4, 1, 1)] * 3


def moe(runtime: Runtime, tokens: int, hidden: int, inner: int, experts: int = 32, local: int = 0) -> list[Launch]:
    runtime.reset()
    names = ("x", "router_logits", "fc1", "fc2", "out", "workspace")
    pointers = {name: (i + 1) << 44 for i, name in enumerate(names)}
    bfloat16 = dtype_code("bfloat16")
    params = MoeParams(**pointers, tokens=tokens, hidden=hidden, inner=inner, experts=experts, top_k=2, normalize=1)
    params.local_experts = local
    params.dtype = params.weight_dtype = bfloat16
    params.router_dtype = params.scale_dtype = dtype_code("float32")
    params.workspace_bytes = runtime.library.moe_workspace_bytes(params)
    runtime.library.moe(params, STREAM)
    return runtime.launches()


WIDTHS = [(64, 128), (768, 1152), (6144, 9216), (6144, 1152), (1000, 136)]  # with their cuts over ranks


@pytest.mark.parametrize(("hidden", "inner"), WIDTHS)
@pytest.mark.parametrize("path", ["stream", "grouped64", "grouped128", "sm90"])
def test_experts_of_every_path_and_width(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, path: str, hidden: int, inner: int
) -> None:
    monkeypatch.setenv("MXC_MOE_PATH", path)
    for tokens in (1, 8, 33, 1024, 16384):
        launches = moe(runtime, tokens, hidden, inner)
        products = [launch for launch in launches if "MoeStream" in launch.kernel or "MoeGrouped" in launch.kernel]
        if path == "sm90":
            products = [launch for launch in launches if "multiplyFc" in launch.kernel]
            # A CTA for each multiprocessor, in pairs of neighbouring column tiles.
            assert [(p.grid, p.threads, p.cluster) for p in products] == [((66, 2, 1), 384, (1, 2, 1))] * 2
            assert [launch.threads for launch in launches if "Gather" in launch.kernel] == [256]
        assert len(products) == 2
        assert "MoeCombine" in launches[-1].kernel
        assert any("oute" in launch.kernel for launch in launches[:2])


def test_pieces_of_many_tokens_and_experts_of_one_rank(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXC_MOE_SM90", "1")
    monkeypatch.delenv("MXC_MOE_PATH", raising=False)
    launches = moe(runtime, 40000, 768, 1152, local=4)
    assert [launch.kernel for launch in launches].count(launches[-1].kernel) == 3
    assert sum("multiplyFc" in launch.kernel for launch in launches) == 6


def test_attention_launches_on_the_stream(runtime: Runtime) -> None:
    runtime.reset()
    names = ("q", "k", "v", "out", "past_lengths", "new_lengths", "workspace")
    pointers = {name: (i + 1) << 40 for i, name in enumerate(names)}
    params = AttentionParams(
        **pointers, batch=1, tokens=1, heads=64, kv_heads=8, capacity=8192, head_dim=128, scale=0.1
    )
    params.dtype = dtype_code("bfloat16")
    params.workspace_bytes = runtime.library.attention_workspace_bytes(128)
    runtime.library.softmax_attention(params, STREAM)
    tiles, combine = runtime.launches()
    assert tiles.grid == (8 * 64, 1, 1)
    assert combine.grid == (8, 1, 1)


def test_each_device_raises_a_kernels_limit_once(runtime: Runtime) -> None:
    def raised(device: int) -> list[list[str]]:
        runtime.reset(device)
        lightning(runtime, 1, 640, 2, 1, 1, 1)
        return [call for call in runtime.calls() if call[0] == "shared"]

    first = raised(40)
    assert [call[3] for call in first] == ["40"]
    assert raised(40) == []
    assert [call[3] for call in raised(41)] == ["41"]


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("cudaGetDevice", 100, "no usable GPU: made up"),
        ("cudaDeviceGetAttribute", 100, "no usable GPU: made up"),
        ("cudaGetDriverEntryPointByVersion", 34, "cuTensorMapEncodeTiled"),
        ("cuTensorMapEncodeTiled", 1, "refuses the tensor map"),
        ("cudaFuncSetAttribute", 1, "raising the shared memory limit"),
        ("launch", 701, "launch"),
        ("launch", 209, "launch"),
    ],
)
def test_what_fails_is_said_and_forgotten(runtime: Runtime, name: str, code: int, said: str) -> None:
    """The error reaches Python in words, and the next call does not see it."""
    runtime.reset(50)
    runtime.fail(name, code)
    with pytest.raises(KernelError, match=said):
        lightning(runtime, 1, 640, 2, 1, 2, 1)
    runtime.reset(51)
    assert len(lightning(runtime, 1, 640, 2, 1, 2, 1)) == 1


def test_a_context_that_cannot_be_asked_about_is_no_error(runtime: Runtime) -> None:
    runtime.reset()
    runtime.fail("cudaStreamIsCapturing", 901)
    assert len(lightning(runtime, 1, 640, 2, 1, 2, 1)) == 1


@pytest.mark.parametrize("name", ["cudaFuncSetAttribute", "launch"])
def test_a_failed_expert_launch_is_said(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MXC_MOE_PATH", "sm90")
    original = runtime.reset
    monkeypatch.setattr(runtime, "reset", lambda: (original(), runtime.fail(name, 1)))
    with pytest.raises(KernelError, match="moe"):
        moe(runtime, 4096, 768, 1152)
