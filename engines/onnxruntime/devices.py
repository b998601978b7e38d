"""Which of ONNX Runtime's execution providers runs an engine. CUDA has never been tried: see docs/status.md."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import onnxruntime as ort

from engines.errors import ENVIRONMENT, EngineError

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
_CUDA_PROVIDER, _CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"


# In the order in which they need one another; the last three are for operators that our graphs have not.
_LIBRARIES = (
    "libcudart.so.1*",
    "libcublasLt.so.1*",
    "libcublas.so.1*",
    "libcurand.so.10",
    "libnvrtc.so.1*",
    "libcufft.so.1*",
    "libcudnn.so.9",
)
# TF32 would round float32 products to 10 bits. The memory pool grows by what is asked for, not by powers of two.
CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


def providers(device: str) -> list[Any]:
    """The providers to open a graph with, the wanted one first. Operators that CUDA has no kernel for run on the CPU.

    EngineError: unknown device; with exit code 3 where this ONNX Runtime has no CUDA provider.
    """
    if device not in DEVICES:
        raise EngineError(f"unknown device {device!r}; known: {', '.join(DEVICES)}")
    if device == CPU:
        return [_CPU_PROVIDER]
    if _CUDA_PROVIDER not in ort.get_available_providers():
        raise EngineError(
            f"onnxruntime {ort.__version__} here has no CUDA provider; install onnxruntime-gpu in its place, or build with --device cpu",
            exit_code=ENVIRONMENT,
        )
    preload()
    return [(_CUDA_PROVIDER, dict(CUDA_OPTIONS)), _CPU_PROVIDER]


def preload() -> None:
    """Load the CUDA libraries of NVIDIA's Python packages, if they are installed: the provider finds loaded ones by their names, wherever
    they and onnxruntime lie. ONNX Runtime's own `preload_dlls` looks only beside itself, and prints what it does not find.
    """
    spec = importlib.util.find_spec("nvidia")
    for name in _LIBRARIES:
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for path in sorted(Path(folder).glob(f"*/lib/{name}")):
                with contextlib.suppress(OSError):  # the provider says what it lacks
                    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def check_started(session: ort.InferenceSession, device: str) -> None:
    """ONNX Runtime goes on without a provider that does not start. EngineError (exit code 3) where that is the wanted one."""
    if device == CUDA and _CUDA_PROVIDER not in session.get_providers():
        raise EngineError(
            "ONNX Runtime's CUDA provider did not start; it needs an NVIDIA GPU with its driver, CUDA and cuDNN of the versions that "
            "onnxruntime-gpu names",
            exit_code=ENVIRONMENT,
        )
