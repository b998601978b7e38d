"""What every form of a validation report says in short: one line per group of checks, and the numbers on top."""

from __future__ import annotations

from dataclasses import dataclass

from mxcompile.report.svg import number
from mxcompile.validation.results import Check, Measure, Status, ValidationReport

STATUS_WORDS: dict[Status, str] = {"passed": "pass", "failed": "FAIL", "inconclusive": "not judged"}


@dataclass(frozen=True)
class GroupSummary:
    """All checks of one group. `worst` is the measure nearest to (or furthest over) its limit, in `worst_case`."""

    group: str
    checks: list[Check]
    status: Status
    worst: Measure | None
    worst_case: str


def groups(report: ValidationReport) -> list[GroupSummary]:
    """One summary per group, in the order of the report."""
    out = []
    for group in dict.fromkeys(check.group for check in report.checks):
        members = [check for check in report.checks if check.group == group]
        statuses = {check.status for check in members}
        status: Status = (
            "failed" if "failed" in statuses else "inconclusive" if "inconclusive" in statuses else "passed"
        )
        pairs = [(measure, check.case) for check in members for measure in check.measures]
        worst = max(pairs, key=lambda pair: pair[0].strain, default=None)
        out.append(GroupSummary(group, members, status, *(worst if worst else (None, ""))))
    return out


def limit_text(measure: Measure) -> str:
    """The limit with its direction."""
    return f"{'≥' if measure.at_least else '≤'} {number(measure.limit)}"


def cases_text(summary: GroupSummary) -> str:
    """How many cases a group has, and how many of them did not pass."""
    total = len(summary.checks)
    bad = sum(not check.passed for check in summary.checks)
    return f"{total}" if not bad else f"{total - bad} of {total}"


def headline(report: ValidationReport) -> str:
    """The verdict in one word."""
    if report.passed:
        return "Passed"
    return "Failed" if report.failed else "Not judged"


def largest_logit_difference(report: ValidationReport) -> Measure | None:
    """The logit difference against PyTorch that is nearest to its limit."""
    found = [
        measure
        for check in report.checks
        if check.group.endswith("logits against PyTorch")
        for measure in check.measures
        if "logit difference" in measure.name
    ]
    return max(found, key=lambda measure: measure.strain, default=None)


def greedy_text(report: ValidationReport) -> str:
    """How far the greedy continuations agree."""
    if not report.greedy:
        return "not run"
    agreed, total = sum(run.own_agreed for run in report.greedy), sum(run.tokens for run in report.greedy)
    return f"{agreed} of {total} tokens"
