"""State buffers of an ONNX Runtime session, read and written by the graph in place.

Every state lives in one numpy array that is bound both as the past input and as the present output. Rows are
the outermost axis, so any run of rows is a contiguous view and can be bound alone.

Shape suffixes: B batch rows, T new tokens, S cache capacity, G kv heads, H heads, K and V head dims.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnxruntime as ort

from engines import checks
from engines.config import EngineConfig, StateTensor
from engines.errors import EngineError
from engines.interface import RowSnapshot, check_start
from engines.onnxruntime.vision import image_width
from engines.vision.placed import PlacedImages

FIRST_CAPACITY = 256
Rows = tuple[int, int]


class OrtState:
    """What `batch_size` sequences remember; made by `OrtSession.new_state`. See `engines.interface.State`."""

    def __init__(self, config: EngineConfig, batch_size: int) -> None:
        self.config = config
        self._lengths = np.zeros(batch_size, np.int64)
        self._capacity = min(FIRST_CAPACITY, self.capacity_limit)
        self._buffers = {spec.past: self._allocate(spec) for spec in config.states}
        self._values: dict[Rows, dict[str, ort.OrtValue]] = {}
        # Prepared single-token steps by rows, kept by the session; dropped when a buffer moves.
        self.steps: dict[Rows, object] = {}
        self.images = PlacedImages(image_width(config))

    def _allocate(self, spec: StateTensor) -> np.ndarray:
        known = {"batch": self.batch_size, "capacity": self._capacity}
        # np.zeros maps zero pages: capacity that no row has reached costs no memory.
        return np.zeros([dim if isinstance(dim, int) else known[dim] for dim in spec.dims], np.dtype(spec.dtype))

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        view = self._lengths.view()
        view.flags.writeable = False
        return view

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def capacity_limit(self) -> int:
        """One more than the longest row: an idle row at its limit still gets a key written behind its end.

        Ranks that share a chunk's tokens pad it to a multiple of their number, and write that much behind the end.
        """
        return self.config.limits.max_seq_len + self.config.mapping.cp_size

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values()) + self.images.nbytes

    def buffer_address(self, layer: int, role: str = "recurrent_state") -> int:
        """Address of a state's first byte, to prove that steps work in place."""
        return self._buffer(layer, role).ctypes.data

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens; at least doubles, never beyond the limit."""
        if tokens <= self._capacity:
            return
        if tokens > self.capacity_limit:
            raise EngineError(
                f"a row of {tokens} tokens exceeds the engine's max_seq_len {self.config.limits.max_seq_len}"
            )
        self._capacity = min(max(tokens, 2 * self._capacity), self.capacity_limit)
        used = int(self._lengths.max(initial=0))
        for spec in self.config.states:
            if spec.kind == "softmax":
                old = self._buffers.pop(spec.past)
                new = self._allocate(spec)
                new[:, :, :used] = old[:, :, :used]
                self._buffers[spec.past] = new
        self._values.clear()
        self.steps.clear()

    def values(self, rows: Rows) -> dict[str, ort.OrtValue]:
        """Per state input name, the runtime's view of `rows` (first, end) of its buffer; no copy."""
        if rows not in self._values:
            self._values[rows] = {
                name: ort.OrtValue.ortvalue_from_numpy(buffer[rows[0] : rows[1]])
                for name, buffer in self._buffers.items()
            }
        return self._values[rows]

    def advance(self, rows: Rows, new_lengths: np.ndarray) -> None:
        """Record that `new_lengths` tokens were added to `rows`."""
        self._lengths[rows[0] : rows[1]] += new_lengths
        if self.images:
            self.images.passed(self._lengths)

    def place_images(self, row: int, positions_n: np.ndarray, features_nD: np.ndarray) -> None:
        """See `engines.interface.ImageState`."""
        row = self._row(row)
        self.images.put(row, positions_n, features_nD, int(self._lengths[row]))

    def recurrent(self, layer: int) -> np.ndarray:
        return self._buffer(layer, "recurrent_state").copy()

    def key(self, layer: int) -> np.ndarray:
        return self._cache(layer, "key")

    def value(self, layer: int) -> np.ndarray:
        return self._cache(layer, "value")

    def read_row(self, row: int, start: int = 0) -> RowSnapshot:
        row = self._row(row)
        length = int(self._lengths[row])
        check_start(start, length)
        parts: dict[str, dict[int, np.ndarray]] = {"recurrent_state": {}, "key": {}, "value": {}}
        for spec in self.config.states:
            buffer = self._buffers[spec.past][row]
            parts[spec.role][spec.layer] = (buffer if spec.kind == "lightning" else buffer[:, start:length]).copy()
        return RowSnapshot(length, parts["recurrent_state"], parts["key"], parts["value"])

    def write_row(self, row: int, snapshot: RowSnapshot) -> None:
        row = self._row(row)
        parts = checks.fitting(snapshot, self.config)
        self.reserve(snapshot.length)
        self.images.drop(row)
        for spec in self.config.states:
            target = self._buffers[spec.past][row]
            (target if spec.kind == "lightning" else target[:, : snapshot.length])[...] = parts[spec.role][spec.layer]
        self._lengths[row] = snapshot.length

    def clear_row(self, row: int) -> None:
        row = self._row(row)
        for spec in self.config.states:
            if spec.kind == "lightning":  # what a cache holds beyond a row's length is never read
                self._buffers[spec.past][row] = 0
        self._lengths[row] = 0
        self.images.drop(row)

    def _row(self, row: int) -> int:
        return checks.existing(row, self.batch_size)

    def _buffer(self, layer: int, role: str) -> np.ndarray:
        for spec in self._of_layer(layer):
            if spec.role == role:
                return self._buffers[spec.past]
        raise EngineError(f"layer {layer} has no {role} in this engine")

    def _of_layer(self, layer: int) -> Iterable[StateTensor]:
        return (spec for spec in self.config.states if spec.layer == layer)

    def _cache(self, layer: int, role: str) -> np.ndarray:
        out = self._buffer(layer, role)[:, :, : int(self._lengths.max(initial=0))].copy()
        for row, length in enumerate(self._lengths):
            out[row, :, length:] = 0
        return out
