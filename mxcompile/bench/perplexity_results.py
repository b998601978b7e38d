"""What a measurement of perplexity found: plain records that go to JSON and come back unchanged, and the table of them."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

import numpy as np

from mxcompile.bench.records import check_schema
from mxcompile.bench.results import read_any
from mxcompile.result_shapes import CheckpointPart, EnginePart, EnvironmentPart
from mxcompile.strict_records import Count, Limit, NotNegative, Whole, read_record
from mxcompile.validation.thresholds import LOGIT_SCALE, ROUNDED_FACTOR, Thresholds

SCHEMA = "mxcompile.perplexity"
SCHEMA_VERSION = 1
REFERENCE = "pytorch"
TWIN = "pytorch with the engine's weights"
"""For engines whose experts are rounded to int8: PyTorch with the weights rounded alike, which the engine is then judged against."""
YARDSTICK = "pytorch in the engine's type"
CHANGE_LIMIT = 1e-3
"""Largest relative change of the perplexity in exact types: near-ties of the router move single tokens to other experts, which moves the
mean by far less than this."""


@dataclass
class Side:
    """One contestant. nll: by segment, of every token but the segment's first, -log p of that token in nats; None where it is no number.

    logit_scale: mean over the tokens of the largest |logit|. left_out: why it takes no part, or stopped.
    """

    name: str
    dtype: str
    nll: list[list[float | None]] = field(default_factory=list)
    logit_scale: NotNegative = 0.0
    left_out: str = ""
    failures: list[str] = field(default_factory=list)  # execution errors; tried again once

    def tokens(self) -> np.ndarray:
        """All values in one array, float64; NaN where there is no number."""
        return np.array([np.nan if value is None else value for part in self.nll for value in part], np.float64)


class OptionValues(TypedDict):
    """Tokens that a side sees at once."""

    context: Count


class TextFacts(TypedDict):
    """The text that was read."""

    path: str
    tokens: Whole


@dataclass
class PerplexityReport:
    """The run. `limit`: on the engine's median |difference| of a token's -log p from that of PyTorch with the engine's weights;
    `change_limit`: on the relative change of the perplexity from that; both 0 until they are known."""

    created: str
    options: Annotated[dict[str, Any], OptionValues]
    engine: EnginePart
    checkpoint: CheckpointPart
    environment: EnvironmentPart
    text: Annotated[dict[str, Any], TextFacts]  # path, bytes, sha256, tokens, segments
    finished: bool = False
    interruptions: Whole = 0
    sides: list[Side] = field(default_factory=list)
    limit: Limit = 0.0
    change_limit: Limit = 0.0

    def side(self, name: str) -> Side | None:
        """The contestant of that name."""
        return next((side for side in self.sides if side.name == name), None)

    def judge(self, thresholds: Thresholds | None) -> None:
        """Set the limits. `thresholds`: of the engine's type; None for a rounded one, where the yardstick decides."""
        judging = self.judging
        if judging is None:
            return
        if thresholds is not None:
            # One logit, and the log of the sum of all, which moves by at most as much as the logit that moves most.
            self.limit = 2 * thresholds.logits.value * max(1e-3, judging.logit_scale) / LOGIT_SCALE
            self.change_limit = CHANGE_LIMIT
            return
        yardstick = self.side(YARDSTICK)
        known = None if yardstick is None else apart(yardstick, judging)
        if known is not None:
            self.limit = ROUNDED_FACTOR * known["median_difference"]
            self.change_limit = ROUNDED_FACTOR * max(abs(known["change"]), CHANGE_LIMIT)

    @property
    def judging(self) -> Side | None:
        """The side that the engine is judged against: PyTorch in float32 with the engine's own weights."""
        return self.side(TWIN) or self.side(REFERENCE)

    @property
    def judged(self) -> dict[str, Any] | None:
        """How far the engine is from `judging`; see `apart`."""
        engine, judging = self.side("engine"), self.judging
        return None if engine is None or judging is None else apart(engine, judging)

    def summary(self) -> list[dict[str, Any]]:
        """By contestant: tokens, mean_nll (nats), perplexity, and against PyTorch: change (relative, of the perplexity), median_difference,
        largest_difference (of a token) and largest_at (which token of the text). None where there is no number."""
        reference = self.side(REFERENCE)
        out = []
        for side in self.sides:
            mine = side.tokens()
            row: dict[str, Any] = {"name": side.name, "dtype": side.dtype, "left_out": side.left_out}
            row |= dict.fromkeys(
                ("tokens", "mean_nll", "perplexity", "change", "median_difference", "largest_difference", "largest_at")
            )
            if not side.left_out and len(mine) and np.isfinite(mine).all():
                mean = float(mine.mean())
                row |= {"tokens": len(mine), "mean_nll": mean, "perplexity": _exp(mean)}
                if side is not reference and reference is not None:
                    row |= apart(side, reference) or {}
            out.append(row)
        return out

    @property
    def engine_row(self) -> dict[str, Any] | None:
        """The engine's summary."""
        return next((row for row in self.summary() if row["name"] == "engine"), None)

    @property
    def passed(self) -> bool:
        """The engine keeps both limits."""
        found = self.judged
        if found is None or not self.limit:
            return False
        return bool(found["median_difference"] <= self.limit and abs(found["change"]) <= self.change_limit)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "passed": self.passed}
        head |= {"summary": self.summary(), "judged": self.judged}
        return head | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> PerplexityReport:
        """Inverse of `to_dict`. Raises MxcompileError for another kind of file or schema version."""
        return read_record(cls, check_schema(values, SCHEMA, SCHEMA_VERSION, "mxcompile bench --perplexity"))


def read_perplexity(path: str | os.PathLike[str]) -> PerplexityReport:
    """Read a run. Raises MxcompileError naming the file."""
    report: PerplexityReport = read_any(path, PerplexityReport.from_dict)
    return report


def verdict(report: PerplexityReport) -> str:
    """One sentence."""
    row = report.engine_row
    if row is None or row["left_out"]:
        return f"The engine's perplexity is not known: {row['left_out'] if row else 'it was not run'}."
    if row["perplexity"] is None:
        return "The engine gives out what is no number, so it has no perplexity."
    judged, judging = report.judged, report.judging
    if judged is None or judging is None or not report.limit:
        return f"The engine's perplexity is {row['perplexity']:.4g}; there is no other to hold it against."
    mean = _exp(float(judging.tokens().mean()))
    theirs = math.inf if mean is None else mean
    numbers = (
        f"perplexity {row['perplexity']:.6g}, PyTorch's {theirs:.6g} ({judged['change']:+.1e}, limit {report.change_limit:.0e}), half of "
        f"the tokens within {judged['median_difference']:.1e} (limit {report.limit:.1e})"
    )
    text = (
        f"The engine predicts the text {'as PyTorch does' if report.passed else 'otherwise than PyTorch'}: {numbers}."
    )
    if judging.name == TWIN and row["change"] is not None:
        which = "the experts' weights" if "experts" in (report.engine.get("quantization") or {}) else "the weights"
        text += f" Rounding {which} changes the original's perplexity by {row['change']:+.1e}."
    return text


def apart(side: Side, other: Side) -> dict[str, Any] | None:
    """change: of the perplexity from the other's, relative; median_difference and largest_difference of a token's -log p; largest_at:
    which token of the text. None where either is missing or no number."""
    mine, theirs = side.tokens(), other.tokens()
    usable = not side.left_out and not other.left_out and len(mine) == len(theirs) > 0
    if not usable or not np.isfinite(mine).all() or not np.isfinite(theirs).all():
        return None
    off = np.abs(mine - theirs)
    return {
        "change": float(np.expm1(min(mine.mean() - theirs.mean(), 700.0))),
        "median_difference": float(np.median(off)),
        "largest_difference": float(off.max()),
        "largest_at": int(off.argmax()) + 1,
    }


def print_perplexity(report: PerplexityReport) -> None:
    """A line per contestant."""
    from mxcompile.cli.output import print_table

    rows = [
        (
            f"{row['name']} {row['dtype']}",
            _text(row["perplexity"], ".6g"),
            _text(row["mean_nll"], ".6f"),
            _text(row["change"], "+.1e"),
            _text(row["median_difference"], ".1e"),
            _text(row["largest_difference"], ".1e"),
            _text(row["largest_at"], "d"),
        )
        for row in report.summary()
    ]
    text = report.text
    title = f"Perplexity of {text['path']}: {text['tokens']} tokens, contexts of {report.options['context']}"
    heads = ("contestant", "perplexity", "nats a token", "change", "median difference", "largest", "at token")
    print_table(title, heads, rows)
    for side in report.sides:
        for failure in side.failures:
            print(f"execution error: {side.name}: {failure}")
        if side.left_out:
            print(f"left out: {side.name}: {side.left_out}")
    if not report.finished:
        print("this run is unfinished; go on with --resume")
    print(verdict(report))


def _text(value: Any, how: str) -> str:
    return "" if value is None else format(value, how)


def _exp(mean: float) -> float | None:
    return math.exp(mean) if mean < 700 else None
