"""What a session of ONNX Runtime's CUDA provider keeps on the device: weights and states. Has never run on a GPU: see docs/status.md.

ONNX Runtime refuses weights in host memory for nodes on a GPU and would look for their bytes in the graph's own file; and states in
host memory would travel to the GPU and back in every step. Needs cuda-bindings, for copies to and from addresses.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np
import onnxruntime as ort
from onnxruntime.capi import _pybind_state

from engines.config import EngineConfig
from engines.interface import RowSnapshot
from engines.onnxruntime.vision import image_width
from engines.tensorrt.bindings import Rows
from engines.tensorrt.device import CudaDevice
from engines.tensorrt.state import TrtState
from engines.vision.placed import PlacedImages

NAME, ORDINAL = "cuda", 0
# onnx.TensorProto.DataType of what weights and states can be.
ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


def open_device() -> CudaDevice:
    """The first GPU. EngineError (exit code 3) without cuda-bindings or a GPU."""
    # Else ONNX Runtime's allocator doubles what it takes each time, up to twice the size of all weights.
    _pybind_state.set_arena_extend_strategy(_pybind_state.ArenaExtendStrategy.kSameAsRequested)
    return CudaDevice(ORDINAL)


def upload(device: Any, array: np.ndarray) -> ort.OrtValue:
    """A copy of a weight on the device, as the runtime takes it."""
    kind = ONNX_TYPES[array.dtype.name]
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), kind, NAME, ORDINAL)
    if array.nbytes:
        device.upload(value.data_ptr(), np.ascontiguousarray(array))
    return ort.OrtValue.from_dlpack(value)


class DeviceState(TrtState):
    """What `batch_size` sequences remember, on the device; made by `OrtSession.new_state`. See `engines.interface.State`.

    The caches have the engine's full capacity from the start. What a state does to its buffers is in order on the device's own stream, so
    the session waits for that before it runs a graph.
    """

    def __init__(self, config: EngineConfig, device: Any, batch_size: int) -> None:
        super().__init__(config, device, batch_size)
        # Prepared single-token steps by rows, kept by the session.
        self.steps: dict[Rows, object] = {}
        self.images = PlacedImages(image_width(config))

    def bind(self, binding: ort.IOBinding, rows: Rows) -> None:
        """Bind the part of each state's buffer that holds `rows` as both its input and its output."""
        for layout, (past, present, address) in zip(self.layouts, self.addresses(rows), strict=True):
            where = (NAME, ORDINAL, ONNX_TYPES[layout.dtype.name], [rows[1] - rows[0], *layout.row_dims], address)
            binding.bind_input(past, *where)
            binding.bind_output(present, *where)

    def advance(self, rows: Rows, new_lengths: np.ndarray) -> None:
        super().advance(rows, new_lengths)
        if self.images:
            self.images.passed(self._lengths)

    def place_images(self, row: int, positions_n: np.ndarray, features_nD: np.ndarray) -> None:
        """See `engines.interface.ImageState`."""
        row = self._row(row)
        self.images.put(row, positions_n, features_nD, int(self._lengths[row]))

    def write_row(self, row: int, snapshot: RowSnapshot) -> None:
        super().write_row(row, snapshot)
        self.images.drop(row)

    def clear_row(self, row: int) -> None:
        super().clear_row(row)
        self.images.drop(row)
