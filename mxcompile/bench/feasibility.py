"""What a cell takes at least, and why a contestant cannot run it."""

from __future__ import annotations

from typing import Any

from engines.config import EngineConfig
from mxcompile.bench import estimate, memory, rates
from mxcompile.bench.options import BenchOptions
from mxcompile.bench.results import BenchReport

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def element_bytes(dtype: str) -> int:
    """Bytes of one number of a type."""
    return _ELEMENT_BYTES.get(dtype, 4)


class Feasibility:
    """Holds cells against the machine's rates, its memory, the limits of whoever runs them, and what was too slow before."""

    def __init__(self, config: EngineConfig, options: BenchOptions, report: BenchReport) -> None:
        self._config, self._options, self._report = config, options, report
        self._bounds: dict[tuple[str, int, int], dict[str, float] | None] = {}
        self._too_slow: dict[str, list[tuple[int, int]]] = {}

    def dtype(self, name: str) -> str:
        """Type that a contestant computes in."""
        return self._config.dtype if name == "engine" else self._options.dtype

    @property
    def bounded(self) -> bool:
        """Whether the machine's rates say anything about this engine."""
        return self._config.quantization is None and self._config.target == "onnxruntime"

    def bound(self, name: str, length: int, batch: int) -> dict[str, float] | None:
        """Least prefill_s and decode_s of a cell at the machine's best rates so far, or None where they say nothing about it."""
        best = self._report.best_rates()
        if best is None or not self.bounded:
            return None
        key = (name, length, batch)
        if key not in self._bounds:
            element = element_bytes(self.dtype(name))
            self._bounds[key] = rates.bound(self._config.model, element, best, length, batch, self._options.new_tokens)
        return self._bounds[key]

    def forget_bounds(self) -> None:
        """Compute them anew: the rates were measured again, and may be higher."""
        self._bounds.clear()

    def was_too_slow(self, name: str, length: int, batch: int) -> None:
        """Note that a round of this cell took longer than allowed; longer and wider ones are not tried then."""
        self._too_slow.setdefault(name, []).append((length, batch))

    def reason_against(self, name: str, ready: dict[str, Any], length: int, batch: int) -> str:
        """Why a contestant cannot run a cell, or nothing. `ready`: what it said of itself when it was loaded."""
        tokens = length + self._options.new_tokens
        longest, rows = ready["max_seq_len"], ready["max_batch_size"]
        if tokens > longest:
            return f"{length} and {self._options.new_tokens} new tokens exceed its max_seq_len {longest}"
        if batch > rows:
            return f"{batch} rows exceed its max_batch_size {rows}"
        return self._too_long(name, length, batch) or self._too_large(name, length, batch)

    def too_large_to_load(self, name: str) -> str:
        """Why a contestant cannot be loaded, or nothing."""
        need = memory.load_bytes(self._config.model, name, element_bytes(self.dtype(name)))
        return _beyond_memory(need, "loading takes about {need}")

    def _too_long(self, name: str, length: int, batch: int) -> str:
        limit = self._options.limit_s
        for slow_length, slow_batch in self._too_slow.get(name, ()):
            if length >= slow_length and batch >= slow_batch:
                return f"{slow_length} tokens x {slow_batch} already took more than {limit:g} s"
        bound = self.bound(name, length, batch)
        least = 0.0 if bound is None else estimate.least_seconds(bound, self._options.new_tokens)
        if least > limit:
            return f"a round takes at least {estimate.duration(least)} at this machine's rates, more than {limit:g} s"
        return ""

    def _too_large(self, name: str, length: int, batch: int) -> str:
        need = memory.cell_bytes(
            self._config.model,
            name,
            element_bytes(self.dtype(name)),
            self._config.limits.prefill_chunk,
            batch,
            length,
            self._options.new_tokens,
        )
        return _beyond_memory(need, "it takes about {need} beside the weights")


def _beyond_memory(need: int, sentence: str) -> str:
    free = memory.available_bytes()
    if free is None or need <= memory.ROOM * free:
        return ""
    return f"{sentence.format(need=f'{need / 2**30:.1f} GiB')}, {free / 2**30:.1f} GiB are available"
