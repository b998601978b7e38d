"""Turn the errors between two runs into checks, by the rules of `thresholds`.

Shape suffixes: P compared positions, L layers, n tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.interface import RowSnapshot
from mxcompile.validation import metrics
from mxcompile.validation.observe import RowTrace
from mxcompile.validation.results import Check, Measure, Reroute
from mxcompile.validation.thresholds import FEW, LOGIT_SCALE, ROUNDED_FACTOR, SHARE_FACTOR, TOP_K, Thresholds

Span = Callable[[NDArray[np.int64]], NDArray[np.bool_]]
ROLE_NAMES = {"recurrent_state": "recurrent state", "key": "cached keys", "value": "cached values"}


@dataclass
class RowComparison:
    """One row of two runs. `judged_P`: positions that are not set aside."""

    reference: RowTrace
    other: RowTrace
    errors_P: metrics.Errors
    judged_P: NDArray[np.bool_]
    reroute: Reroute | None
    source: RowTrace | None = None  # the reference's run, with its yardstick


@dataclass
class Comparison:
    """All rows of two runs of one case."""

    case: str
    rows: list[RowComparison]


@dataclass
class Judge:
    """Applies one dtype's limits; remembers every reroute that it had to set aside."""

    thresholds: Thresholds
    logit_scale: float
    reroutes: list[Reroute] = field(default_factory=list)

    @property
    def logits_limit(self) -> float:
        return self.thresholds.logits.value * self.factor

    def limit(
        self, what: Literal["logits", "kl", "states"], positions: int, yardstick: Sequence[metrics.Errors] = ()
    ) -> float:
        """The limit of a check of so many positions; `yardstick`: what the yardstick is off on the same ones."""
        few = getattr(self.thresholds, f"few_{what}")
        value = (few if few is not None and positions < FEW else getattr(self.thresholds, what)).value
        value *= {"logits": self.factor, "kl": self.factor**2, "states": 1.0}[what]
        same = np.concatenate(yardstick) if yardstick else np.zeros(0)
        return max(value, ROUNDED_FACTOR * float(np.median(same))) if len(same) else value

    @property
    def stable_margin(self) -> float:
        return self.thresholds.stable_margin.value * self.factor

    @property
    def factor(self) -> float:
        """What limits on logits grow by."""
        return self.logit_scale / LOGIT_SCALE

    def compare(
        self,
        case: str,
        reference: Sequence[RowTrace],
        other: Sequence[RowTrace],
        margins: Sequence[RowTrace] | None = None,
    ) -> Comparison:
        """Compare row by row. `margins`: the runs whose router margins decide about ties, default `reference`."""
        rows = []
        for index, (mine, theirs, source) in enumerate(zip(reference, other, margins or reference, strict=True)):
            errors_P = metrics.largest_difference(mine.logits_PN, theirs.logits_PN)
            judged_P, reroute = self.set_aside(case, index, mine.positions, errors_P, source.margins_Ln)
            rows.append(RowComparison(mine, theirs, errors_P, judged_P, reroute, source))
        return Comparison(case, rows)

    def set_aside(
        self,
        case: str,
        row: int,
        positions_P: NDArray[np.int64],
        errors_P: metrics.Errors,
        margins_Ln: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.bool_], Reroute | None]:
        """Which positions are judged, and the tie that explains why the others are not (the rule of `thresholds`)."""
        judged_P = np.ones(len(errors_P), bool)
        over = np.flatnonzero(errors_P > self.logits_limit)
        if not len(over) or margins_Ln is None or not self.thresholds.exact:
            return judged_P, None
        first = int(over[0])
        # The tie is at the first position over the limit, or at one before it that was not compared.
        start = int(positions_P[first - 1]) + 1 if first else 0
        layers, offsets = np.nonzero(margins_Ln[:, start : positions_P[first] + 1] <= self.thresholds.router_tie.value)
        if not len(layers):
            return judged_P, None
        earliest = np.lexsort((layers, offsets))[0]
        layer, position = int(layers[earliest]), start + int(offsets[earliest])
        reroute = Reroute(case, row, position, layer, float(margins_Ln[layer, position]))
        self.reroutes.append(reroute)
        judged_P[first:] = False
        return judged_P, reroute

    def summary(self, errors: metrics.Errors) -> tuple[float, int]:
        """The number that is held against the limit, and the index of the largest error."""
        if not errors.size:
            return 0.0, 0
        worst = int(np.argmax(errors))
        return (float(errors[worst]) if self.thresholds.exact else float(np.median(errors))), worst

    @property
    def word(self) -> str:
        return "largest" if self.thresholds.exact else "median"

    def logits_check(self, group: str, comparison: Comparison, span: Span | None = None) -> Check:
        """Errors and KL of all positions that `span` selects."""
        errors, kl, where = [], [], []
        yard_errors: list[metrics.Errors] = []
        yard_kl: list[metrics.Errors] = []
        compared = 0
        for index, row in enumerate(comparison.rows):
            positions = row.reference.positions
            inside_P = np.ones(len(positions), bool) if span is None else span(positions)
            compared += int(inside_P.sum())
            chosen_P = inside_P & row.judged_P
            errors.append(row.errors_P[chosen_P])
            kl.append(metrics.kl_divergence(row.reference.logits_PN[chosen_P], row.other.logits_PN[chosen_P]))
            yard = _yardstick_logits(row, positions[chosen_P])
            if yard is not None:
                yard_errors.append(metrics.largest_difference(*yard))
                yard_kl.append(metrics.kl_divergence(*yard))
            where += [_place(index, int(p), len(comparison.rows)) for p in positions[chosen_P]]
        measures = []
        for name, parts, limit in (
            (f"{self.word} logit difference", errors, self.limit("logits", len(where), yard_errors)),
            (f"{self.word} KL divergence", kl, self.limit("kl", len(where), yard_kl)),
        ):
            value, worst = self.summary(np.concatenate(parts))
            measures.append(Measure(name, value, limit, where[worst] if where else ""))
        return Check(group, comparison.case, measures, compared, len(where), self._notes(comparison))

    def states_check(
        self, group: str, comparison: Comparison, length_of: Callable[[RowTrace], int] = lambda row: len(row.tokens)
    ) -> Check:
        """States of every row after `length_of` of its tokens, default all."""
        found: dict[str, list[tuple[metrics.Errors, str, str]]] = {}
        yard: dict[str, list[metrics.Errors]] = {}
        compared = judged = tokens = 0
        for index, row in enumerate(comparison.rows):
            length = length_of(row.reference)
            tokens += length
            errors = metrics.snapshot_errors(row.reference.snapshots[length], row.other.snapshots[length])
            for (_, role), values in _yardstick_states(row, length).items():
                yard.setdefault(role, []).append(values)
            for (layer, role), values in errors.items():
                compared += 1
                moved = row.reroute is not None and length > row.reroute.position and layer > row.reroute.layer
                if moved:
                    continue
                judged += 1
                axis = "head" if role == "recurrent_state" else "position"
                place = f"layer {layer}" + (f", row {index}" if len(comparison.rows) > 1 else "")
                found.setdefault(role, []).append((values, place, axis))
        measures = []
        for role, parts in found.items():
            value, worst = self.summary(np.concatenate([values for values, _, _ in parts]))
            where = ""
            for values, place, axis in parts:
                if worst < len(values):
                    where = f"{place}, {axis} {worst}"
                    break
                worst -= len(values)
            name = f"{self.word} relative error of the {ROLE_NAMES[role]}"
            measures.append(Measure(name, value, self.limit("states", tokens, yard.get(role, ())), where))
        return Check(group, comparison.case, measures, compared, judged, self._notes(comparison))

    def next_token_check(self, comparisons: Sequence[Comparison]) -> Check:
        """First tokens: must agree where the reference is sure, and be among the engine's best where it is not."""
        stable: list[NDArray[np.bool_]] = []
        unstable: list[NDArray[np.bool_]] = []
        yardstick: list[NDArray[np.bool_]] = []
        compared = 0
        for row in (row for comparison in comparisons for row in comparison.rows):
            reference_PN, other_PN = row.reference.logits_PN[row.judged_P], row.other.logits_PN[row.judged_P]
            compared += len(row.judged_P)
            if not len(reference_PN):
                continue
            first_P = reference_PN.argmax(-1)
            sure_P = metrics.top_margin(reference_PN) >= self.stable_margin
            stable.append((other_PN.argmax(-1) == first_P)[sure_P])
            unstable.append(metrics.in_top(first_P, other_PN, TOP_K)[~sure_P])
            yard = _yardstick_logits(row, row.reference.positions[row.judged_P])
            if yard is not None:
                yardstick.append(metrics.in_top(first_P, yard[1], TOP_K)[~sure_P])
        # As for errors: what the yardstick reaches on the very same positions counts where that is less than on its own prompt.
        same = np.concatenate(yardstick) if yardstick else np.ones(0, bool)
        least = self.thresholds.unstable_topk.value
        least = min(least, SHARE_FACTOR * float(same.mean())) if len(same) else least
        measures, judged = [], 0
        for name, parts, limit in (
            (
                f"same first token where the margin is at least {self.stable_margin:.2g}",
                stable,
                self.thresholds.stable_top1.value,
            ),
            (f"first token among the engine's {TOP_K} best elsewhere", unstable, least),
        ):
            agreed = np.concatenate(parts) if parts else np.ones(0, bool)
            judged += len(agreed)
            share = float(agreed.mean()) if len(agreed) else 1.0
            measures.append(Measure(name, share, limit, f"{int(agreed.sum())} of {len(agreed)}", at_least=True))
        return Check("Next tokens", "all prompts", measures, compared, judged)

    def _notes(self, comparison: Comparison) -> list[str]:
        return [reroute_text(row.reroute) for row in comparison.rows if row.reroute is not None]


def reroute_text(reroute: Reroute) -> str:
    """A near-tie in words."""
    return (
        f"row {reroute.row} set aside from position {reroute.position} on: router tie in layer {reroute.layer}, "
        f"margin {reroute.margin:.1e}"
    )


def snapshot_trace(tokens: NDArray[np.int64], logits_N: NDArray[np.float32], snapshot: RowSnapshot) -> RowTrace:
    """A trace of which only the last position's logits are known."""
    last = np.array([len(tokens) - 1])
    return RowTrace(tokens, last, logits_N[None], {len(tokens): snapshot})


def last_position(trace: RowTrace) -> RowTrace:
    """The same run, seen at its last position only."""
    return RowTrace(trace.tokens, trace.positions[-1:], trace.logits_PN[-1:], trace.snapshots, trace.margins_Ln)


def _yardstick_logits(row: RowComparison, positions: NDArray[np.int64]) -> tuple[NDArray, NDArray] | None:
    """Logits of the reference and its yardstick at these positions."""
    if row.source is None or row.source.yardstick is None:
        return None
    at = np.searchsorted(row.source.positions, positions)
    return row.source.logits_PN[at], row.source.yardstick.logits_PN[at]


def _yardstick_states(row: RowComparison, length: int) -> dict[tuple[int, str], metrics.Errors]:
    yardstick = None if row.source is None else row.source.yardstick
    if row.source is None or yardstick is None or length not in row.source.snapshots:
        return {}
    return metrics.snapshot_errors(row.source.snapshots[length], yardstick.snapshots[length])


def _place(row: int, position: int, rows: int) -> str:
    return f"position {position}" + (f", row {row}" if rows > 1 else "")
