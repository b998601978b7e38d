"""The lightning planner, checks and kernels on the CPU: builds lightning_harness.cpp with g++ and calls it by ctypes.

The kernels are the same source files that nvcc compiles; emulator/mxc_emulator.h supplies the instructions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning_reference import DTYPES, Case

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SOURCES = (
    HERE / "lightning_harness.cpp",
    ROOT / "plugins/lightning/planner.cpp",
    ROOT / "plugins/lightning/checks.cpp",
)
POISON = 1.5e37  # finite in fp32 and bf16, never a result


class LightningParams(ctypes.Structure):
    """mxc::LightningParams."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "k", "v", "out", "state_in", "state_out", "slots_B", "log_decay", "slopes_H")
        ),
        ("lengths_B", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("batch", "tokens", "heads", "head_dim", "slots")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
    ]


DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}
OK, INVALID, UNSUPPORTED, ARCHITECTURE, WORKSPACE, CUDA = range(6)


@cache
def library() -> ctypes.CDLL:
    """Builds (once per content) and loads the harness."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "g++"
    headers = sorted(
        [
            *(ROOT / "plugins/lightning").glob("*.*h"),
            *(ROOT / "plugins/include/mxc").glob("*"),
            *(HERE / "emulator").glob("*.h"),
        ]
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*SOURCES, *headers))).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mxcompile-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"lightning-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch) / "lightning.so"
            command = [
                compiler,
                "-std=c++17",
                "-O2",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wno-unknown-pragmas",
                "-fPIC",
                "-shared",
            ]
            command += [f"-I{path}" for path in (ROOT / "plugins", ROOT / "plugins/include", HERE / "emulator")]
            command += [*map(str, SOURCES), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"the host build of the kernels failed:\n{done.stderr}"
            partial.replace(target)  # atomic: several test processes may build at once
    loaded = ctypes.CDLL(str(target))
    loaded.host_last_error.restype = ctypes.c_char_p
    loaded.host_workspace.restype = ctypes.c_size_t
    loaded.host_max_workspace.restype = ctypes.c_size_t
    loaded.host_params_bytes.restype = ctypes.c_size_t
    assert loaded.host_params_bytes() == ctypes.sizeof(LightningParams)
    return loaded


def last_error() -> str:
    return library().host_last_error().decode()


def plan(
    batch: int, tokens: int, heads: int, head_dim: int, sms: int, capability: int = 90
) -> tuple[int, int, int, int]:
    """(kernel, value_splits, segments, segment_chunks)."""
    out = (ctypes.c_int * 4)()
    library().host_plan(batch, tokens, heads, head_dim, sms, capability, out)
    return tuple(out)


def workspace_bytes(plan4: tuple[int, int, int, int], batch: int, heads: int, head_dim: int) -> int:
    return library().host_workspace((ctypes.c_int * 4)(*plan4), batch, heads, head_dim)


class Guarded:
    """An array between two pages of canaries, 256-byte aligned."""

    PAD = 4096

    def __init__(self, like: npt.NDArray, fill: npt.NDArray | None = None) -> None:
        self.raw = np.full(like.nbytes + 2 * self.PAD + 256, 0xFF, np.uint8)
        self.start = self.PAD + (-(self.raw.ctypes.data + self.PAD)) % 256
        self.end = self.start + like.nbytes
        self.array = self.raw[self.start : self.end].view(like.dtype).reshape(like.shape)
        if fill is not None:
            self.array[...] = fill

    @property
    def address(self) -> int:
        return self.raw.ctypes.data + self.start

    def check(self, name: str) -> None:
        assert (self.raw[: self.start] == 0xFF).all(), f"write before {name}"
        assert (self.raw[self.end :] == 0xFF).all(), f"write past {name}"


def run(
    case: Case,
    plan4: tuple[int, int, int, int] | None = None,
    *,
    decode_splits: int = 0,
    in_place: bool = False,
    zero_state: bool = False,
    schedule: int = 0,
) -> tuple[npt.NDArray, npt.NDArray[np.float32]]:
    """Runs the emulated prefill (or decode) kernels; returns the outputs and the state pool afterwards.

    Where not in place, the output pool starts as POISON, so untouched slots show. Every buffer is guarded.
    """
    batch, tokens, heads, head_dim = case.q.shape
    dtype = next(name for name, value in DTYPES.items() if value == case.q.dtype)
    buffers: dict[str, Guarded] = {}

    def put(name: str, array: npt.NDArray | None) -> int | None:
        if array is None:
            return None
        buffers[name] = Guarded(array, array)
        return buffers[name].address

    params = LightningParams(
        q=put("q", case.q),
        k=put("k", case.k),
        v=put("v", case.v),
        out=put("out", np.full_like(case.q, POISON if dtype != "float16" else 6e4)),
        slots_B=put("slots", case.slots),
        log_decay=put("log_decay", case.log_decay),
        slopes_H=put("slopes", case.slopes),
        lengths_B=put("lengths", case.lengths),
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        slots=len(case.state),
        scale=case.scale,
        dtype=DTYPE_CODES[dtype],
    )
    params.state_out = put("state_out", case.state if in_place else np.full_like(case.state, POISON))
    params.state_in = params.state_out if in_place else (None if zero_state else put("state_in", case.state))
    if decode_splits:
        status = library().host_decode(ctypes.byref(params), decode_splits, schedule)
    else:
        plan4 = plan4 or plan(batch, tokens, heads, head_dim, 1)
        workspace = Guarded(np.empty(workspace_bytes(plan4, batch, heads, head_dim), np.uint8))
        workspace.array[...] = 0xFF
        params.workspace, params.workspace_bytes = workspace.address, workspace.array.nbytes
        status = library().host_prefill(ctypes.byref(params), (ctypes.c_int * 4)(*plan4), schedule)
        workspace.check("workspace")
    assert status == OK, last_error()
    for name, buffer in buffers.items():
        buffer.check(name)
    return buffers["out"].array, buffers["state_out"].array
