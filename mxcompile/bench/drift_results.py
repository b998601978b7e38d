"""What a measurement of drift found: plain records that go to JSON and come back unchanged, and the table of them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from mxcompile.bench.records import check_schema
from mxcompile.bench.results import read_any
from mxcompile.result_shapes import CheckpointPart, EnginePart, EnvironmentPart
from mxcompile.strict_records import NotNegative, Positive, Rule, Whole, one_of, read_record

SCHEMA = "mxcompile.drift"
SCHEMA_VERSION = 1
MEASURES = ("recurrence", "model", "plain")
"""Against the fp64 recurrence; against the whole PyTorch definition; and the first again, of decoding without taps."""


@dataclass
class DriftError:
    """The head of a layer that is nearest to its limit. Relative error of its state; `error` None when a state is no number.

    memory: steps that the head remembers by now. status: agrees, differs, or tie (another expert at a near-tie explains it).
    """

    measure: str
    head: Whole
    error: NotNegative | None
    limit: Positive
    memory: NotNegative
    status: Annotated[str, one_of("agrees", "differs", "tie")]


_ONE_OF_EACH = Rule(
    f"one each of {', '.join(MEASURES)}", lambda errors: [item.measure for item in errors] == [*MEASURES]
)


@dataclass
class DriftRow:
    """One lightning layer after so many decoded tokens."""

    step: Whole
    layer: Whole
    errors: Annotated[list[DriftError], _ONE_OF_EACH]

    def of(self, measure: str) -> DriftError:
        """The error by that measure."""
        return next(item for item in self.errors if item.measure == measure)


class Missing(TypedDict):
    """A number of tokens that was not decoded, and why."""

    steps: int
    reason: str


class Saved(TypedDict):
    """The file that an unfinished run goes on from."""

    file: str
    step: Whole
    sha256: str
    followed: Whole
    refused: Whole


@dataclass
class DriftReport:
    """The run. `state`: the file that an unfinished run goes on from: name beside this file, step and sha256."""

    created: str
    options: dict[str, Any]
    engine: EnginePart
    checkpoint: CheckpointPart
    environment: EnvironmentPart
    finished: bool = False
    interruptions: Whole = 0
    rows: list[DriftRow] = field(default_factory=list)
    followed: Whole = 0  # near-ties of the router at which PyTorch followed the engine
    refused: Whole = 0  # other differences of the experts chosen
    not_run: list[Annotated[dict[str, Any], Missing]] = field(default_factory=list)
    state: Annotated[dict[str, Any], Saved] | None = None

    @property
    def passed(self) -> bool:
        """Something was measured, and nothing differs."""
        return bool(self.rows) and not any(item.status == "differs" for row in self.rows for item in row.errors)

    def worst(self, measure: str) -> tuple[DriftRow, DriftError] | None:
        """The row whose error by that measure is nearest to, or furthest over, its limit."""
        rows = [(row, row.of(measure)) for row in self.rows]
        return max(rows, key=lambda pair: _share(pair[1]), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "passed": self.passed}
        return head | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> DriftReport:
        """Inverse of `to_dict`. Raises MxcompileError for another kind of file or schema version."""
        return read_record(cls, check_schema(values, SCHEMA, SCHEMA_VERSION, "mxcompile bench --state-drift"))


def read_drift(path: str | os.PathLike[str]) -> DriftReport:
    """Read a run. Raises MxcompileError naming the file."""
    report: DriftReport = read_any(path, DriftReport.from_dict)
    return report


def verdict(report: DriftReport) -> str:
    """One sentence."""
    if not report.rows:
        return "No drift of the states was measured."
    last = max(row.step for row in report.rows)
    bad = [(row, item) for row in report.rows for item in row.errors if item.status == "differs"]
    if bad:
        row, item = min(bad, key=lambda pair: (pair[0].step, pair[0].layer))
        return (
            f"The recurrent states drift: after {row.step} tokens that of layer {row.layer}, head {item.head} is off by "
            f"{_number(item.error)} ({MEASURE_TEXT[item.measure]}), limit {item.limit:.1e}."
        )
    worst = report.worst("recurrence")
    assert worst is not None
    return (
        f"The recurrent states do not drift over {last} decoded tokens: the relative error nearest to its limit is "
        f"{_number(worst[1].error)} (layer {worst[0].layer}, after {worst[0].step} tokens), limit {worst[1].limit:.1e}."
    )


MEASURE_TEXT = {
    "recurrence": "against the fp64 recurrence on the engine's own inputs",
    "model": "against the PyTorch definition",
    "plain": "decoding without taps, against the fp64 recurrence",
}


def print_drift(report: DriftReport) -> None:
    """The table of layers and steps."""
    from mxcompile.cli.output import print_table

    rows = [
        (
            row.step,
            row.layer,
            *(_text(row.of(measure)) for measure in MEASURES),
            f"{row.of('recurrence').limit:.1e}",
            f"{row.of('model').limit:.1e}",
            f"{row.of('recurrence').memory:.0f}",
        )
        for row in report.rows
    ]
    heads = ("tokens", "layer", "recurrence", "whole model", "without taps", "limit", "limit of the model", "memory")
    if rows:
        print_table("Relative error of the recurrent states (the head nearest to its limit)", heads, rows)
    for item in report.not_run:
        print(f"not run: {item['steps']} tokens: {item['reason']}")
    if not report.finished:
        print("this run is unfinished; go on with --resume")
    print(verdict(report))


def _text(item: DriftError) -> str:
    return _number(item.error) + ("" if item.status == "agrees" else f" {item.status.upper()}")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _share(item: DriftError) -> float:
    return float("inf") if item.error is None else item.error / item.limit
