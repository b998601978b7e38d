"""Cut one step over ragged rows into the runs that ONNX Runtime's kernels take.

The attention kernel takes several new tokens onto a past for one row at a time only, but single tokens, and
prompts without a past, for many rows at once. Running a row alone also spends nothing on padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_TOKENS = 4096  # of one run, padding included: bounds the memory for activations
MAX_PADDING = 0.25  # share of padding up to which rows run together rather than one by one


@dataclass(frozen=True)
class Run:
    """Rows first .. end - 1 with `tokens` new tokens each, padding included."""

    first: int
    end: int
    tokens: int


def plan(new_lengths_B: np.ndarray, past_lengths_B: np.ndarray) -> list[Run]:
    """Runs that together advance every row by its new length; rows without new tokens are left out, or idle.

    Single tokens (no row has more): one run from the first to the last active row; idle rows between are padding.
    Otherwise neighbouring rows without a past share a run while that keeps padding small; other rows run alone.
    """
    active = np.flatnonzero(new_lengths_B)
    if not len(active):
        return []
    if new_lengths_B.max() == 1:
        return [Run(int(active[0]), int(active[-1]) + 1, 1)]
    runs: list[Run] = []
    lengths = [int(n) for n in new_lengths_B]
    row = 0
    while row < len(lengths):
        end = row + 1
        if lengths[row] and past_lengths_B[row] == 0:
            while end < len(lengths) and lengths[end] and past_lengths_B[end] == 0 and _fit(lengths[row : end + 1]):
                end += 1
        if lengths[row]:
            runs.append(Run(row, end, max(lengths[row:end])))
        row = end
    return runs


def _fit(lengths: list[int]) -> bool:
    padded = len(lengths) * max(lengths)
    return padded <= MAX_TOKENS and padded - sum(lengths) <= MAX_PADDING * padded


def cut_columns(tokens: int, wanted_RT: np.ndarray, most_tokens: int, most_wanted: int) -> list[tuple[int, int]]:
    """Cut new tokens 0 .. tokens - 1 into pieces (start, end) that a runtime with limits takes one after the other.

    No piece has more than `most_tokens` tokens, or more than `most_wanted` tokens of one row at which logits are wanted
    (`wanted_RT`, bool). Both limits are at least 1.
    """
    pieces, start = [], 0
    seen_R = np.zeros(len(wanted_RT), np.int64)
    for column in range(tokens):
        seen_R += wanted_RT[:, column]
        if column - start == most_tokens or seen_R.max(initial=0) > most_wanted:
            pieces.append((start, column))
            start, seen_R = column, wanted_RT[:, column].astype(np.int64)
    return [*pieces, (start, tokens)]
