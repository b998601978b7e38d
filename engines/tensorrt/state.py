"""States of a TensorRT session: device buffers that every step reads and writes in place.

Past input and present output of a state are bound to one address. Caches have the engine's full capacity from the start.

Shape suffixes: B batch rows, S capacity, G kv heads, H heads, K and V head dims.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from engines import checks
from engines.config import EngineConfig
from engines.errors import EngineError
from engines.interface import RowSnapshot, check_start
from engines.tensorrt.bindings import Rows, StateLayout, layouts


class TrtState:
    """What `batch_size` sequences remember; made by `TrtSession.new_state`. See `engines.interface.State`."""

    def __init__(self, config: EngineConfig, device: Any, batch_size: int) -> None:
        self.config = config
        self.layouts = layouts(config)
        self._device = device
        self._lengths = np.zeros(batch_size, np.int64)
        self._buffers: dict[str, int] = {}
        self._freed = weakref.finalize(self, _free, device, self._buffers)
        for layout in self.layouts:
            self._buffers[layout.spec.past] = device.allocate(batch_size * layout.row_bytes)

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
        return int(self.config.options["capacity"])

    @property
    def nbytes(self) -> int:
        return self.batch_size * sum(layout.row_bytes for layout in self.layouts)

    def reserve(self, tokens: int) -> None:
        """Nothing to do below the engine's limit: the buffers have its capacity. EngineError above."""
        if tokens > self.capacity:
            raise EngineError(
                f"a row of {tokens} tokens exceeds the engine's max_seq_len {self.config.limits.max_seq_len}"
            )

    def advance(self, rows: Rows, new_lengths: np.ndarray) -> None:
        """Record that `new_lengths` tokens were added to `rows`."""
        self._lengths[rows[0] : rows[1]] += new_lengths

    def addresses(self, rows: Rows) -> Iterator[tuple[str, str, int]]:
        """Of each state: its input, its output, and where `rows` begin."""
        for layout in self.layouts:
            spec = layout.spec
            yield spec.past, spec.present, self._buffers[spec.past] + rows[0] * layout.row_bytes

    def recurrent(self, layer: int) -> np.ndarray:
        layout = self._layout(layer, "recurrent_state")
        return np.stack([self._read(layout, row) for row in range(self.batch_size)])

    def key(self, layer: int) -> np.ndarray:
        return self._cache(layer, "key")

    def value(self, layer: int) -> np.ndarray:
        return self._cache(layer, "value")

    def read_row(self, row: int, start: int = 0) -> RowSnapshot:
        row = self._row(row)
        check_start(start, int(self._lengths[row]))
        parts: dict[str, dict[int, np.ndarray]] = {"recurrent_state": {}, "key": {}, "value": {}}
        for layout in self.layouts:
            parts[layout.spec.role][layout.spec.layer] = self._read(layout, row, start)
        return RowSnapshot(int(self._lengths[row]), parts["recurrent_state"], parts["key"], parts["value"])

    def write_row(self, row: int, snapshot: RowSnapshot) -> None:
        row = self._row(row)
        parts = checks.fitting(snapshot, self.config)
        for layout in self.layouts:
            array = parts[layout.spec.role][layout.spec.layer].astype(layout.dtype)
            for head, address in enumerate(self._heads(layout, row)):
                self._device.upload(address, np.ascontiguousarray(array[head]))
        self._lengths[row] = snapshot.length

    def clear_row(self, row: int) -> None:
        row = self._row(row)
        for layout in self.layouts:
            if layout.spec.kind == "lightning":  # what a cache holds beyond a row's length is never read
                address = self._buffers[layout.spec.past] + row * layout.row_bytes
                self._device.zero(address, layout.row_bytes)
        self._lengths[row] = 0

    def _heads(self, layout: StateLayout, row: int) -> list[int]:
        """Where each head of a row begins; a head's positions are contiguous."""
        heads = layout.row_dims[0]
        start = self._buffers[layout.spec.past] + row * layout.row_bytes
        return [start + head * (layout.row_bytes // heads) for head in range(heads)]

    def _read(self, layout: StateLayout, row: int, start: int = 0) -> np.ndarray:
        """A row's valid part, float32; of keys and values that from token `start` on."""
        dims, skipped = layout.row_dims, 0
        if layout.spec.kind == "softmax":
            dims = (dims[0], int(self._lengths[row]) - start, dims[2])
            skipped = start * dims[2] * np.dtype(layout.dtype).itemsize
        found = np.empty(dims, layout.dtype)
        for head, address in enumerate(self._heads(layout, row)):
            self._device.download(found[head], address + skipped)
        return found.astype(np.float32)

    def _cache(self, layer: int, role: str) -> np.ndarray:
        layout = self._layout(layer, role)
        heads, _, channels = layout.row_dims
        out = np.zeros((self.batch_size, heads, int(self._lengths.max(initial=0)), channels), np.float32)
        for row, length in enumerate(self._lengths):
            out[row, :, :length] = self._read(layout, row)
        return out

    def _layout(self, layer: int, role: str) -> StateLayout:
        for layout in self.layouts:
            if layout.spec.layer == layer and layout.spec.role == role:
                return layout
        raise EngineError(f"layer {layer} has no {role} in this engine")

    def _row(self, row: int) -> int:
        return checks.existing(row, self.batch_size)


def _free(device: Any, buffers: dict[str, int]) -> None:
    for address in buffers.values():
        device.free(address)
