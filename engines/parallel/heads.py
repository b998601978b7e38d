"""Which heads of the states each rank holds.

The configuration of an engine has the whole model's states; a rank's are a range of their heads. With more ranks than key/value
heads, neighbouring ranks hold the same head. Sets of ranks that share the tokens of a chunk all hold all heads; `join` and
`head_range` are about one set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engines.config import EngineConfig, RankFiles, StateTensor
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
    return replace(config, states=[_scaled(spec, ranks, rank % ranks) for spec in config.states])


def _scaled(spec: StateTensor, ranks: int, rank: int) -> StateTensor:
    batch, heads, *rest = spec.dims
    assert isinstance(heads, int)
    mine = head_range(heads, ranks, rank)
    return replace(spec, dims=[batch, mine.stop - mine.start, *rest])


def of_all_ranks(config: EngineConfig, files: list[RankFiles]) -> EngineConfig:
    """The other way: the configuration of the whole engine from one rank's, with the files of all."""
    states = [replace(spec, dims=_whole(spec, config.model)) for spec in config.states]
    dims = {name: spec.dims for spec in states for name in (spec.past, spec.present)}
    return replace(
        config,
        ranks=files,
        states=states,
        inputs=[replace(port, dims=dims.get(port.name, port.dims)) for port in config.inputs],
        outputs=[replace(port, dims=dims.get(port.name, port.dims)) for port in config.outputs],
    )


def _whole(spec: StateTensor, model: dict[str, Any]) -> list[int | str]:
    """Dimensions of a state of the whole model, from a rank's."""
    heads = model["num_attention_heads" if spec.kind == "lightning" else "num_key_value_heads"]
    return [spec.dims[0], heads, *spec.dims[2:]]


def join(parts: Sequence[np.ndarray], heads: int, axis: int) -> np.ndarray:
    """The whole state out of all ranks' parts along the axis of the heads; copies of a head are taken once."""
    ranks = len(parts)
    count = pieces(heads, ranks)
    return np.concatenate([parts[piece * ranks // count] for piece in range(count)], axis=axis)
