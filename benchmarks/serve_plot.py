"""The drawing of `serve_load.py`'s numbers: serve_plot.py NUMBERS.json > DRAWING.svg draws them again."""

from __future__ import annotations

import json
import sys
from typing import Any

from mxcompile.report.style import CSS
from mxcompile.report.svg import HEIGHT, WIDTH, Axis, Series, chart

GAP, HEAD = 20, 40
WAYS = {"engine_alone": "engine alone", "http": "HTTP", "grpc": "gRPC", "openai": "OpenAI"}


def plot(values: dict[str, Any]) -> str:
    """Four charts as one SVG document: throughput, first token, next token by clients; and throughput by way in."""
    levels = values["by_concurrency"]
    places, names = range(len(levels)), [str(level["clients"]) for level in levels]
    x = Axis("clients")

    def rounds(entry: dict[str, Any]) -> tuple[float, float]:
        found = entry["tokens_per_s"]["rounds"]
        return min(found), max(found)

    def latency(name: str, title: str, key: str) -> str:
        series = [
            Series(point, places, [level[key][point] for level in levels], colour, "line+points")
            for colour, point in enumerate(("p50", "p90", "p99"), 1)
        ]
        return chart(
            name,
            title,
            f"{title} in milliseconds, by clients",
            series,
            x,
            Axis(f"{title}, ms", log=True),
            x_names=names,
        )

    rates = [level["tokens_per_s"]["median"] for level in levels]
    speed = Series("tokens/s, median and range of rounds", places, rates, 1, "line+points", list(map(rounds, levels)))
    ways = {name: values["ways_in"][name] for name in WAYS}
    bars = Series(
        f"tokens/s at {values['ways_in']['clients']} clients, median of rounds",
        range(len(ways)),
        [way["tokens_per_s"]["median"] for way in ways.values()],
        3,
        "bars",
    )
    charts = [
        chart("throughput", "Throughput", "Tokens per second, by clients", [speed], x, Axis("tokens/s"), x_names=names),
        chart(
            "ways",
            "Throughput by way in",
            "Tokens per second",
            [bars],
            Axis(""),
            Axis("tokens/s"),
            x_names=list(WAYS.values()),
        ),
        latency("first", "Time to first token", "time_to_first_token_ms"),
        latency("next", "Inter-token latency", "inter_token_latency_ms"),
    ]
    engine, machine = values["engine"], values["machine"]
    caption = (
        f"{engine['layers']} layers of {engine['hidden_size']}, {engine['dtype']}, {engine['target']}; {machine['cpu']}, "
        f"{machine['cores']} cores; {values['date']}"
    )
    width, height = 2 * WIDTH + 3 * GAP, HEAD + 2 * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{CSS} svg svg{{width:{WIDTH}px;height:{HEIGHT}px}} svg .title{{font-size:13px}}</style>",
        f'<rect width="{width}" height="{height}" style="fill:var(--panel)"/>',
        f'<text class="title" x="{GAP}" y="24">{caption}</text>',
    ]
    for index, drawing in enumerate(charts):
        left, top = GAP + index % 2 * (WIDTH + GAP), HEAD + index // 2 * (HEIGHT + GAP)
        placed = f'<svg x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(drawing.replace("<svg ", placed, 1))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        sys.stdout.write(plot(json.load(file)))
