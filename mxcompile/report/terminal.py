"""A validation report as tables on the terminal."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mxcompile.quantized import rounded_weights_of
from mxcompile.report.summary import STATUS_WORDS, cases_text, greedy_text, groups, limit_text
from mxcompile.report.svg import number
from mxcompile.validation.results import ValidationReport

_STYLES = {"passed": "green", "failed": "bold red", "inconclusive": "yellow"}
_PIPE_WIDTH = 200  # a pipe has no width: lines that grep should find whole must not be wrapped


def print_report(report: ValidationReport, console: Console | None = None) -> None:
    """One line per group of checks, the failing cases, the layers when something failed, and the verdict last."""
    console = console or Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    table = Table(title=_title(report), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column, justify in (
        ("check", "left"),
        ("cases", "right"),
        ("worst", "right"),
        ("limit", "right"),
        ("where", "left"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("result")
    for summary in groups(report):
        worst = summary.worst
        value, limit = (number(worst.value), limit_text(worst)) if worst else ("", "")
        where = ", ".join(part for part in (summary.worst_case, worst.where if worst else "") if part)
        result = Text(STATUS_WORDS[summary.status], _STYLES[summary.status])
        table.add_row(escape(summary.group), cases_text(summary), value, limit, escape(where), result)
    console.print(table)
    for check in report.failed[:10]:
        for measure in check.measures:
            if not measure.passed:
                place = f" at {measure.where}" if measure.where else ""
                text = f"{check.group}, {check.case}: {measure.name} {number(measure.value)} is not {limit_text(measure)}{place}"
                console.print(Text(text, "red"), soft_wrap=True)
    if len(report.failed) > 10:
        console.print(f"... and {len(report.failed) - 10} more failing checks")
    if not report.passed and report.layers:
        _print_layers(report, console)
    for check in report.checks:
        for note in check.notes:
            console.print(Text(f"{check.group}, {check.case}: {note}", "dim"), soft_wrap=True)
    for item in report.not_run:
        console.print(Text(f"not run: {item.check} ({item.reason})", "dim"), soft_wrap=True)
    effect = (report.engine.get("quantization") or {}).get("effect")
    if effect is not None:
        console.print(
            f"{rounded_weights_of(report.engine['quantization'])} against the checkpoint's own: logits "
            f"{number(effect['relative_logit_error'])} apart, KL {number(effect['kl_divergence'])} nats, the same first token "
            f"at {effect['same_first_token']:.1%} of {effect['tokens']:.0f} positions",
            soft_wrap=True,
        )
    console.print(f"greedy: {greedy_text(report)} identical, {report.seconds:.1f} s in all", soft_wrap=True)
    console.print(Text(report.verdict, "bold green" if report.passed else "bold red"), soft_wrap=True)


def _title(report: ValidationReport) -> str:
    engine, reference = report.engine, report.reference
    rounded = f" ({rounded_weights_of(engine['quantization'])})" if engine["quantization"] else ""
    read = " (weights read as they are used)" if reference.get("streams") else ""
    against = f"{reference['target']} {reference['dtype']}{read}"
    return f"{engine['target']} {engine['dtype']}{rounded} against {against}, {engine['layers']} layers"


def _print_layers(report: ValidationReport, console: Console) -> None:
    table = Table(title="errors by layer", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("layer", "kind", "state", "keys", "values", "router", "behind the layer"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for item in report.layers:
        errors = (item.state, item.key, item.value, item.router, item.hidden)
        style = "red" if report.fault is not None and report.fault.layer == item.layer else ""
        cells = ("" if error is None else number(error) for error in errors)
        table.add_row(str(item.layer), item.kind, *cells, style=style)
    console.print(table)
