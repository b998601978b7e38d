"""Medians with their spread. Outliers are marked and stay in every number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

OUTLIER_DEVIATIONS = 3.5
"""Modified z-score from which a value is marked (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993, section 3.3)."""
_MAD_TO_SIGMA = 1.4826


def spread(values: Sequence[float]) -> dict[str, Any]:
    """median, low (smallest), high (largest), relative (half their distance over the median) and the indices of `outliers`."""
    array = np.asarray(values, float)
    median = float(np.median(array))
    low, high = float(array.min()), float(array.max())
    sigma = _MAD_TO_SIGMA * float(np.median(np.abs(array - median)))
    outliers = [] if sigma == 0 else np.flatnonzero(np.abs(array - median) > OUTLIER_DEVIATIONS * sigma).tolist()
    relative = (high - low) / 2 / median if median else 0.0
    return {"median": median, "low": low, "high": high, "relative": relative, "outliers": outliers}


def summary(repeats: Sequence[dict[str, Any]], prompt_tokens: int, batch: int) -> dict[str, Any]:
    """Numbers of one cell from its rounds: each has ttft_s, steps_s (one entry per decode step), peak_bytes and state_bytes.

    Percentiles of the inter-token latency are of all steps of all rounds together; its low and high are those of the rounds' medians.
    """
    first = [item["ttft_s"] for item in repeats]
    steps = np.concatenate([np.asarray(item["steps_s"], float) for item in repeats])
    between = spread([float(np.median(item["steps_s"])) for item in repeats])
    p50, p90, p99 = (float(value) for value in np.percentile(steps, (50, 90, 99)))
    sigma = _MAD_TO_SIGMA * float(np.median(np.abs(steps - p50)))
    slow = int((steps - p50 > OUTLIER_DEVIATIONS * sigma).sum()) if sigma else 0
    return {
        "ttft_s": spread(first),
        "itl_s": between
        | {"median": p50, "p90": p90, "p99": p99, "max": float(steps.max()), "slow_steps": slow, "steps": steps.size},
        "prefill_tokens_per_s": spread([batch * prompt_tokens / value for value in first]),
        "decode_tokens_per_s": spread([batch * len(item["steps_s"]) / sum(item["steps_s"]) for item in repeats]),
        "peak_bytes": max(item["peak_bytes"] for item in repeats),
        "state_bytes": max(item["state_bytes"] for item in repeats),
        "device_peak_bytes": None,
    }
