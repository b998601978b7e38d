"""What a benchmark measures, checked where it is written down."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mxcompile.errors import MxcompileError

BACKENDS = ("engine", "pytorch", "transformers")
DTYPES = ("float32", "bfloat16")  # that both pytorch and transformers run in


@dataclass(frozen=True)
class BenchOptions:
    """prompt_lengths: tokens. batch_sizes: rows. new_tokens: decoded behind every prompt. repeats: measured rounds of each cell, spread
    over `passes` (default: one round each) through all cells, each in new processes and after `warmup` rounds that are thrown away.
    threads: CPU threads of every contestant. limit_s: longest time of one round. dtype: of
    pytorch and transformers; the engine has its own.
    """

    prompt_lengths: tuple[int, ...] = (128, 1024, 8192, 65536)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    new_tokens: int = 64
    repeats: int = 5
    warmup: int = 1
    backends: tuple[str, ...] = ("engine",)
    dtype: str = "float32"
    threads: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))
    seed: int = 0
    limit_s: float = 600.0
    layer_times: bool = True
    passes: int = 0

    def __post_init__(self) -> None:
        for name, low in (("prompt_lengths", 1), ("batch_sizes", 1)):
            values = tuple(dict.fromkeys(getattr(self, name)))
            if not values or min(values) < low:
                raise MxcompileError(f"{name.replace('_', ' ')} must be at least {low}, not {list(values)}")
            object.__setattr__(self, name, tuple(sorted(values)))
        for name, low in (("new_tokens", 1), ("repeats", 1), ("warmup", 0), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise MxcompileError(f"{name.replace('_', ' ')} must be at least {low}, not {getattr(self, name)}")
        if self.passes < 0 or self.passes > self.repeats:
            raise MxcompileError(f"the {self.repeats} rounds cannot be spread over {self.passes} passes")
        object.__setattr__(self, "passes", self.passes or self.repeats)
        backends = tuple(dict.fromkeys(self.backends))
        unknown = [name for name in backends if name not in BACKENDS]
        if unknown or not backends:
            raise MxcompileError(f"the backends are {', '.join(BACKENDS)}, not {', '.join(unknown) or 'none'}")
        object.__setattr__(self, "backends", backends)
        if self.dtype not in DTYPES:
            raise MxcompileError(
                f"the dtype of pytorch and transformers must be one of {', '.join(DTYPES)}, not {self.dtype!r}"
            )
        if not self.limit_s > 0:
            raise MxcompileError(f"the time limit must be above 0 seconds, not {self.limit_s}")

    def rounds(self, number: int) -> int:
        """Measured rounds of pass `number`."""
        return self.repeats // self.passes + (number < self.repeats % self.passes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchOptions:
        """Inverse of `to_dict`. Raises TypeError for an unknown or missing key."""
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**plain)
