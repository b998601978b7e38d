"""What callers of sessions and states can get wrong, refused with the same words by all of them. Each raises EngineError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.config import EngineConfig
from engines.errors import EngineError
from engines.interface import RowSnapshot


def integers(values: Any) -> np.ndarray:
    """Token ids or lengths as an array; an empty one may have any type."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise EngineError("token ids must have as many tokens in each row; pad rows on the right") from None
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise EngineError(f"token ids and lengths must be integers, not {array.dtype}")
    return array


def prompt_rows(prompts: Sequence[Sequence[int]], batch_size: int) -> list[np.ndarray]:
    """The prompts as int64 arrays, one for each row."""
    if len(prompts) != batch_size:
        raise EngineError(f"{len(prompts)} prompts for a state of {batch_size} rows")
    return [integers(prompt).reshape(-1).astype(np.int64) for prompt in prompts]


def one_token_per_row(tokens_B: Any, batch_size: int) -> np.ndarray:
    """The tokens of one decode step."""
    tokens = integers(tokens_B)
    if tokens.shape != (batch_size,):
        raise EngineError(f"decode takes one token for each of the {batch_size} rows, not {tokens.shape}")
    return tokens


def batch_within(batch_size: int, largest: int) -> int:
    """`batch_size`, if the engine takes it."""
    if not 1 <= batch_size <= largest:
        raise EngineError(f"batch size {batch_size} is not within 1 and the engine's max_batch_size {largest}")
    return batch_size


def own(mine: bool) -> None:
    """Whether the session made the state."""
    if not mine:
        raise EngineError("the state was made by another session; make one with this session's new_state")


def existing(row: int, batch_size: int) -> int:
    """`row`, if the state has it."""
    if not 0 <= row < batch_size:
        raise EngineError(f"row {row} does not exist; the state has rows 0 to {batch_size - 1}")
    return row


def fitting(snapshot: RowSnapshot, config: EngineConfig) -> dict[str, dict[int, np.ndarray]]:
    """The snapshot's arrays by role and layer, if they are what the states of `config` take."""
    limit = config.limits.max_seq_len
    if not 0 <= snapshot.length <= limit:
        raise EngineError(f"the snapshot holds {snapshot.length} tokens, the engine's max_seq_len is {limit}")
    parts = {"recurrent_state": snapshot.recurrent, "key": snapshot.key, "value": snapshot.value}
    for spec in config.states:
        dims = [dim if isinstance(dim, int) else snapshot.length for dim in spec.dims[1:]]
        array = parts[spec.role].get(spec.layer)
        if array is None or list(array.shape) != dims:
            found = "none" if array is None else list(array.shape)
            raise EngineError(f"the snapshot's {spec.role} of layer {spec.layer} is {found}, this engine needs {dims}")
    return parts
