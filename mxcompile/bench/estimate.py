"""How long a benchmark will take: from what was measured, else from the least that the machine's own rates allow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from mxcompile.bench.results import BenchReport, Cell

GUESS = 3.0
"""Times the least that a round takes of which nothing was measured yet."""
Bound = Callable[[str, int, int], dict[str, float] | None]
"""Contestant, prompt length, batch size -> least prefill_s and decode_s, or None."""


def round_seconds(cell: Cell) -> float:
    """What a round of this cell took."""
    return statistics.median(item["ttft_s"] + sum(item["steps_s"]) for item in cell.repeats)


def least_seconds(bound: dict[str, float], new_tokens: int) -> float:
    """What a round takes at least."""
    return bound["prefill_s"] + new_tokens * bound["decode_s"]


def seconds_left(
    report: BenchReport, rounds: Sequence[tuple[str, int, int, int]], bound: Bound, new_tokens: int
) -> float | None:
    """Of `rounds`: (contestant, prompt length, batch size, how many). None when nothing is known about one of them."""
    total = 0.0
    for name, length, batch, count in rounds:
        cell = report.cell(name, length, batch)
        if cell is not None:
            total += count * round_seconds(cell)
            continue
        least = bound(name, length, batch)
        if least is None:
            return None
        total += count * least_seconds(least, new_tokens) * _slowness(report, name, bound, new_tokens)
    return total


def _slowness(report: BenchReport, name: str, bound: Bound, new_tokens: int) -> float:
    """How many times the least this contestant has taken so far."""
    ratios = []
    for cell in report.cells:
        least = bound(name, cell.prompt_length, cell.batch_size) if cell.contestant == name else None
        if least is not None:
            ratios.append(round_seconds(cell) / least_seconds(least, new_tokens))
    return statistics.median(ratios) if ratios else GUESS


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
