"""How well a median is known, and whether two runs agree within that.

A run's rounds are spread over passes, each in new processes and some time after the last: what differs from run to run (where memory
lies, which threads meet, how busy or hot the machine is) differs from pass to pass too, so the passes' own medians are the sample. The
interval is one of order statistics, which covers the median of any continuous distribution at a known rate; whether two intervals of
the same distribution miss each other is a matter of ranks alone, so that rate is exact too (Conover, Practical Nonparametric
Statistics, 3rd edition, sections 3.2 and 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LEVEL = 0.95
"""Wanted coverage; fewer than six passes cannot reach it, so their interval is their range, and its level says so."""
SAME = "same within the spread"


def interval(values: Sequence[float]) -> dict[str, Any]:
    """low and high: an interval for the median of what `values` are drawn from; level: how often such an interval covers it; rank: its
    ends are that many values in from both; passes: how many values there are. ValueError for none."""
    ordered, count = sorted(values), len(values)
    if not ordered:
        raise ValueError("an interval needs at least one value")
    rank = 1
    while 2 * (rank + 1) <= count and coverage(count, rank + 1) >= LEVEL:
        rank += 1
    low, high = ordered[rank - 1], ordered[count - rank]
    return {"low": low, "high": high, "level": coverage(count, rank), "rank": rank, "passes": count}


def coverage(count: int, rank: int) -> float:
    """How often the interval from the `rank`-th smallest to the `rank`-th largest of `count` values covers the median: 1 - 2 P(B < rank)
    for B of the binomial distribution of `count` tosses."""
    return 1 - 2 * sum(math.comb(count, below) for below in range(rank)) / 2**count


def chance_of_change(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How often the intervals of two runs miss each other although both are drawn from one distribution; exact."""

    def beyond(a: int, count_a: int, b: int, count_b: int) -> float:
        """P(a-th smallest of one < b-th smallest of the other): of the a + b - 1 smallest of all, at least a are the one's."""
        first, total = a + b - 1, count_a + count_b
        ways = sum(
            math.comb(first, i) * math.comb(total - first, count_a - i) for i in range(a, min(first, count_a) + 1)
        )
        return ways / math.comb(total, count_a)

    n, m, j, k = one["passes"], other["passes"], one["rank"], other["rank"]
    return beyond(n + 1 - j, n, k, m) + beyond(m + 1 - k, m, j, n)


def change(new: dict[str, Any], old: dict[str, Any], words: tuple[str, str]) -> str:
    """SAME where the intervals touch, else `words`: (what a larger new value is called, what a smaller one is)."""
    if new["low"] > old["high"]:
        return words[0]
    return words[1] if new["high"] < old["low"] else SAME
