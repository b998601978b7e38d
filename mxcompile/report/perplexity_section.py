"""Perplexity of a text in a comparison: its values, its part of the page, and its lines of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mxcompile.bench.perplexity_results import PerplexityReport, verdict
from mxcompile.report import parts
from mxcompile.report.svg import number

Values = dict[str, Any]


def plain(name: str, report: PerplexityReport) -> Values:
    """The measurement for the JSON form; the values of single tokens stay in its own file."""
    values = report.to_dict()
    sides = [{key: value for key, value in side.items() if key != "nll"} for side in values["sides"]]
    return {"name": name, "verdict": verdict(report)} | values | {"sides": sides}


def not_run(name: str, report: PerplexityReport) -> list[dict[str, str]]:
    """Contestants that are missing, and an unfinished run."""
    found = [{"what": f"{name}: {side.name}", "reason": side.left_out} for side in report.sides if side.left_out]
    if not report.finished:
        reason = "it was interrupted; go on with `mxcompile bench --perplexity --resume`"
        found.append({"what": f"{name}: the rest of the text", "reason": reason})
    return found


def section(values: Values) -> str:
    """A table for every text."""
    out = []
    for index, item in enumerate(values["perplexities"]):
        key = f"perplexities.{index}"
        lines = []
        for place, row in enumerate(item["summary"]):
            cells = "".join(
                parts.cell(name, f"{key}.summary.{place}.{entry}", row[entry], show) for name, entry, show in COLUMNS
            )
            lines.append(f'<tr><th scope="row">{escape(row["name"])}, {escape(row["dtype"])}</th>{cells}</tr>')
        text = item["text"]
        limit, change = (
            parts.value(f"{key}.{name}", item[name], number(item[name])) for name in ("limit", "change_limit")
        )
        limits = (
            f"Limits of the engine: {change} on the change, {limit} on the median difference." if item["limit"] else ""
        )
        about = (
            f"<p>{escape(str(text['path']))}: {parts.value(f'{key}.text.tokens', text['tokens'], str(text['tokens']))} tokens in contexts "
            f"of {parts.value(f'{key}.options.context', item['options']['context'], str(item['options']['context']))}. The perplexity is "
            "exp of the mean of -log p over all tokens but the first; differences are of a token's -log p in nats, from PyTorch's. "
            f"{limits}</p>"
        )
        head = parts.header("Contestant", *(name for name, _, _ in COLUMNS))
        out.append(parts.section(f"Perplexity ({item['name']})", about + parts.scroll(head, lines)))
    return "".join(out)


def _exact(value: float) -> str:
    return f"{value:.6g}"


def _signed(value: float) -> str:
    return f"{value:+.1e}"


COLUMNS: Sequence[tuple[str, str, Any]] = (
    ("Perplexity", "perplexity", _exact),
    ("Change", "change", _signed),
    ("Nats a token", "mean_nll", _exact),
    ("Tokens", "tokens", str),
    ("Median difference", "median_difference", number),
    ("Largest", "largest_difference", number),
    ("at token", "largest_at", str),
)


def markdown(values: Values) -> list[list[str]]:
    """Rows of a table, the head first; nothing when there are none."""
    rows = [
        [
            item["name"],
            f"{row['name']} {row['dtype']}",
            *("" if row[key] is None else show(row[key]) for _, key, show in COLUMNS),
        ]
        for item in values["perplexities"]
        for row in item["summary"]
    ]
    return [["text", "contestant", *(name.lower() for name, _, _ in COLUMNS)], *rows] if rows else []
