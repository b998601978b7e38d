"""The CUDA runtime as a session needs it: memory, copies, one stream, graphs. Has never run: see docs/tensorrt.md.

Needs `cuda.bindings` (Python package cuda-bindings). Tests put a device of host memory in its place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from engines.errors import ENVIRONMENT, EngineError

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


def compute_capability(ordinal: int = 0) -> int | str:
    """Ten times the compute capability of a GPU, or why there is none. `ordinal`: 0 is the first."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
        return "no NVIDIA GPU" if ordinal == 0 else f"no GPU {ordinal}"
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return 10 * major.value + minor.value


class CudaDevice:
    """One GPU, current in the thread that makes this. Addresses are device addresses; everything is ordered on `stream`."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise EngineError(
                f"running TensorRT engines needs cuda.bindings ({error}); run `pip install cuda-bindings`",
                exit_code=ENVIRONMENT,
            ) from error
        self._cuda = runtime
        self._call("cudaSetDevice", ordinal)
        self.stream = int(self._call("cudaStreamCreate"))

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(status)
            raise EngineError(f"{name} failed: {text.decode(errors='replace')}", exit_code=ENVIRONMENT)
        return results[0] if results else None

    def allocate(self, nbytes: int) -> int:
        """Address of new memory, zeroed. EngineError with the numbers where there is not enough."""
        free, _total = self.free_memory()
        if nbytes > free:
            raise EngineError(
                f"out of GPU memory: {nbytes / 2**30:.2f} GiB more are needed, {free / 2**30:.2f} GiB are free; "
                "use a smaller batch or build with a smaller --max-seq-len",
                exit_code=ENVIRONMENT,
            )
        address = int(self._call("cudaMalloc", max(nbytes, 1)))
        self.zero(address, nbytes)
        return address

    def free_memory(self) -> tuple[int, int]:
        """Bytes that are free, and all there are."""
        status, free, total = self._cuda.cudaMemGetInfo()
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise EngineError("cudaMemGetInfo failed", exit_code=ENVIRONMENT)
        return int(free), int(total)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def zero(self, address: int, nbytes: int) -> None:
        self._call("cudaMemsetAsync", address, 0, nbytes, self.stream)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a C-contiguous array to the device. Returns when the array may be changed."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)
        self.synchronize()

    def download(self, array: np.ndarray, address: int) -> None:
        """Fill a C-contiguous array from the device. Returns when it is there."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """A graph of what `enqueue` puts on the stream, which is not run."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            enqueue()
        finally:
            graph = self._call("cudaStreamEndCapture", self.stream)
        made = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        return made

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def release(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)
