"""Which of ONNX Runtime's execution providers runs an engine. CUDA has never been tried: see docs/status.md."""

from __future__ import annotations

import onnxruntime as ort

from engines.errors import ENVIRONMENT, EngineError

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
_CUDA_PROVIDER, _CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"


def providers(device: str) -> list[str]:
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
    return [_CUDA_PROVIDER, _CPU_PROVIDER]


def check_started(session: ort.InferenceSession, device: str) -> None:
    """ONNX Runtime goes on without a provider that does not start. EngineError (exit code 3) where that is the wanted one."""
    if device == CUDA and _CUDA_PROVIDER not in session.get_providers():
        raise EngineError(
            "ONNX Runtime's CUDA provider did not start; it needs an NVIDIA GPU with its driver, CUDA and cuDNN of the versions that "
            "onnxruntime-gpu names",
            exit_code=ENVIRONMENT,
        )
