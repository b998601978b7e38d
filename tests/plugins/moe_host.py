"""The mixture-of-experts planner, checks and kernels on the CPU: builds moe_harness.cpp with g++ and calls it by ctypes.

The kernels are the same source files that nvcc compiles; emulator/ supplies the instructions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from moe_reference import Case

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SOURCES = (HERE / "moe_harness.cpp", ROOT / "plugins/moe/dispatch.cpp", ROOT / "plugins/moe/checks.cpp")

DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}
OK, INVALID, UNSUPPORTED, ARCHITECTURE, WORKSPACE, CUDA = range(6)
PATHS = ("stream", "grouped64", "grouped128", "sm90")
POINTERS = ("x", "router_logits", "fc1", "fc2", "fc1_scale", "fc2_scale", "out")


class MoeParams(ctypes.Structure):
    """mxc::MoeParams."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("router_logits", ctypes.c_void_p),
        ("router_dtype", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("fc1", "fc2", "fc1_scale", "fc2_scale")),
        ("scale_dtype", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("tokens", "hidden", "inner", "experts", "top_k", "first_local")),
        ("local_experts", ctypes.c_int32),
        ("normalize", ctypes.c_bool),
        ("dtype", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    )


@cache
def library() -> ctypes.CDLL:
    """Builds (once per content) and loads the harness."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "g++"
    folders = (ROOT / "plugins/moe", ROOT / "plugins/include/mxc", HERE / "emulator")
    headers = sorted(path for folder in folders for path in folder.glob("*.*h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*SOURCES, *headers))).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mxcompile-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"moe-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch) / "moe.so"
            command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC"]
            command += [
                "-shared",
                *(f"-I{path}" for path in (ROOT / "plugins", ROOT / "plugins/include", HERE / "emulator")),
            ]
            command += [*map(str, SOURCES), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"the host build of the kernels failed:\n{done.stderr[:4000]}"
            partial.replace(target)  # atomic: several test processes may build at once
    loaded = ctypes.CDLL(str(target))
    loaded.host_last_error.restype = ctypes.c_char_p
    loaded.host_workspace.restype = ctypes.c_size_t
    loaded.host_params_bytes.restype = ctypes.c_size_t
    assert loaded.host_params_bytes() == ctypes.sizeof(MoeParams)
    return loaded


def last_error() -> str:
    return str(library().host_last_error().decode())


@contextmanager
def environment(**variables: str | None) -> Iterator[None]:
    """Sets (or with None removes) variables that the C library reads."""
    before = {name: os.environ.get(name) for name in variables}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(dict(variables))
    try:
        yield
    finally:
        put(before)


@dataclass(frozen=True)
class Plan:
    """mxc::MoePlan."""

    path: str
    pieces: int
    piece_tokens: int
    small_route: bool


def plan(
    tokens: int,
    experts: int,
    top_k: int,
    *,
    int8: bool = False,
    bfloat16: bool = True,
    capability: int = 90,
    sm90: bool = False,
) -> Plan:
    """What planMoe answers."""
    out = (ctypes.c_int * 4)()
    library().host_plan(tokens, experts, top_k, int(int8), int(bfloat16), capability, int(sm90), out)
    return Plan(PATHS[out[0]], out[1], out[2], bool(out[3]))


class Guarded:
    """An array between two pages of 0xff, 256-byte aligned: reads outside give NaN, writes outside show."""

    PAD = 4096

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, fill: npt.ArrayLike | None = None) -> None:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self.raw = np.full(size + 2 * self.PAD + 256, 0xFF, np.uint8)
        self.start = self.PAD + (-(self.raw.ctypes.data + self.PAD)) % 256
        self.end = self.start + size
        self.array = self.raw[self.start : self.end].view(dtype).reshape(shape)
        if fill is not None:
            self.array[...] = fill

    @property
    def address(self) -> int:
        return int(self.raw.ctypes.data) + self.start

    def check(self, name: str) -> None:
        assert (self.raw[: self.start] == 0xFF).all(), f"write before {name}"
        assert (self.raw[self.end :] == 0xFF).all(), f"write past {name}"


@dataclass
class Call:
    """Parameters whose buffers are guarded; `out` and the workspace start as 0xff (NaN)."""

    params: MoeParams
    buffers: dict[str, Guarded]

    @property
    def out(self) -> npt.NDArray[np.generic]:
        return self.buffers["out"].array

    def check_guards(self) -> None:
        for name, buffer in self.buffers.items():
            buffer.check(name)


def prepare(case: Case, first: int = 0, count: int = 0, *, workspace: bool = True) -> Call:
    """Buffers and parameters of a call that holds the experts first .. first + count - 1 (count 0: all)."""
    local = slice(first, first + (count or len(case.fc1)))
    given = {
        "x": case.x,
        "router_logits": case.logits,
        "fc1": case.fc1[local],
        "fc2": case.fc2[local],
        "fc1_scale": None if case.fc1_scale is None else case.fc1_scale[local],
        "fc2_scale": None if case.fc2_scale is None else case.fc2_scale[local],
    }
    buffers = {name: Guarded(value.shape, value.dtype, value) for name, value in given.items() if value is not None}
    buffers["out"] = Guarded(case.x.shape, case.x.dtype)
    codes = {name: DTYPE_CODES[str(value.dtype)] for name, value in given.items() if value is not None}
    params = MoeParams(
        **{name: buffer.address for name, buffer in buffers.items()},
        router_dtype=codes["router_logits"],
        scale_dtype=codes.get("fc1_scale", 0),
        tokens=case.x.shape[0],
        hidden=case.x.shape[1],
        inner=case.fc2.shape[2],
        experts=case.logits.shape[1],
        top_k=case.top_k,
        first_local=first,
        local_experts=count,
        normalize=case.normalize,
        dtype=codes["x"],
        weight_dtype=codes["fc1"],
    )
    if workspace:
        buffers["workspace"] = Guarded((library().host_workspace(ctypes.byref(params)),), np.uint8)
        params.workspace, params.workspace_bytes = buffers["workspace"].address, buffers["workspace"].array.nbytes
    return Call(params, buffers)


def run(
    case: Case, path: str | None = None, *, first: int = 0, count: int = 0, piece_tokens: int = 0, schedule: int = 0
) -> npt.NDArray[np.generic]:
    """The emulated launch: [N, D] in the tokens' type. `path` None, `piece_tokens` 0: as planned."""
    with environment(MXC_MOE_PATH=path, MXC_MOE_SM90=None):
        call = prepare(case, first, count)
        status = library().host_moe(ctypes.byref(call.params), piece_tokens, schedule)
    assert status == OK, last_error()
    call.check_guards()
    return call.out


@dataclass(frozen=True)
class Route:
    """What router and sort write; see moe_args.h."""

    weights: npt.NDArray[np.float32]  # [R]
    experts: npt.NDArray[np.int32]  # [R] local expert or -1
    rows: npt.NDArray[np.int32]  # [R]
    tokens: npt.NDArray[np.int32]  # [R]
    offsets: npt.NDArray[np.int32]  # [L + 1]


def route(
    logits: npt.NDArray[np.generic],
    top_k: int,
    *,
    normalize: bool = True,
    first: int = 0,
    count: int = 0,
    small: bool = False,
    schedule: int = 0,
) -> Route:
    """Router and sort alone."""
    tokens, experts = logits.shape
    given = Guarded(logits.shape, logits.dtype, logits)
    outputs = {
        "weights": Guarded((tokens * top_k,), np.float32),
        **{name: Guarded((tokens * top_k,), np.int32) for name in ("experts", "rows", "tokens")},
        "offsets": Guarded(((count or experts) + 1,), np.int32),
    }
    params = MoeParams(
        router_logits=given.address,
        router_dtype=DTYPE_CODES[str(logits.dtype)],
        tokens=tokens,
        hidden=8,
        inner=8,
        experts=experts,
        top_k=top_k,
        first_local=first,
        local_experts=count,
        normalize=normalize,
        dtype=2,
        weight_dtype=2,
    )
    pointers = [ctypes.c_void_p(outputs[name].address) for name in ("weights", "experts", "rows", "tokens", "offsets")]
    status = library().host_route(ctypes.byref(params), int(small), schedule, *pointers)
    assert status == OK, last_error()
    for name, buffer in {**outputs, "logits": given}.items():
        buffer.check(name)
    return Route(**{name: buffer.array for name, buffer in outputs.items()})
