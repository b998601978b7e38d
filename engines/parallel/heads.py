"""Which heads of the states each rank holds.

The configuration of an engine has the whole model's states; a rank's are a range of their heads. With more ranks than key/value
heads, neighbouring ranks hold the same head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engines.config import EngineConfig, StateTensor
from engines.errors import EngineError


def pieces(heads: int, ranks: int) -> int:
    """Into how many different pieces `heads` heads are cut."""
    count = min(heads, ranks)
    if heads % count or ranks % count:
        raise EngineError(f"{heads} heads cannot be shared by {ranks} ranks; rebuild the engine")
    return count


def head_range(heads: int, ranks: int, rank: int) -> slice:
    """The heads that `rank` holds."""
    count = pieces(heads, ranks)
    piece, length = rank * count // ranks, heads // count
    return slice(piece * length, (piece + 1) * length)


def of_rank(config: EngineConfig, rank: int) -> EngineConfig:
    """The configuration as the rank's own session needs it: with the rank's heads."""
    ranks = config.mapping.tp_size
    return replace(config, states=[_scaled(spec, ranks, rank) for spec in config.states])


def _scaled(spec: StateTensor, ranks: int, rank: int) -> StateTensor:
    batch, heads, *rest = spec.dims
    assert isinstance(heads, int)
    mine = head_range(heads, ranks, rank)
    return replace(spec, dims=[batch, mine.stop - mine.start, *rest])


def join(parts: Sequence[np.ndarray], heads: int, axis: int) -> np.ndarray:
    """The whole state out of all ranks' parts along the axis of the heads; copies of a head are taken once."""
    ranks = len(parts)
    count = pieces(heads, ranks)
    return np.concatenate([parts[piece * ranks // count] for piece in range(count)], axis=axis)
