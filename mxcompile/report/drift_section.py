"""Drift of the recurrent state in a comparison: its values, figures, part of the page, and lines of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mxcompile.bench.drift_results import MEASURES, DriftReport, verdict
from mxcompile.report import parts
from mxcompile.report.figures import Figure
from mxcompile.report.svg import Axis, Series, chart, number

Values = dict[str, Any]
NAMES = {"recurrence": "recurrence in fp64", "model": "PyTorch definition", "plain": "without taps"}


def plain(name: str, report: DriftReport) -> Values:
    """The measurement for the JSON form."""
    return {"name": name, "verdict": verdict(report)} | report.to_dict()


def not_run(name: str, report: DriftReport) -> list[dict[str, str]]:
    """Lengths that did not fit, and an unfinished run."""
    found = [{"what": f"{name}: {item['steps']} tokens", "reason": item["reason"]} for item in report.not_run]
    if not report.finished:
        reason = "it was interrupted; go on with `mxcompile bench --state-drift --resume`"
        found.append({"what": f"{name}: the rest of the decode", "reason": reason})
    return found


def figures(values: Values) -> list[Figure]:
    """By step, the layer that is nearest to its limit; by layer, the last step."""
    found = []
    for index, item in enumerate(values["drifts"]):
        rows = item["rows"]
        if not rows:
            continue
        steps = sorted({row["step"] for row in rows})
        worst = [
            [_worst([row for row in rows if row["step"] == step], measure) for measure in MEASURES] for step in steps
        ]
        text = (
            "Relative error of the recurrent states, of the layer nearest to its limit; the limit is that of the recurrence and grows "
            "with the steps that the layer's head remembers."
        )
        series = [
            Series(
                NAMES[measure], range(len(steps)), [step[place]["error"] for step in worst], place + 1, "line+points"
            )
            for place, measure in enumerate(MEASURES)
        ]
        series.append(Series("limit", range(len(steps)), [step[0]["limit"] for step in worst], 4, "line"))
        found.append(
            _figure(
                f"drift-{index}",
                f"Drift by decoded tokens ({item['name']})",
                text,
                series,
                "thousands of decoded tokens",
                [f"{step / 1000:g}" for step in steps],
            )
        )
        last = [row for row in rows if row["step"] == steps[-1]]
        text = (
            f"Relative error of each layer's state after {steps[-1]} decoded tokens, of the head nearest to its limit."
        )
        series = [
            Series(
                NAMES[measure], range(len(last)), [row["errors"][place]["error"] for row in last], place + 1, "points"
            )
            for place, measure in enumerate(MEASURES)
        ]
        series.append(Series("limit", range(len(last)), [row["errors"][0]["limit"] for row in last], 4, "line"))
        every = max(1, len(last) // 12)
        names = [str(row["layer"]) if place % every == 0 else "" for place, row in enumerate(last)]
        found.append(_figure(f"drift-layers-{index}", f"Drift by layer ({item['name']})", text, series, "layer", names))
    return [figure for figure in found if figure is not None]


def _worst(rows: Sequence[Values], measure: str) -> Values:
    errors = [row["errors"][MEASURES.index(measure)] for row in rows]
    worst: Values = max(errors, key=lambda e: float("inf") if e["error"] is None else e["error"] / e["limit"])
    return worst


def _figure(name: str, title: str, text: str, series: Sequence[Series], x: str, names: Any) -> Figure | None:
    try:
        drawing = chart(name, title, text, series, Axis(x), Axis("relative error", log=True), x_names=list(names))
    except ValueError:  # nothing that a logarithmic axis can show
        return None
    return Figure(name, title, drawing, text)


def section(values: Values) -> str:
    """A table for every run: a line per step and layer."""
    out = []
    for index, item in enumerate(values["drifts"]):
        lines = []
        for place, row in enumerate(item["rows"]):
            key = f"drifts.{index}.rows.{place}.errors"
            cells = ""
            for number_, measure in enumerate(MEASURES):
                error = row["errors"][number_]
                cells += parts.cell(NAMES[measure], f"{key}.{number_}.error", error["error"], number)
                if measure != "plain":
                    cells += parts.cell("limit", f"{key}.{number_}.limit", error["limit"], number)
                cells += parts.cell("result", f"{key}.{number_}.status", error["status"], escape)
            cells += parts.cell(
                "remembers", f"{key}.0.memory", row["errors"][0]["memory"], lambda value: f"{value:.0f}"
            )
            lines.append(f'<tr><th scope="row">{row["step"]} tokens, layer {row["layer"]}</th>{cells}</tr>')
        if not lines:
            continue
        followed = parts.value(f"drifts.{index}.followed", item["followed"], str(item["followed"]))
        refused = parts.value(f"drifts.{index}.refused", item["refused"], str(item["refused"]))
        about = (
            "<p>The engine decodes given tokens one by one. Each lightning layer's state is held against the recurrence in fp64, fed with "
            "what the engine's layer itself was given, and against the whole PyTorch definition, which reads the same tokens in chunks; "
            "the first is repeated for decoding as users run it, without taps. Shown is the head nearest to its limit, and how many tokens "
            f"it remembers. PyTorch followed the engine at {followed} near-ties of the router; {refused} "
            "other choices of experts differed.</p>"
        )
        names = [heading for measure in MEASURES for heading in _headings(measure)]
        table = parts.scroll(parts.header("After", *names, "remembers"), lines)
        out.append(parts.section(f"Drift of the state ({item['name']})", about + table))
    return "".join(out)


def _headings(measure: str) -> list[str]:
    return [NAMES[measure], *(["limit"] if measure != "plain" else []), "result"]


def markdown(values: Values) -> list[list[str]]:
    """Rows of a table, the head first: by step, the largest error of each measure; nothing when there are none."""
    rows = []
    for item in values["drifts"]:
        for step in sorted({row["step"] for row in item["rows"]}):
            worst = [_worst([row for row in item["rows"] if row["step"] == step], measure) for measure in MEASURES]
            shown = ["not finite" if error["error"] is None else number(error["error"]) for error in worst]
            rows.append([item["name"], str(step), *shown, number(worst[0]["limit"])])
    return [["run", "decoded tokens", *(NAMES[measure] for measure in MEASURES), "limit"], *rows] if rows else []
