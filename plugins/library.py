"""The kernels without TensorRT: ctypes over plugins/capi/capi.h, on plain pointers.

Pointers are integers as `tensor.data_ptr()` gives them (device memory), 0 for absent; a stream is the integer of
`torch.cuda.current_stream().cuda_stream`, 0 for the default one. Nothing is copied and nothing waits: the caller keeps the
memory alive until the stream is done.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

from plugins.build import KERNELS_LIBRARY, default_build_dir
from plugins.errors import KernelError, LibraryError, PluginsUsageError

ABI_VERSION = 2

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}

_POINTER, _I32, _I64, _F32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class LightningParams(ctypes.Structure):
    """mxc_lightning_params: pointers and sizes of one launch; the meanings are those of lightning_attention.h."""

    _fields_ = (
        ("struct_bytes", _I64),
        *((name, _POINTER) for name in ("q", "k", "v", "out", "state_in", "state_out")),
        *((name, _POINTER) for name in ("slots", "log_decay", "slopes", "lengths", "workspace")),
        ("workspace_bytes", _I64),
        *((name, _I32) for name in ("batch", "tokens", "heads", "head_dim", "pool_slots", "dtype")),
        ("scale", _F32),
        ("reserved", _I32),
    )


class LightningPlan(ctypes.Structure):
    """mxc_lightning_plan: how a prefill is laid over the GPU; see planner.h."""

    _fields_ = tuple((name, _I32) for name in ("kernel", "value_splits", "segments", "segment_chunks"))


class MoeParams(ctypes.Structure):
    """mxc_moe_params: pointers and sizes of one launch; the meanings are those of moe.h."""

    _fields_ = (
        ("struct_bytes", _I64),
        *(
            (name, _POINTER)
            for name in ("x", "router_logits", "fc1", "fc2", "fc1_scale", "fc2_scale", "out", "workspace")
        ),
        ("workspace_bytes", _I64),
        *((name, _I32) for name in ("router_dtype", "scale_dtype", "dtype", "weight_dtype", "tokens", "hidden")),
        *((name, _I32) for name in ("inner", "experts", "top_k", "first_local", "local_experts", "normalize")),
    )


class AttentionParams(ctypes.Structure):
    """mxc_attention_params: pointers and sizes of one launch; the meanings are those of softmax_attention.h."""

    _fields_ = (
        ("struct_bytes", _I64),
        *((name, _POINTER) for name in ("q", "k", "v", "out", "past_lengths", "new_lengths", "workspace")),
        ("workspace_bytes", _I64),
        *((name, _I32) for name in ("batch", "tokens", "heads", "kv_heads", "capacity", "head_dim", "dtype")),
        ("wide_lengths", _I32),
        ("scale", _F32),
        ("reserved", _I32),
    )


def dtype_code(name: str) -> int:
    """The C interface's number of 'float32', 'float16', 'bfloat16' or 'int8' (also as 'torch.bfloat16')."""
    code = DTYPES.get(str(name).removeprefix("torch."))
    if code is None:
        raise PluginsUsageError(f"dtype {name} is not supported; use one of {', '.join(DTYPES)}")
    return code


@dataclass(frozen=True)
class Library:
    """A loaded kernel library. Launchers raise KernelError; pure functions need no GPU."""

    path: Path
    handle: ctypes.CDLL

    @property
    def architectures(self) -> tuple[str, ...]:
        """What the library holds machine code for, as ('80', '90a')."""
        return tuple(self.handle.mxc_architectures().decode().split(","))

    def architecture_runs(self, compute_capability: int, architectures: tuple[str, ...] | None = None) -> bool:
        """Whether code for `architectures` (default: this library's) runs on compute capability 10 * major + minor."""
        names = ",".join(architectures or self.architectures)
        return bool(self.handle.mxc_architecture_runs(names.encode(), compute_capability))

    def check_device(self) -> None:
        """Raises KernelError where there is no GPU or none this library was built for."""
        self._check(self.handle.mxc_check_device())

    def plan_prefill(
        self, batch: int, tokens: int, heads: int, head_dim: int, sm_count: int, compute_capability: int
    ) -> LightningPlan:
        """The plan the launcher takes for these shapes on a GPU of `sm_count` multiprocessors."""
        plan = LightningPlan()
        arguments = (batch, tokens, heads, head_dim, sm_count, compute_capability)
        self._check(self.handle.mxc_lightning_plan_prefill(*arguments, ctypes.byref(plan)))
        return plan

    def lightning_workspace_bytes(self, plan: LightningPlan, batch: int, heads: int, head_dim: int) -> int:
        """Bytes of scratch that a prefill with this plan needs."""
        return int(self.handle.mxc_lightning_workspace_bytes(ctypes.byref(plan), batch, heads, head_dim))

    def lightning_prefill(self, params: LightningParams, plan: LightningPlan | None = None, stream: int = 0) -> None:
        """Starts a prefill of any number of tokens on `stream`. Without a plan the library makes its own."""
        chosen = None if plan is None else ctypes.byref(plan)
        self._check(self.handle.mxc_lightning_prefill(ctypes.byref(_sized(params)), chosen, stream))

    def lightning_decode(self, params: LightningParams, stream: int = 0) -> None:
        """Starts one decode step (one new token per sequence) on `stream`."""
        self._check(self.handle.mxc_lightning_decode(ctypes.byref(_sized(params)), stream))

    def moe_workspace_bytes(self, params: MoeParams) -> int:
        """Bytes of scratch for at most `params.tokens` tokens; only shapes and types are read."""
        count = int(self.handle.mxc_moe_workspace_bytes(ctypes.byref(_sized(params))))
        if count < 0:
            raise KernelError(self.last_error(), 1)
        return count

    def moe(self, params: MoeParams, stream: int = 0) -> None:
        """Starts router, experts and combine on `stream`."""
        self._check(self.handle.mxc_moe(ctypes.byref(_sized(params)), stream))

    def attention_workspace_bytes(self, head_dim: int) -> int:
        """Bytes of scratch that are enough for softmax attention of any size."""
        return int(self.handle.mxc_attention_max_workspace_bytes(head_dim))

    def softmax_attention(self, params: AttentionParams, stream: int = 0) -> None:
        """Starts attention over a cache with lengths on `stream`."""
        self._check(self.handle.mxc_softmax_attention(ctypes.byref(_sized(params)), stream))

    def last_error(self) -> str:
        """Text of this thread's last failure."""
        return str(self.handle.mxc_last_error().decode(errors="replace"))

    def _check(self, status: int) -> None:
        if status != 0:
            raise KernelError(self.last_error(), status)


_Params = LightningParams | MoeParams | AttentionParams


def _sized(params: _Params) -> _Params:
    params.struct_bytes = ctypes.sizeof(params)
    return params


def library_path(folder: Path | None = None, name: str = KERNELS_LIBRARY) -> Path:
    """Where the library is: `folder` or the default build folder. LibraryError where it is not built."""
    path = (folder or default_build_dir()) / name
    if not path.is_file():
        raise LibraryError(f"{path} does not exist; run `mxcompile plugins build` first")
    return path.resolve()


def load(folder: Path | None = None) -> Library:
    """Loads libmxcompile_kernels.so from `folder` (default: where `build` puts it), once per path. Needs no GPU."""
    return _load(library_path(folder))


@functools.cache
def _load(path: Path) -> Library:
    try:
        handle = ctypes.CDLL(str(path))
        found = int(handle.mxc_abi_version())
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} is not a library of this package: {error}") from error
    if found != ABI_VERSION:
        raise LibraryError(
            f"{path} has interface {found}, this package {ABI_VERSION}; run `mxcompile plugins build` again"
        )
    pointer = ctypes.c_void_p
    handle.mxc_last_error.restype = ctypes.c_char_p
    handle.mxc_architectures.restype = ctypes.c_char_p
    handle.mxc_architecture_runs.argtypes = [ctypes.c_char_p, _I32]
    handle.mxc_lightning_plan_prefill.argtypes = [_I32] * 6 + [pointer]
    handle.mxc_lightning_workspace_bytes.argtypes = [pointer, _I32, _I32, _I32]
    handle.mxc_lightning_workspace_bytes.restype = _I64
    handle.mxc_moe_workspace_bytes.argtypes = [pointer]
    handle.mxc_moe_workspace_bytes.restype = _I64
    handle.mxc_lightning_prefill.argtypes = [pointer, pointer, pointer]
    handle.mxc_lightning_decode.argtypes = [pointer, pointer]
    handle.mxc_moe.argtypes = [pointer, pointer]
    handle.mxc_attention_max_workspace_bytes.argtypes = [_I32]
    handle.mxc_attention_max_workspace_bytes.restype = _I64
    handle.mxc_softmax_attention.argtypes = [pointer, pointer]
    return Library(path, handle)
