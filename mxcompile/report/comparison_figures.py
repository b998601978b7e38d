"""The figures of a comparison page: curves by prompt length and batch, time by kind of layer, and the grid of long contexts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from mxcompile.planning.memory import tokens_text
from mxcompile.report import drift_section
from mxcompile.report.figures import Figure
from mxcompile.report.svg import WIDTH, Axis, Series, chart, number

Values = dict[str, Any]
COLOURS = 4
KINDS = ("lightning", "softmax", "experts", "rest")


def figures(values: Values) -> list[Figure]:
    """Every figure for which there are numbers."""
    found = [
        _by_length(values, "ttft", "ttft_s", 1e3, "Time to the first token", "milliseconds", True),
        _by_length(values, "itl", "itl_s", 1e3, "Time between tokens", "milliseconds", True),
        _by_length(
            values, "prefill-rate", "prefill_tokens_per_s", 1, "Prompt tokens per second", "tokens per second", True
        ),
        _by_length(values, "decode-rate", "decode_tokens_per_s", 1, "New tokens per second", "tokens per second", True),
        _by_batch(values),
        _by_length(values, "memory", "peak_bytes", 2**-20, "Peak memory of the process", "MiB", False),
        *(_layers(item, index) for index, item in enumerate(values["layer_times"])),
        *(_grid(item, index) for index, item in enumerate(values["needles"])),
        *drift_section.figures(values),
    ]
    return [figure for figure in found if figure is not None]


def _sides(rows: Sequence[Values]) -> dict[tuple[str, str], str]:
    """Label of each (bench, contestant)."""
    several = len({row["bench"] for row in rows}) > 1
    keys = dict.fromkeys((row["bench"], row["contestant"]) for row in rows)
    return {(bench, who): f"{who} ({bench})" if several else who for bench, who in keys}


def _by_length(values: Values, name: str, key: str, factor: float, title: str, unit: str, log: bool) -> Figure | None:
    rows = values["rows"]
    if not rows:
        return None
    batch = min(row["batch_size"] for row in rows)
    rows = [row for row in rows if row["batch_size"] == batch]
    spread = "; whiskers reach from the fastest to the slowest round" if key in ("ttft_s", "itl_s") else ""
    text = f"Medians by prompt length, for {_rows_text(batch)}{spread}."
    return _curves(
        name, title, text, rows, "prompt_length", key, factor, Axis("prompt tokens"), Axis(unit, log=log), tokens_text
    )


def _by_batch(values: Values) -> Figure | None:
    rows = values["rows"]
    if len({row["batch_size"] for row in rows}) < 2:
        return None
    length = min(row["prompt_length"] for row in rows)
    rows = [row for row in rows if row["prompt_length"] == length]
    text = f"New tokens per second of all sequences together, behind prompts of {length} tokens."
    axes = Axis("sequences at a time"), Axis("tokens per second", log=True)
    return _curves("by-batch", "Throughput by batch", text, rows, "batch_size", "decode_tokens_per_s", 1, *axes, str)


def _curves(
    name: str,
    title: str,
    text: str,
    rows: Sequence[Values],
    x_key: str,
    y_key: str,
    factor: float,
    x_axis: Axis,
    y_axis: Axis,
    x_text: Any,
) -> Figure | None:
    places = sorted({row[x_key] for row in rows})
    series = []
    for index, ((bench, who), label) in enumerate(_sides(rows).items()):
        mine = {row[x_key]: row[y_key] * factor for row in rows if _side(row) == (bench, who)}
        x = [places.index(place) for place in sorted(mine)]
        y = [mine[place] for place in sorted(mine)]
        ranges = [
            _ends(row, y_key, factor) for row in sorted(rows, key=lambda row: row[x_key]) if _side(row) == (bench, who)
        ]
        known = [pair for pair in ranges if pair is not None]
        series.append(Series(label, x, y, index % COLOURS + 1, "line+points", known if len(known) == len(x) else ()))
    try:
        drawing = chart(name, title, text, series, x_axis, y_axis, x_names=[x_text(place) for place in places])
    except ValueError:  # nothing that a logarithmic axis can show
        return None
    return Figure(name, title, drawing, text)


def _side(row: Values) -> tuple[str, str]:
    return row["bench"], row["contestant"]


def _ends(row: Values, key: str, factor: float) -> tuple[float, float] | None:
    """Least and most of a value over the rounds, where the row has them."""
    low, high = (row.get(f"{key.removesuffix('_s')}_{end}_s") for end in ("low", "high"))
    return None if low is None or high is None else (low * factor, high * factor)


def _layers(item: Values, index: int) -> Figure | None:
    name, title = f"layers-{index}", f"Time by kind of layer, {item['contestant']} ({item['bench']})"
    text = f"Shares of a prompt of {item['prompt_length']} tokens and of one decode step behind it, from a profiled run of its own."
    series = []
    for colour, (label, key) in enumerate((("prompt", "prefill_s"), ("decode step", "decode_s")), start=1):
        total = sum(item[key].values()) or 1.0
        series.append(
            Series(label, range(len(KINDS)), [100 * item[key][kind] / total for kind in KINDS], colour, "bars")
        )
    drawing = chart(name, title, text, series, Axis("kind of layer"), Axis("per cent"), x_names=KINDS)
    return Figure(name, title, drawing, text)


def _grid(item: Values, index: int) -> Figure | None:
    """A heat map: the fuller a cell, the nearer its error is to the limit, on a logarithmic scale of four decades."""
    cells = item["cells"]
    if not cells:
        return None
    lengths, depths = sorted({c["length"] for c in cells}), sorted({c["depth"] for c in cells})
    left, top, row_height, bottom = 58, 8, 30, 40
    height = top + row_height * len(lengths) + bottom
    width = (WIDTH - left - 8) / len(depths)
    name, title = f"needle-{index}", f"Long contexts ({item['name']})"
    text = (
        f"Largest logit difference from PyTorch where a key lies at a depth of a context; limit {number(item['limit'])}. "
        "Crossed out: over the limit. A circle: the engine's first token is the key's answer."
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(text)}</desc>'
    ]
    for cell in cells:
        x, y = left + width * depths.index(cell["depth"]), top + row_height * lengths.index(cell["length"])
        error, bad = cell["max_abs"], cell["status"] == "differs"
        opacity = 0.9 if bad or error is None else _fullness(error, item["limit"])
        look = "no" if bad else "key c1"
        at = f'x="{x:.1f}" y="{y}" width="{width - 3:.1f}" height="{row_height - 3}" rx="3"'
        parts.append(f'<rect class="{look}" fill-opacity="{opacity:.2f}" {at}/>')
        if bad:
            parts.append(
                f'<line class="limit" x1="{x:.1f}" x2="{x + width - 3:.1f}" y1="{y + row_height - 3}" y2="{y}"/>'
            )
        label = "not finite" if error is None else number(error)
        mark = " ○" if cell["engine_rank"] == 0 else ""
        parts.append(
            f'<text x="{x + width / 2:.1f}" y="{y + row_height / 2 + 3}" text-anchor="middle">{label}{mark}</text>'
        )
    for place, length in enumerate(lengths):
        middle = top + row_height * place + row_height / 2 + 3
        parts.append(f'<text class="tick" x="{left - 6}" y="{middle}" text-anchor="end">{tokens_text(length)}</text>')
    low = top + row_height * len(lengths)
    for place, depth in enumerate(depths):
        parts.append(
            f'<text class="tick" x="{left + width * (place + 0.5):.1f}" y="{low + 12}" text-anchor="middle">{depth} %</text>'
        )
    parts.append(
        f'<text class="axis" x="{(left + WIDTH) / 2}" y="{low + 30}" text-anchor="middle">depth of the key</text></svg>'
    )
    return Figure(name, title, "".join(parts), text)


def _fullness(error: float, limit: float) -> float:
    decades = math.log10(max(error, limit * 1e-4) / limit) if limit > 0 else 0.0
    return 0.08 + 0.5 * min(1.0, max(0.0, 1 + decades / 4))


def _rows_text(batch: int) -> str:
    return "one sequence" if batch == 1 else f"{batch} sequences at a time"
