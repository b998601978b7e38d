"""A comparison as CSV (a table of measured cells, then one each of perplexities and drifts) and as Markdown."""

from __future__ import annotations

import csv
import io
from typing import Any

from mxcompile.report import drift_section, perplexity_section
from mxcompile.report.svg import number

Values = dict[str, Any]


def to_csv(values: Values) -> str:
    """All rows with all their keys, empty where there is no value; tables are parted by an empty line, and each has a head."""
    texts = [{"text": item["name"]} | row for item in values["perplexities"] for row in item["summary"]]
    drifts = [
        {"run": item["name"], "step": row["step"], "layer": row["layer"]} | error
        for item in values["drifts"]
        for row in item["rows"]
        for error in row["errors"]
    ]
    out = []
    for rows in (values["rows"], texts, drifts):
        if rows:
            stream = io.StringIO()
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            out.append(stream.getvalue())
    return "\n".join(out)


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
    for table in (perplexity_section.markdown(values), drift_section.markdown(values)):
        if table:
            lines += [_line(table[0]), _line(["---"] * len(table[0])), *(_line(row) for row in table[1:]), ""]
    for title, items in (
        ("Not run", [f"{item['what']}: {item['reason']}" for item in values["not_run"]]),
        ("To know", values["notes"]),
    ):
        if items:
            lines += [f"## {title}", "", *(f"- {text}" for text in items), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
