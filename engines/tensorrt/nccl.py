"""The communicator of a rank, through which TensorRT exchanges values between GPUs. Has never run: see docs/tensorrt.md.

NCCL's C interface, three functions of it: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api/comms.html.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.errors import ENVIRONMENT, EngineError

LIBRARY = "libnccl.so.2"
ID_BYTES = 128  # NCCL_UNIQUE_ID_BYTES


class UniqueId(ctypes.Structure):
    """ncclUniqueId, passed by value."""

    _fields_ = (("internal", ctypes.c_ubyte * ID_BYTES),)


def load_nccl() -> ctypes.CDLL:
    """NCCL, from the wheel nvidia-nccl or the system; TensorRT then finds it under its name. EngineError (exit code 3) without it."""
    candidates = [LIBRARY]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        candidates.insert(0, str(Path(folder) / "nccl" / "lib" / LIBRARY))
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    raise EngineError(
        f"an engine of several ranks exchanges values through NCCL, and {LIBRARY} is not here; run `pip install nvidia-nccl-cu13`",
        exit_code=ENVIRONMENT,
    )


class Communicator:
    """One rank's communicator, on the GPU that is current. Making it waits for all ranks."""

    def __init__(self, rank: int, ranks: int, share: Callable[[bytes], bytes], library: Any = None) -> None:
        """`share`: hands rank 0's bytes to every rank."""
        self._library = library or load_nccl()
        unique = UniqueId()
        if rank == 0:
            self._call("ncclGetUniqueId", ctypes.byref(unique))
        ctypes.memmove(ctypes.byref(unique), share(bytes(unique.internal)), ID_BYTES)
        self._handle = ctypes.c_void_p()
        self._call("ncclCommInitRank", ctypes.byref(self._handle), ctypes.c_int(ranks), unique, ctypes.c_int(rank))

    def capsule(self) -> Any:
        """The communicator as IExecutionContext.set_communicator takes it."""
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return make(self._handle, b"ncclComm_t", None)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            self._library.ncclGetErrorString.restype = ctypes.c_char_p
            text = (self._library.ncclGetErrorString(status) or b"").decode(errors="replace")
            raise EngineError(f"{name} failed: {text or status}", exit_code=ENVIRONMENT)
