"""A device of host memory, and an engine on it that evaluates the lowered graph: what a session does can then be seen without a GPU.

The context is as strict as TensorRT where it matters: shapes must fit the profile, every tensor must be bound to allocated memory, a
state's input and output must be one address, and a captured graph keeps the addresses and shapes it was captured with.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401
import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from reference_ops import NEW_OPS

from engines.pieces import Piece
from engines.weights import StoredWeight, WeightRecord

Recording = list[Callable[[], None]]


class HostDevice:
    """Stands in for `engines.tensorrt.device.CudaDevice`."""

    stream = 1

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.recording: Recording | None = None
        self.launches = self.released = 0

    def allocate(self, nbytes: int) -> int:
        block = np.zeros(max(nbytes, 1), np.uint8)
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        del self.blocks[address]

    def _inside(self, address: int, nbytes: int) -> None:
        assert any(a <= address and address + nbytes <= a + len(b) for a, b in self.blocks.items()), (
            "outside all memory"
        )

    def zero(self, address: int, nbytes: int) -> None:
        self._inside(address, nbytes)
        ctypes.memset(address, 0, nbytes)

    def upload(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        assert self.recording is None, "a copy of pageable memory inside a capture"
        self._inside(address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous
        self._inside(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def read(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = np.empty(shape, dtype)
        self.download(array, address)
        return array

    def write(self, address: int, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self._inside(address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def synchronize(self) -> None:
        """Nothing is asynchronous here."""

    def capture(self, enqueue: Callable[[], None]) -> Recording:
        self.recording = []
        enqueue()
        captured, self.recording = self.recording, None
        return captured

    def launch(self, graph: Recording) -> None:
        self.launches += 1
        for work in graph:
            work()

    def release(self, graph: Recording) -> None:
        graph.clear()
        self.released += 1


class HostEngine:
    """Stands in for TensorRT's ICudaEngine."""

    def __init__(self, device: HostDevice, graph: ir.Model, batch: int, chunk: int, positions: int) -> None:
        self.device, self.batch = device, batch
        self.limits = [(1, 1), (chunk, positions)]
        self.types = {value.name: value.dtype.numpy() for value in graph.graph.inputs}
        self.dims = {value.name: list(value.shape) for value in graph.graph.inputs}
        self.evaluator = ReferenceEvaluator(ir.to_proto(graph), new_ops=NEW_OPS)

    def create_execution_context(self) -> HostContext:
        return HostContext(self)


class HostContext:
    """Stands in for TensorRT's IExecutionContext."""

    def __init__(self, engine: HostEngine) -> None:
        self.engine, self.profile = engine, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, dims: tuple[int, ...]) -> bool:
        tokens, positions = self.engine.limits[self.profile]
        most = {"batch": self.engine.batch, "tokens": tokens, "positions": positions}
        for dim, wanted in zip(dims, self.engine.dims[name], strict=True):
            if not (dim == wanted if isinstance(wanted, int) else 1 <= dim <= most[wanted.value]):
                return False
        self.shapes[name] = dims
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_communicator(self, communicator: Any) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses, device = dict(self.shapes), dict(self.addresses), self.engine.device
        for name in shapes:
            if name.startswith("past_key_values"):
                assert addresses[name] == addresses[name.replace("past_key_values", "present")], "not in place"

        def work() -> None:
            feeds: dict[str, Any] = {}
            for name, dtype in self.engine.types.items():
                dims = shapes.get(name) or tuple(self.engine.dims[name])
                feeds[name] = device.read(addresses[name], dims, np.dtype(dtype))
            names = self.engine.evaluator.output_names
            for name, array in zip(names, self.engine.evaluator.run(None, feeds), strict=True):
                assert math.prod(array.shape)
                device.write(addresses[name], array)

        if device.recording is not None:
            device.recording.append(work)
        else:
            work()
        return True


def in_memory(name: str, array: np.ndarray) -> StoredWeight:
    """A weight as if it were a file's."""
    record = WeightRecord(name, array.dtype.name, list(array.shape), array.nbytes, (Piece.run(0, 0, array.nbytes),))
    return StoredWeight(record, [np.ascontiguousarray(array).reshape(-1).view(np.uint8)])
