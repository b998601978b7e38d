"""Pieces of a graph run one after the other with exchanges between them, behind the part of `onnxruntime.InferenceSession`
that `engines.onnxruntime.session` uses.

The first run of a binding lets the runtime allocate what crosses from piece to piece; later runs of the same binding, whose shapes
are the same, reuse those buffers and bind nothing anew: that is what makes single-token steps cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.parallel.exchange import Exchanger
from engines.parallel.pieces import Exchange, Piece


@dataclass(frozen=True)
class LoadedPiece:
    """A piece and its session; None for a piece without nodes."""

    piece: Piece
    session: ort.InferenceSession | None


_Maker = Callable[[LoadedPiece, dict[str, ort.OrtValue]], Callable[[], None] | None]


class PiecewiseSession:
    """All pieces of one rank. `tick` is called after every piece and exchange, to show that the rank is alive.

    `segments`: how many ranks share the tokens of a run, if they do; a run then has a multiple of as many tokens.
    """

    def __init__(
        self, pieces: Sequence[LoadedPiece], exchanger: Exchanger, tick: Callable[[], None], segments: int = 1
    ) -> None:
        self.pieces, self.tick, self.segments = pieces, tick, segments
        exchanges = [loaded.piece.exchange for loaded in pieces]
        self._exchangers = {tuple(e.group): exchanger.of(e.group) for e in exchanges if e is not None}

    def exchanger(self, exchange: Exchange) -> Exchanger:
        """Among the ranks that take part."""
        return self._exchangers[tuple(exchange.group)]

    def io_binding(self) -> PiecewiseBinding:
        """An empty binding."""
        return PiecewiseBinding(self)

    def run_with_iobinding(self, binding: PiecewiseBinding) -> None:
        """One step."""
        binding.run()


class PiecewiseBinding:
    """Inputs and outputs of a step, by name, as `onnxruntime.IOBinding`."""

    def __init__(self, owner: PiecewiseSession) -> None:
        self._owner = owner
        self._inputs: dict[str, ort.OrtValue] = {}
        self._outputs: dict[str, ort.OrtValue | None] = {}  # None: allocated by the runtime
        self._kept: list[np.ndarray] = []  # arrays whose memory the runtime uses
        self._sizes: dict[str, int] = {}
        self._made: dict[str, ort.OrtValue] = {}
        self._steps: list[Callable[[], None]] = []

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        """`array` is read at every run; its memory is used as it is."""
        self._inputs[name] = self._value(array)
        if name == "input_ids":
            batch, tokens = array.shape
            self._sizes |= {"batch": batch, "tokens": tokens, "segment": tokens // self._owner.segments}
        if name == "logit_positions":
            self._sizes["positions"] = array.shape[1]

    def bind_ortvalue_input(self, name: str, value: ort.OrtValue) -> None:
        self._inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: ort.OrtValue) -> None:
        self._outputs[name] = value

    def bind_output(self, name: str, device: str) -> None:
        self._outputs[name] = None

    def get_outputs(self) -> list[ort.OrtValue]:
        """All outputs in the order in which they were bound."""
        return [value if value is not None else self._made[name] for name, value in self._outputs.items()]

    def run(self) -> None:
        """One step: the first one prepares the steps of those that follow."""
        if self._steps:
            for again in self._steps:
                again()
                self._owner.tick()
            return
        values = dict(self._inputs)
        for loaded in self._owner.pieces:
            makers: tuple[_Maker, ...] = (self._run_piece, self._run_exchange)
            for make in makers:
                step = make(loaded, values)
                if step is not None:
                    self._steps.append(step)
                    self._owner.tick()

    def _run_piece(self, loaded: LoadedPiece, values: dict[str, ort.OrtValue]) -> Callable[[], None] | None:
        piece, session = loaded.piece, loaded.session
        if session is None:
            return None
        binding = session.io_binding()
        for name in piece.inputs:
            binding.bind_ortvalue_input(name, values[name])
        targets: dict[str, ort.OrtValue | None] = {name: self._outputs.get(name) for name in piece.outputs}
        if piece.exchange is not None and piece.exchange.source in targets:
            array = np.empty(self._shape(piece.exchange), np.float32)
            if array.size:
                targets[piece.exchange.source] = self._value(array)
        for name, value in targets.items():
            if value is None:
                binding.bind_output(name, "cpu")
            else:
                binding.bind_ortvalue_output(name, value)
        session.run_with_iobinding(binding)
        allocated = False
        for (name, value), found in zip(targets.items(), binding.get_outputs(), strict=True):
            values[name] = found if value is None else value
            allocated |= value is None
            if name in self._outputs:
                self._made[name] = values[name]
        if allocated:
            binding.clear_binding_outputs()
            for name in targets:
                binding.bind_ortvalue_output(name, values[name])
        return lambda: session.run_with_iobinding(binding)

    def _run_exchange(self, loaded: LoadedPiece, values: dict[str, ort.OrtValue]) -> Callable[[], None] | None:
        exchange = loaded.piece.exchange
        if exchange is None:
            return None
        shape, exchanger = self._shape(exchange), self._owner.exchanger(exchange)
        if exchange.operation == "all_gather":
            gathered = np.zeros((shape[0] * exchanger.ranks, *shape[1:]), np.float32)
            part = self._array(values[exchange.source], shape)
            values[exchange.result] = self._value(gathered)
            return _ran(lambda: exchanger.all_gather(part, gathered)) if gathered.size else None
        array = self._array(values[exchange.source], shape)
        values[exchange.result] = self._value(array)
        return _ran(lambda: exchanger.all_reduce(array)) if array.size else None

    def _shape(self, exchange: Exchange) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else self._sizes[dim] for dim in exchange.dims)

    def _array(self, value: ort.OrtValue, shape: tuple[int, ...]) -> np.ndarray:
        """The array whose memory `value` uses."""
        address = value.data_ptr()
        for array in reversed(self._kept):
            if array.ctypes.data == address and array.shape == shape:
                return array
        if 0 in shape:
            return np.empty(shape, np.float32)
        raise RuntimeError("an exchanged value does not lie in a buffer of the binding")

    def _value(self, array: np.ndarray) -> ort.OrtValue:
        self._kept.append(array)
        return ort.OrtValue.ortvalue_from_numpy(array)


def _ran(step: Callable[[], Any]) -> Callable[[], Any]:
    step()
    return step
