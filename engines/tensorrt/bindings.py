"""Shapes, sizes and addresses of everything a step binds. Pure: no GPU, no TensorRT.

Shape suffixes: B batch rows, T new tokens, P positions with logits, N vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np

from engines.config import EngineConfig, StateTensor
from engines.tensorrt.profiles import DECODE, PREFILL

Rows = tuple[int, int]


@dataclass(frozen=True)
class StateLayout:
    """One state buffer of `batch` rows: rows are outermost, so any run of rows is one contiguous piece."""

    spec: StateTensor
    row_dims: tuple[int, ...]

    @classmethod
    def of(cls, spec: StateTensor, capacity: int) -> StateLayout:
        return cls(spec, tuple(dim if isinstance(dim, int) else capacity for dim in spec.dims[1:]))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.spec.dtype)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_dims) * self.dtype.itemsize


def layouts(config: EngineConfig) -> list[StateLayout]:
    """Of all states, with the capacity that the engine was built for."""
    return [StateLayout.of(spec, int(config.options["capacity"])) for spec in config.states]


@dataclass(frozen=True)
class StepShapes:
    """One enqueue: `profile` is the optimization profile that takes it."""

    rows: Rows
    tokens: int
    positions: int

    @property
    def batch(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def profile(self) -> int:
        return DECODE if self.tokens == 1 and self.positions == 1 else PREFILL

    def of_inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the token inputs."""
        return {
            "input_ids": (self.batch, self.tokens),
            "new_lengths": (self.batch,),
            "past_lengths": (self.batch,),
            "logit_positions": (self.batch, self.positions),
        }

    def of_states(self, all_layouts: list[StateLayout]) -> dict[str, tuple[int, ...]]:
        """Shapes of the state inputs."""
        return {layout.spec.past: (self.batch, *layout.row_dims) for layout in all_layouts}

    def logits_bytes(self, vocab_size: int) -> int:
        """fp32 [B, P, N]."""
        return self.batch * self.positions * vocab_size * 4
