"""GPUs by the names people use, and what an engine for each must be built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.errors import ENVIRONMENT, EngineError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. `capability`: CUDA compute capability times ten."""

    name: str
    capability: int
    targets: tuple[str, ...]


_RTX, _FULL = "tensorrt-rtx", "tensorrt"
# TensorRT-RTX 1.7 builds ahead of time for 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1, and not for Hopper.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h20", 90, (_FULL,)),
        Gpu("h100", 90, (_FULL,)),
        Gpu("h200", 90, (_FULL,)),
        Gpu("a100", 80, (_FULL, _RTX)),
        Gpu("rtx-3090", 86, (_FULL, _RTX)),
        Gpu("rtx-4090", 89, (_FULL, _RTX)),
        Gpu("l40s", 89, (_FULL, _RTX)),
        Gpu("rtx-5090", 120, (_FULL, _RTX)),
    )
}
DEFAULT_GPU = {_RTX: "rtx-4090", _FULL: "h20"}


def find_gpu(name: str | None, target: str) -> Gpu:
    """The GPU called `name` (default: the target's usual one). EngineError where the target cannot build for it."""
    chosen = GPUS.get(name or DEFAULT_GPU[target])
    if chosen is None:
        raise EngineError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}")
    if target not in chosen.targets:
        fitting = ", ".join(gpu.name for gpu in GPUS.values() if target in gpu.targets)
        raise EngineError(f"target {target} does not build for {chosen.name}; it builds for {fitting}")
    return chosen


def check_at_hand(gpu: Gpu, target: str, found: int | str) -> None:
    """EngineError (exit code 3) where a build needs the GPU itself and `found`, what `compute_capability` says, is none or another.

    TensorRT proper compiles for the GPU that it runs on; TensorRT-RTX needs none.
    """
    if target != _FULL or found == gpu.capability:
        return
    need = f"target {target} compiles on the GPU that the engine is for ({gpu.name}, compute capability {gpu.capability / 10:.1f})"
    if isinstance(found, str):
        raise EngineError(f"{need}; here is {found}: build there", exit_code=ENVIRONMENT)
    raise EngineError(
        f"{need}; here is one of {found / 10:.1f}: build there, or give the --gpu that goes with this one",
        exit_code=ENVIRONMENT,
    )


def aim_at(trt: Any, builder_config: Any, gpu: Gpu, target: str) -> None:
    """Make a builder of TensorRT-RTX compile for `gpu` whatever this machine has. TensorRT proper compiles for the GPU it runs on."""
    if target == _RTX:
        builder_config.num_compute_capabilities = 1
        builder_config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{gpu.capability}"), 0)
