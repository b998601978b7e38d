"""Intervals of medians and the agreement of two runs: the rates that are stated are the rates that a simulation finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcompile.bench.agreement import LEVEL, SAME, chance_of_change, change, coverage, interval
from mxcompile.bench.statistics import spread

RUNS = 20000
# Five standard deviations of a share near 5 % of so many runs.
SLACK = 5 * math.sqrt(0.05 * 0.95 / RUNS)
DRAWS = {  # name -> (draw, median): times are skewed and have tails
    "lognormal": (lambda random, shape: random.lognormal(0.0, 0.5, shape), 1.0),
    "cauchy": (lambda random, shape: random.standard_cauchy(shape), 0.0),
    "two speeds": (lambda random, shape: random.normal(0, 0.01, shape) + (random.random(shape) < 0.5), 0.5),
}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 20])
@pytest.mark.parametrize("name", DRAWS)
def test_the_interval_covers_the_median_at_the_stated_rate(name, count):
    draw, median = DRAWS[name]
    samples = np.sort(draw(np.random.default_rng(count), (RUNS, count)), axis=1)
    known = interval(samples[0])
    rank, level = known["rank"], known["level"]
    assert (known["low"], known["high"]) == (samples[0, rank - 1], samples[0, count - rank])
    covered = ((samples[:, rank - 1] <= median) & (samples[:, count - rank] >= median)).mean()
    assert covered == pytest.approx(level, abs=5 * math.sqrt(max(level * (1 - level), 1e-3) / RUNS))
    if count >= 6:
        assert level >= LEVEL
        assert coverage(count, rank + 1) < LEVEL  # and no narrower one would do
    else:
        assert rank == 1


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (5, 5), (5, 3), (9, 9), (12, 7)])
@pytest.mark.parametrize("name", ["lognormal", "cauchy"])
def test_two_runs_of_the_same_thing_differ_at_the_stated_rate(name, n, m):
    draw, _ = DRAWS[name]
    random = np.random.default_rng([n, m])
    new, old = np.sort(draw(random, (RUNS, n)), axis=1), np.sort(draw(random, (RUNS, m)), axis=1)
    one, other = interval(new[0]), interval(old[0])
    j, k = one["rank"], other["rank"]
    apart = (new[:, j - 1] > old[:, m - k]) | (new[:, n - j] < old[:, k - 1])
    chance = chance_of_change(one, other)
    assert apart.mean() == pytest.approx(chance, abs=SLACK)
    assert change(one, other, ("up", "down")) == (SAME if not apart[0] else "up" if new[0, 0] > old[0, 0] else "down")
    if (n, m) == (5, 5):
        assert chance == pytest.approx(2 / math.comb(10, 5))


def test_a_real_change_is_seen():
    random = np.random.default_rng(0)
    old, new = (interval(random.normal(middle, 0.01, 5).tolist()) for middle in (1.0, 1.1))
    assert change(new, old, ("slower", "faster")) == "slower"
    assert change(old, new, ("slower", "faster")) == "faster"
    assert change(old, old, ("slower", "faster")) == SAME


def test_what_differs_from_pass_to_pass_is_in_the_interval():
    """Rounds of one pass are alike; the interval is over the passes, so two runs of one machine agree at the stated rate."""
    random, apart, runs = np.random.default_rng(3), 0, 1000
    for _ in range(runs):
        found = []
        for _ in range(2):
            values = (random.normal(1, 0.05, 5)[:, None] + random.normal(0, 0.001, (5, 4))).ravel()
            found.append(spread(values.tolist(), np.repeat(range(5), 4).tolist())["interval"])
        apart += change(*found, ("up", "down")) != SAME
    assert apart / runs == pytest.approx(2 / math.comb(10, 5), abs=5 * math.sqrt(0.008 / runs))


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
def test_an_interval_lies_within_the_values(values):
    found = interval(values)
    assert min(values) <= found["low"] <= np.median(values) <= found["high"] <= max(values)
    assert 0 <= found["level"] < 1


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one value"):
        interval([])
