"""Medians with their spread. Outliers are marked and stay in every number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mxcompile.bench.agreement import interval

OUTLIER_DEVIATIONS = 3.5
"""Modified z-score from which a value is marked (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993, section 3.3)."""
_MAD_TO_SIGMA = 1.4826


def spread(values: Sequence[float], passes: Sequence[int] | None = None) -> dict[str, Any]:
    """median, low (smallest), high (largest), the indices of `outliers`, `interval` (see `agreement.interval`) over the medians of the
    passes, and relative: half the interval over the median. `passes`: the pass of each value; default: each its own."""
    array = np.asarray(values, float)
    median = float(np.median(array))
    sigma = _MAD_TO_SIGMA * float(np.median(np.abs(array - median)))
    outliers = [] if sigma == 0 else np.flatnonzero(np.abs(array - median) > OUTLIER_DEVIATIONS * sigma).tolist()
    numbers = np.arange(len(array)) if passes is None else np.asarray(passes)
    known = interval([float(np.median(array[numbers == number])) for number in np.unique(numbers)])
    relative = (known["high"] - known["low"]) / 2 / median if median else 0.0
    low, high = float(array.min()), float(array.max())
    return {"median": median, "low": low, "high": high, "relative": relative, "outliers": outliers, "interval": known}


def summary(repeats: Sequence[dict[str, Any]], prompt_tokens: int, batch: int) -> dict[str, Any]:
    """Numbers of one cell from its rounds: each has ttft_s, steps_s (one entry per decode step), peak_bytes, state_bytes, and may have
    `pass`, device_peak_bytes and device_own_bytes.

    Percentiles of the inter-token latency are of all steps of all rounds together; its low and high are those of the rounds' medians.
    """
    passes = [item.get("pass", index) for index, item in enumerate(repeats)]

    def over_rounds(value: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        return spread([value(item) for item in repeats], passes)

    def largest(key: str) -> int | None:
        known = [item[key] for item in repeats if item.get(key) is not None]
        return max(known, default=None)

    steps = np.concatenate([np.asarray(item["steps_s"], float) for item in repeats])
    between = over_rounds(lambda item: float(np.median(item["steps_s"])))
    p50, p90, p99 = (float(value) for value in np.percentile(steps, (50, 90, 99)))
    sigma = _MAD_TO_SIGMA * float(np.median(np.abs(steps - p50)))
    slow = int((steps - p50 > OUTLIER_DEVIATIONS * sigma).sum()) if sigma else 0
    return {
        "ttft_s": over_rounds(lambda item: item["ttft_s"]),
        "itl_s": between
        | {"median": p50, "p90": p90, "p99": p99, "max": float(steps.max()), "slow_steps": slow, "steps": steps.size},
        "itl_p99_s": over_rounds(lambda item: float(np.percentile(item["steps_s"], 99))),
        "prefill_tokens_per_s": over_rounds(lambda item: batch * prompt_tokens / item["ttft_s"]),
        "decode_tokens_per_s": over_rounds(lambda item: batch * len(item["steps_s"]) / sum(item["steps_s"])),
        "peak": over_rounds(lambda item: float(item["peak_bytes"])),
        "peak_bytes": max(item["peak_bytes"] for item in repeats),
        "state_bytes": max(item["state_bytes"] for item in repeats),
        "device_peak_bytes": largest("device_peak_bytes"),
        "device_own_bytes": largest("device_own_bytes"),
    }
