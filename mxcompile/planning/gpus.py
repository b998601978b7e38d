"""Figures of the GPUs that plans are made for, from the vendor's data sheets: dense rates, one GPU, SXM form."""

from __future__ import annotations

from dataclasses import dataclass

from mxcompile.errors import MxcompileError


@dataclass(frozen=True)
class Gpu:
    """One GPU. Decimal units throughout: 1 GB = 1e9 bytes."""

    key: str
    name: str
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes per second
    bf16: float  # dense tensor-core operations per second
    link: float  # NVLink, bytes per second out of one GPU

    @property
    def ridge(self) -> float:
        """Operations per byte above which bf16 arithmetic, not memory, is the limit."""
        return self.bf16 / self.bandwidth


GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu("h20", "H20 96 GB", 96e9, 4.0e12, 148e12, 450e9),
        Gpu("h100", "H100 80 GB", 80e9, 3.35e12, 989e12, 450e9),
        Gpu("h200", "H200 141 GB", 141e9, 4.8e12, 989e12, 450e9),
    )
}


def gpu(key: str) -> Gpu:
    """The GPU called `key`. Raises MxcompileError for an unknown one."""
    if key not in GPUS:
        raise MxcompileError(f"unknown GPU {key!r}; known: {', '.join(GPUS)}")
    return GPUS[key]
