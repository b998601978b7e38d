"""A comparison as CSV (one line per measured cell) and as Markdown."""

from __future__ import annotations

import csv
import io
from typing import Any

from mxcompile.report.svg import number

Values = dict[str, Any]


def to_csv(values: Values) -> str:
    """All rows with all their keys; empty where there is no value."""
    out = io.StringIO()
    if values["rows"]:
        writer = csv.DictWriter(out, fieldnames=list(values["rows"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(values["rows"])
    return out.getvalue()


def to_markdown(values: Values) -> str:
    """Verdict, the main numbers, and what was not run."""
    verdict = values["verdict"]
    lines = [f"# {verdict['headline']}", "", *(f"- {text}" for text in verdict["sentences"]), ""]
    if values["rows"]:
        heads = [
            "bench",
            "prompt × batch",
            "contestant",
            "first token ms",
            "next token ms",
            "p99 ms",
            "prompt tok/s",
            "new tok/s",
            "peak MiB",
        ]
        cost = values["price_per_hour"] is not None
        heads += ["cost per M in", "cost per M out"] if cost else []
        lines += [_line(heads), _line(["---"] * 3 + ["---:"] * (len(heads) - 3))]
        for row in values["rows"]:
            cells = [row["bench"], f"{row['prompt_length']} × {row['batch_size']}", row["contestant"]]
            cells += [number(row[key] * 1e3) for key in ("ttft_s", "itl_s", "itl_p99_s")]
            cells += [
                number(row["prefill_tokens_per_s"]),
                number(row["decode_tokens_per_s"]),
                number(row["peak_bytes"] / 2**20),
            ]
            cells += [number(row["input_cost_per_million"]), number(row["output_cost_per_million"])] if cost else []
            lines.append(_line(cells))
        lines.append("")
    for title, items in (
        ("Not run", [f"{item['what']}: {item['reason']}" for item in values["not_run"]]),
        ("To know", values["notes"]),
    ):
        if items:
            lines += [f"## {title}", "", *(f"- {text}" for text in items), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
