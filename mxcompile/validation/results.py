"""What a validation found: plain records that go to JSON and come back unchanged.

A value that is not a finite number (an engine that gives out NaN) is kept as infinity, which is over every limit, and is
null in JSON.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from mxcompile.errors import MxcompileError
from mxcompile.result_shapes import CheckpointFacts, EnvironmentFacts
from mxcompile.strict_records import Count, Limit, NotNegative, OrInfinite, Positive, Whole, damaged, read_record

SCHEMA = "mxcompile.validation"
SCHEMA_VERSION = 1

Status = Literal["passed", "failed", "inconclusive"]


class ModelFacts(TypedDict, total=False):
    """Which architecture."""

    family: str


class SideFacts(TypedDict):
    """What was compared."""

    target: str
    dtype: str
    quantization: dict[str, Any] | None
    model: Annotated[dict[str, Any], ModelFacts]
    layers: Whole
    max_batch_size: Count
    max_seq_len: Count
    checkpoint: CheckpointFacts | None
    versions: dict[str, str]


class GpuFacts(TypedDict):
    """One GPU."""

    name: str


class MachineFacts(EnvironmentFacts, total=False):
    """Which machine."""

    gpus: list[GpuFacts]


class LimitValues(TypedDict):
    """See `thresholds.Limit`."""

    value: Limit
    reason: str


class LimitNames(TypedDict):
    """The limits that figures draw; there are more."""

    logits: LimitValues
    kl: LimitValues
    states: LimitValues
    hidden: LimitValues
    router: LimitValues
    stable_margin: LimitValues


class ThresholdValues(TypedDict):
    """See `thresholds.Thresholds`."""

    dtype: str
    exact: bool
    logit_scale: Positive
    limits: Annotated[dict[str, LimitValues], LimitNames]


@dataclass
class Measure:
    """A number and its limit. `where` names the place of the worst value."""

    name: str
    value: OrInfinite
    limit: float
    where: str = ""
    at_least: bool = False  # the limit is a lower one

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def strain(self) -> float:
        """How near the limit: 1 is at it, more is over it."""
        if self.at_least:
            return (1 - self.value) / (1 - self.limit) if self.limit < 1 else (0.0 if self.passed else math.inf)
        return self.value / self.limit if self.limit > 0 else (0.0 if self.passed else math.inf)


@dataclass
class Check:
    """One comparison. `group` is its kind ("prefill logits"), `case` what it ran on ("257 tokens").

    `compared` counts positions; `judged` those that were not set aside because a router's near-tie sent them elsewhere.
    """

    group: str
    case: str
    measures: list[Measure]
    compared: Whole = 0
    judged: Whole = 0
    notes: list[str] = field(default_factory=list)

    @property
    def status(self) -> Status:
        if not all(measure.passed for measure in self.measures):
            return "failed"
        return "inconclusive" if 2 * self.judged < self.compared else "passed"

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def worst(self) -> Measure | None:
        return max(self.measures, key=lambda measure: measure.strain, default=None)


@dataclass
class LayerErrors:
    """Errors of one layer in one run; None where there is nothing of the kind or it was not tapped.

    state, key, value, hidden: relative; router: absolute, of router logits. `hidden` is the largest and `hidden_median` the median over
    tokens; the others are largest in exact types and medians in rounded ones.
    """

    layer: Whole
    kind: str
    state: float | None = None
    key: float | None = None
    value: float | None = None
    router: float | None = None
    hidden: float | None = None
    hidden_median: float | None = None


@dataclass
class Reroute:
    """A row that a near-tie of the reference's router sent to another expert: named, and set aside from `position` on."""

    case: str
    row: int
    position: int
    layer: int
    margin: float  # of the reference's router logits


@dataclass
class PositionErrors:
    """Errors along one prompt. Lists have one entry per compared position.

    `margin` is the reference's between its first and second token.
    """

    case: str
    positions: list[Whole] = field(default_factory=list)
    max_abs: list[OrInfinite] = field(default_factory=list)
    kl: list[OrInfinite] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    decode_from: Whole | None = None  # positions from here on were decoded one by one


@dataclass
class GreedyRun:
    """One greedy continuation. `own_agreed` counts tokens until the engine's own continuation leaves the reference's.

    `teacher_forced` is the share of steps at which both choose the same token after the reference's tokens. `difference_margin` is the
    reference's margin between its token and the engine's at the first disagreement. `agreed` has one entry per step.
    """

    prompt_tokens: Whole
    tokens: Whole
    own_agreed: Whole
    teacher_forced: float
    difference_margin: float | None = None
    reference_token: int | None = None
    engine_token: int | None = None
    explanation: str = ""
    agreed: list[bool] = field(default_factory=list)


@dataclass
class Fault:
    """Where the engine leaves the reference first. `kind`: lightning, softmax, router, experts, head, vision half or unknown."""

    layer: int | None
    kind: str
    part: str
    run: str  # what was run when it showed
    measure: str = ""
    value: OrInfinite = 0.0
    limit: float = 0.0
    experts: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """One sentence for people."""
        where = "behind the last layer" if self.layer is None else f"in layer {self.layer}"
        kind = {"unknown": "an unknown place", "head": "the output head"}.get(self.kind, f"the {self.kind}")
        if self.kind in ("lightning", "softmax"):
            kind += " attention"
        experts = ""
        if self.experts:
            plural = "s" if len(self.experts) > 1 else ""
            experts = f"; wrong for every token of expert{plural} {', '.join(map(str, self.experts))}"
        numbers = f" ({self.measure} {self.value:.2g}, limit {self.limit:.2g})" if self.measure else ""
        return f"first difference {where}, {kind}: {self.part}{experts}{numbers}, in {self.run}"


@dataclass
class NotRun:
    """A check that could not run, and why."""

    check: str
    reason: str


@dataclass
class ValidationReport:
    """Everything a validation found. `to_dict` is the JSON form, `from_dict` its inverse."""

    created: str  # ISO 8601, UTC
    seconds: NotNegative
    engine: Annotated[dict[str, Any], SideFacts]
    reference: Annotated[dict[str, Any], SideFacts]
    environment: Annotated[dict[str, Any], MachineFacts]
    options: dict[str, Any]
    thresholds: Annotated[dict[str, Any], ThresholdValues]
    logit_scale: NotNegative
    checks: list[Check] = field(default_factory=list)
    layers: list[LayerErrors] = field(default_factory=list)
    positions: list[PositionErrors] = field(default_factory=list)
    greedy: list[GreedyRun] = field(default_factory=list)
    reroutes: list[Reroute] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    fault: Fault | None = None

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "failed"]

    @property
    def inconclusive(self) -> list[Check]:
        return [check for check in self.checks if check.status == "inconclusive"]

    @property
    def passed(self) -> bool:
        """Nothing failed, and of every group at least half of the checks could be judged."""
        if not self.checks or self.failed:
            return False
        groups = {check.group for check in self.checks}
        return all(2 * sum(c.passed for c in self.checks if c.group == g) >= self._size(g) for g in groups)

    def _size(self, group: str) -> int:
        return sum(check.group == group for check in self.checks)

    @property
    def verdict(self) -> str:
        """The result in plain words."""
        against = f"the PyTorch definition in {self.reference.get('dtype', 'unknown')}"
        total = len(self.checks)
        scope = " (quick run)" if self.options.get("quick") else ""
        aside = f", {len(self.inconclusive)} could not be judged" if self.inconclusive else ""
        if self.passed:
            return f"The engine agrees with {against}: {total - len(self.inconclusive)} of {total} checks pass{aside}{scope}."
        if not self.failed:
            return f"The engine could not be judged: too many positions hold router ties{scope}; choose another seed."
        text = f"The engine disagrees with {against}: {len(self.failed)} of {total} checks fail{aside}{scope}."
        return f"{text} {self.fault.text[0].upper()}{self.fault.text[1:]}." if self.fault else text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes null."""
        values = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        for check, plain in zip(self.checks, values["checks"], strict=True):
            plain["status"] = check.status
        head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "passed": self.passed, "verdict": self.verdict}
        return head | values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ValidationReport:
        """Inverse of `to_dict`. Raises MxcompileError for another kind of file or schema version."""
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            raise MxcompileError("this is not a validation report of mxcompile")
        if values.get("schema_version") != SCHEMA_VERSION:
            raise MxcompileError(
                f"the report has schema version {values.get('schema_version')!r}, this mxcompile reads {SCHEMA_VERSION}; "
                "validate again"
            )
        report = read_record(cls, values, "validate again")
        for index, item in enumerate(report.positions):
            if not len(item.positions) == len(item.max_abs) == len(item.kl) == len(item.margin):
                raise damaged(f"positions[{index}]", "has lists of different lengths", "validate again")
        return report


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
