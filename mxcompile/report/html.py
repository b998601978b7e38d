"""A validation report as one HTML page that needs nothing else: no network, no script, no file beside it.

A page is a list of sections; each is a function from the report to HTML, or to nothing when there is nothing to show.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from mxcompile.report.figures import figures
from mxcompile.report.files import write_text
from mxcompile.report.style import CSS
from mxcompile.report.summary import (
    STATUS_WORDS,
    cases_text,
    greedy_text,
    groups,
    headline,
    largest_logit_difference,
    limit_text,
)
from mxcompile.report.svg import number
from mxcompile.validation.results import Status, ValidationReport

Section = Callable[[ValidationReport], str]


def write_html(report: ValidationReport, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    write_text(path, page(report))


def page(report: ValidationReport) -> str:
    """The whole page."""
    title = f"mxcompile validation: {headline(report).lower()}"
    body = "".join(section(report) for section in SECTIONS)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def _head(report: ValidationReport) -> str:
    engine = report.engine
    model = engine["model"]
    family = {"text-01": "MiniMax-Text-01", "m1": "MiniMax-M1", "vl-01": "MiniMax-VL-01"}.get(
        model.get("family"), "model"
    )
    subject = f"{engine['target']} engine in {engine['dtype']}, {family} architecture, {engine['layers']} layers"
    return (
        f"<h1>Does the engine compute what PyTorch computes?</h1>"
        f'<p class="soft">{escape(subject)}. {escape(report.created[:16].replace("T", " ") + " UTC")}, {report.seconds:.1f} s.</p>'
    )


def _verdict(report: ValidationReport) -> str:
    status: Status = "passed" if report.passed else "failed" if report.failed else "inconclusive"
    sign = {"passed": "✓", "failed": "✗", "inconclusive": "?"}[status]
    return (
        f'<div class="verdict {status}" role="status"><strong>{sign} {headline(report)}</strong>'
        f"<p>{escape(report.verdict)}</p></div>"
    )


def _cards(report: ValidationReport) -> str:
    passed = sum(check.passed for check in report.checks)
    cards = [(f"{passed} of {len(report.checks)}", "checks pass")]
    worst = largest_logit_difference(report)
    if worst is not None:
        cards.append((number(worst.value), f"{worst.name} against PyTorch, limit {number(worst.limit)}"))
    cards.append((number(report.logit_scale), "scale of the logits (mean largest |logit|)"))
    cards.append((greedy_text(report), "of the greedy continuations are identical"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{escape(value)}</b>{escape(text)}</div>' for value, text in cards)
        + "</div>"
    )


def _overview(report: ValidationReport) -> str:
    rows = []
    for summary in groups(report):
        worst = summary.worst
        place = ", ".join(part for part in (summary.worst_case, worst.where if worst else "") if part)
        rows.append(
            _row(
                ("Check", f'<th scope="row">{escape(summary.group)}</th>'),
                ("Cases", cases_text(summary)),
                ("Nearest to its limit", escape(worst.name) if worst else ""),
                ("Value", number(worst.value) if worst else ""),
                ("Limit", limit_text(worst) if worst else ""),
                ("Where", escape(place)),
                ("Result", _tag(summary.status)),
            )
        )
    head = _table_head("Check", "#Cases", "Nearest to its limit", "#Value", "#Limit", "Where", "Result")
    return _section(
        "What was checked",
        f'<div class="scroll"><table class="stack">{head}<tbody>{"".join(rows)}</tbody></table></div>',
    )


def _figures(report: ValidationReport) -> str:
    drawn = figures(report)
    if not drawn:
        return ""
    items = "".join(
        f"<figure><h3>{escape(figure.title)}</h3>{figure.svg}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in drawn
    )
    return _section("Figures", f'<div class="figures">{items}</div>')


def _layers(report: ValidationReport) -> str:
    if not report.layers:
        return ""
    rows = []
    for item in report.layers:
        errors = (item.state, item.key, item.value, item.router, item.hidden, item.hidden_median)
        cells = [
            (name, "" if error is None else number(error)) for name, error in zip(_LAYER_COLUMNS, errors, strict=True)
        ]
        at_fault = report.fault is not None and report.fault.layer == item.layer
        label = f"{item.layer} {escape(item.kind)}" + (
            ' <span class="tag failed">first difference</span>' if at_fault else ""
        )
        rows.append(_row(("Layer", f'<th scope="row">{label}</th>'), *cells, numeric=set(_LAYER_COLUMNS)))
    head = _table_head("Layer", *(f"#{name}" for name in _LAYER_COLUMNS))
    return _section(
        "Errors by layer",
        f'<div class="scroll"><table class="stack">{head}<tbody>{"".join(rows)}</tbody></table></div>',
    )


_LAYER_COLUMNS = (
    "State, relative",
    "Keys, relative",
    "Values, relative",
    "Router logits",
    "Behind the layer, relative",
    "Median of it",
)


def _notes(report: ValidationReport) -> str:
    notes = [f"{check.group}, {check.case}: {note}" for check in report.checks for note in check.notes]
    parts = []
    if notes:
        parts.append("<h3>Ties</h3>" + _list(notes))
    if report.not_run:
        parts.append("<h3>Not run</h3>" + _list(f"{item.check}: {item.reason}" for item in report.not_run))
    return _section("Set aside and not run", "".join(parts)) if parts else ""


def _sides(report: ValidationReport) -> str:
    def describe(side: dict[str, Any]) -> dict[str, str]:
        checkpoint = side["checkpoint"] or {}
        return {
            "Runs on": side["target"],
            "Numbers": side["dtype"] + (f", quantized: {side['quantization']}" if side["quantization"] else ""),
            "Weights": "read from the checkpoint as they are used" if side.get("streams") else "held in memory",
            "Layers": str(side["layers"]),
            "Largest batch": str(side["max_batch_size"]),
            "Longest sequence": str(side["max_seq_len"]),
            "Checkpoint": str(checkpoint.get("path", "unknown")),
            "Fingerprint": str(checkpoint.get("fingerprint", "unknown")),
            "Versions": ", ".join(f"{name} {version}" for name, version in side["versions"].items()),
        }

    engine, reference = describe(report.engine), describe(report.reference)
    rows = "".join(
        _row(
            ("", f'<th scope="row">{escape(key)}</th>'),
            ("Engine", escape(engine[key])),
            ("Reference", escape(reference[key])),
        )
        for key in engine
    )
    return _section(
        "Engine and reference",
        f'<table class="stack pair">{_table_head("", "Engine", "Reference")}<tbody>{rows}</tbody></table>',
    )


def _environment(report: ValidationReport) -> str:
    machine = report.environment
    memory = machine.get("memory_total")
    values = {
        "Machine": f"{machine.get('cpu')}, {machine.get('cores')} CPUs"
        + (f", {memory / 2**30:.0f} GiB" if memory else ""),
        "GPUs": ", ".join(gpu["name"] for gpu in machine.get("gpus", ())) or "none",
        "System": f"{machine.get('system')}, Python {machine.get('python')}",
        "Libraries": ", ".join(f"{name} {version}" for name, version in machine.get("libraries", {}).items()),
        "Options": ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in report.options.items()),
    }
    rows = "".join(
        _row(("", f'<th scope="row">{key}</th>'), (key, escape(str(value)))) for key, value in values.items()
    )
    return _section("Environment", f"<table><tbody>{rows}</tbody></table>")


def _all_checks(report: ValidationReport) -> str:
    rows = []
    for summary in groups(report):
        rows.append(
            f'<tr class="group"><th colspan="5" scope="rowgroup">{escape(summary.group)} {_tag(summary.status)}</th></tr>'
        )
        for check in summary.checks:
            aside = check.compared - check.judged
            case = escape(check.case) + (
                f' <span class="soft">({aside} of {check.compared} set aside)</span>' if aside else ""
            )
            for index, measure in enumerate(check.measures):
                where = f' <span class="soft">({escape(measure.where)})</span>' if measure.where else ""
                rows.append(
                    _row(
                        ("Case", case if not index else ""),
                        ("Measure", escape(measure.name) + where),
                        ("Value", number(measure.value)),
                        ("Limit", limit_text(measure)),
                        ("Result", _tag("passed" if measure.passed else "failed")),
                    )
                )
    head = _table_head("Case", "Measure", "#Value", "#Limit", "Result")
    return _section(
        "All numbers", f'<div class="scroll"><table class="stack">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _limits(report: ValidationReport) -> str:
    thresholds = report.thresholds
    how = (
        "The largest error of all positions must keep the limit. A row in which the reference's own router has a near-tie, and whose "
        "errors begin exactly there, is compared up to that position only; such ties are named above."
        if thresholds["exact"]
        else "The median error must keep the limit, which is twice that of PyTorch itself in this type: many tokens meet a router "
        "near-tie and go to another expert."
    )
    rows = "".join(
        _row(
            ("Limit on", f'<th scope="row">{escape(name.replace("_", " "))}</th>'),
            ("Value", number(limit["value"])),
            ("Reason", escape(limit["reason"])),
        )
        for name, limit in thresholds["limits"].items()
    )
    text = (
        f"<p>Limits for {escape(thresholds['dtype'])}. {how} Limits on logits hold at a scale of "
        f"{number(thresholds['logit_scale'])} and were multiplied by {number(report.logit_scale / thresholds['logit_scale'])}, "
        f"and that on KL by its square.</p>"
    )
    table = f'<div class="scroll"><table class="stack">{_table_head("Limit on", "#Value", "Reason")}<tbody>{rows}</tbody></table></div>'
    return _section("The limits and their reasons", text + table)


SECTIONS: Sequence[Section] = (
    _head,
    _verdict,
    _cards,
    _overview,
    _figures,
    _layers,
    _notes,
    _sides,
    _environment,
    _all_checks,
    _limits,
)

_NUMERIC = {"Cases", "Value", "Limit"}


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table_head(*columns: str) -> str:
    """Columns that begin with # hold numbers."""
    cells = (
        f'<th scope="col" class="n">{escape(name[1:])}</th>'
        if name[:1] == "#"
        else f'<th scope="col">{escape(name)}</th>'
        for name in columns
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _row(*cells: tuple[str, str], numeric: set[str] = _NUMERIC) -> str:
    """A table row of (column, HTML); a cell that brings its own `<th>` stays as it is."""
    parts = []
    for name, content in cells:
        if content.startswith("<th"):
            parts.append(content)
            continue
        css = ' class="n"' if name in numeric else ""
        label = f' data-name="{escape(name)}"' if name and content else ""
        parts.append(f"<td{css}{label}>{content}</td>")
    return f"<tr>{''.join(parts)}</tr>"


def _tag(status: Status) -> str:
    return f'<span class="tag {status}">{STATUS_WORDS[status]}</span>'


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    return "default" if value is None else str(value)
