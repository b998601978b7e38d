"""Conditions for `--fail-on`: `METRIC<NUMBER` or `METRIC>NUMBER` fails when any of an engine's values is so; or a word.

Words: `disagreement` (a validation, a needle grid, a perplexity or a drift does not pass), `incomplete` (anything was not run).
A metric without any value fails too: what was not measured must not pass a gate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mxcompile.bench.agreement import SAME
from mxcompile.errors import MxcompileError

Values = dict[str, Any]
WORDS = ("disagreement", "incomplete")


def _engine_rows(key: str, factor: float = 1.0) -> Callable[[Values], list[float]]:
    def take(values: Values) -> list[float]:
        return [row[key] * factor for row in values["rows"] if row["contestant"] == "engine" and row[key] is not None]

    return take


def _slowdown(values: Values) -> list[float]:
    rows = (values["baseline"] or {}).get("rows", ())
    return [row[f"{key}_ratio"] for row in rows if row["contestant"] == "engine" for key in ("ttft_s", "itl_s")]


def _changed(values: Values) -> list[float]:
    """How many of the engine's numbers changed against --baseline."""
    baseline = values["baseline"]
    if baseline is None or not baseline["rows"]:
        return []
    rows = [row for row in baseline["rows"] if row["contestant"] == "engine"]
    return [float(sum(row[key] != SAME for row in rows for key in row if key.endswith("_change")))]


def _perplexity(key: str) -> Callable[[Values], list[float]]:
    """Of every text: what is no number is infinitely wrong."""

    def take(values: Values) -> list[float]:
        rows = [row for item in values["perplexities"] for row in item["summary"] if row["name"] == "engine"]
        return [float("inf") if row[key] is None else abs(row[key]) for row in rows]

    return take


def _state_drift(values: Values) -> list[float]:
    """Largest relative error of a recurrent state against the recurrence in fp64, decoding with taps and without."""
    errors = [e for item in values["drifts"] for row in item["rows"] for e in row["errors"] if e["measure"] != "model"]
    return [float("inf") if e["error"] is None else e["error"] for e in errors]


def _logit_difference(values: Values) -> list[float]:
    found = []
    for item in values["validations"]:
        for check in item["checks"]:
            for measure in check["measures"]:
                if "logit difference" in measure["name"] and "router" not in measure["name"]:
                    found.append(float("inf") if measure["value"] is None else measure["value"])
    return found


METRICS: dict[str, Callable[[Values], list[float]]] = {
    "ttft_ms": _engine_rows("ttft_s", 1e3),
    "itl_ms": _engine_rows("itl_s", 1e3),
    "itl_p99_ms": _engine_rows("itl_p99_s", 1e3),
    "prefill_tokens_per_s": _engine_rows("prefill_tokens_per_s"),
    "decode_tokens_per_s": _engine_rows("decode_tokens_per_s"),
    "peak_gib": _engine_rows("peak_bytes", 2**-30),
    "prefill_speedup": _engine_rows("prefill_against_pytorch"),
    "decode_speedup": _engine_rows("decode_against_pytorch"),
    "input_cost": _engine_rows("input_cost_per_million"),
    "output_cost": _engine_rows("output_cost_per_million"),
    "slowdown": _slowdown,
    "changed": _changed,
    "device_peak_gib": _engine_rows("device_peak_bytes", 2**-30),
    "logit_difference": _logit_difference,
    "perplexity": _perplexity("perplexity"),
    "perplexity_change": _perplexity("change"),
    "state_drift": _state_drift,
}
"""Name -> all values of engines in a comparison. Speedups are against PyTorch, slowdown is new over old against --baseline."""


@dataclass(frozen=True)
class Condition:
    """What must not be. `operator` is < or >, or empty for a word."""

    text: str
    metric: str
    operator: str = ""
    number: float = 0.0

    def violation(self, values: Values) -> str | None:
        """Why it does not hold, or None when all is well."""
        if self.metric == "disagreement":
            judged = [item for key in ("validations", "needles", "perplexities", "drifts") for item in values[key]]
            bad = [item["name"] for item in judged if not item["passed"]]
            if not values["validations"]:
                return "disagreement: no validation was given or run"
            return f"disagreement: {', '.join(bad)} did not pass" if bad else None
        if self.metric == "incomplete":
            count = len(values["not_run"])
            return f"incomplete: {count} things were not run" if count else None
        found = METRICS[self.metric](values)
        if not found:
            return f"{self.text}: {self.metric} was not measured"
        worst = min(found) if self.operator == "<" else max(found)
        broken = worst < self.number if self.operator == "<" else worst > self.number
        return f"{self.text}: the worst value is {worst:.4g}" if broken else None


def parse(texts: Iterable[str]) -> list[Condition]:
    """Conditions from the command line. Raises MxcompileError naming what is not understood."""
    out = []
    for text in texts:
        compact = text.replace(" ", "")
        match = re.fullmatch(r"(\w+)([<>])(\d+(?:\.\d*)?(?:e-?\d+)?)", compact)
        if compact in WORDS:
            out.append(Condition(compact, compact))
        elif match and match[1] in METRICS:
            out.append(Condition(compact, match[1], match[2], float(match[3])))
        else:
            known = ", ".join((*WORDS, *(f"{name}<N or >N" for name in METRICS)))
            raise MxcompileError(f"--fail-on {text!r} is not understood; known: {known}")
    return out


def violations(conditions: Iterable[Condition], values: Values) -> list[str]:
    """A sentence for each condition that does not hold."""
    return [text for condition in conditions if (text := condition.violation(values)) is not None]
