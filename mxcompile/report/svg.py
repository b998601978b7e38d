"""Small charts as inline SVG: lines, points and bars on linear or logarithmic axes, and strips of yes and no.

No scripts and no fonts of their own. Colours and dashes are CSS classes (`style.CSS`), so that one drawing serves light, dark and print.
A series is told by its dashes and the shape of its points as well as by its colour, and the legend shows all three. A drawing is small,
so that its text stays readable when it is scaled to a phone's width, and carries a title and a description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 40
CHARACTER = 6.0  # width of one, on average, at the size of the legend
KEY = 24  # width of a sample in the legend: one period of every dash pattern
MAX_POINTS = 1200  # of one series; longer ones are thinned to the largest value of each stretch
_CORNERS = {
    2: ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    3: ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
    4: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
}


@dataclass(frozen=True)
class Series:
    """Numbers to draw. `colour`: 1 to 4. Values that are None or not finite leave a gap. `ranges`: (low, high) of every point, drawn
    as whiskers."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 1
    form: Literal["line", "points", "line+points", "bars"] = "line"
    ranges: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Limit:
    """A horizontal line with a name."""

    label: str
    y: float


@dataclass(frozen=True)
class Axis:
    """Labels of an axis; `integer` keeps ticks whole."""

    label: str
    log: bool = False
    integer: bool = False


def chart(
    name: str,
    title: str,
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    limits: Sequence[Limit] = (),
    mark_x: tuple[float, str] | None = None,
    x_names: Sequence[str] = (),
) -> str:
    """One chart as an `<svg>` element; `name` is unique in the page. `mark_x` is a vertical line with a name. `x_names` name the
    x values 0, 1, 2, ... Raises ValueError when there is nothing to draw."""
    points = [(s, [(a, b) for a, b in zip(s.x, s.y, strict=True) if _drawable(b, y.log)]) for s in series]
    values = [float(b) for _, pairs in points for _, b in pairs if b is not None and (b > 0 or not y.log)]
    widths = [float(a) for s in series for a in s.x]
    if not values or not widths:
        raise ValueError(f"chart {name} has nothing to draw")
    heights = values + [limit.y for limit in limits]
    heights += [end for s in series for ends in s.ranges for end in ends if _drawable(end, y.log)]
    bars = any(s.form == "bars" for s in series)
    x_low, x_high = min(widths), max(widths)
    if bars or x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = _range(heights, y.log)
    place_x = _scale(x_low, x_high, LEFT, WIDTH - RIGHT, x.log)
    place_y = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP, y.log)
    parts = [_frame(name, title, description)]
    for tick in _ticks(y_low, y_high, y):
        at = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    names = dict(enumerate(x_names))
    for tick in names or _ticks(x_low, x_high, x):
        at = place_x(tick)
        label = escape(names[int(tick)]) if names else number(tick)
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{label}</text>')
    if mark_x is not None:
        at = place_x(mark_x[0])
        end = at > WIDTH / 2
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at + (-4 if end else 4):.1f}" y="{TOP + 9}" '
            f'text-anchor="{"end" if end else "start"}">{escape(mark_x[1])}</text>'
        )
    bar_series = [s for s in series if s.form == "bars"]
    for item, pairs in points:
        drawn = [(place_x(a), place_y(float(b))) for a, b in _thin(pairs) if b is not None]
        if item.form == "bars":
            parts.append(_bars(item, drawn, place_x, bar_series.index(item), len(bar_series)))
            continue
        if "line" in item.form and len(drawn) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in drawn)
            parts.append(f'<polyline class="line c{item.colour}" points="{path}"/>')
        for at, (low, high) in zip(item.x, item.ranges, strict=False):
            if _drawable(low, y.log) and _drawable(high, y.log):
                ends = f'y1="{place_y(low):.1f}" y2="{place_y(high):.1f}"'
                parts.append(
                    f'<line class="line whisker c{item.colour}" x1="{place_x(at):.1f}" x2="{place_x(at):.1f}" {ends}/>'
                )
        if "points" in item.form or len(drawn) == 1:
            size = 2.6 if len(drawn) < 100 else 1.3
            parts.append(
                f'<path class="dot c{item.colour}" d="{"".join(_point(item.colour, *at, size) for at in drawn)}"/>'
            )
    for limit in limits:
        at = place_y(limit.y)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        above = at > TOP + 14
        parts.append(
            f'<text class="limit-name" x="{LEFT + 5}" y="{at - 4 if above else at + 12:.1f}" '
            f'text-anchor="start">{escape(limit.label)}</text>'
        )
    parts += _axes(x, y)
    parts.append(_legend(series))
    parts.append("</svg>")
    return "".join(parts)


def strips(name: str, title: str, description: str, rows: Sequence[tuple[str, Sequence[bool]]], x_label: str) -> str:
    """One strip per row: a cell per step, filled where it is true, crossed out where it is false."""
    longest = max((len(cells) for _, cells in rows), default=0)
    if not longest:
        raise ValueError(f"chart {name} has nothing to draw")
    row_height, top = 34, 12
    height = top + row_height * len(rows) + BOTTOM
    left = 14
    place = _scale(0, longest, left, WIDTH - RIGHT, False)
    parts = [_frame(name, title, description, height)]
    for index, (label, cells) in enumerate(rows):
        y = top + index * row_height
        parts.append(f'<text class="tick" x="{left}" y="{y + 9}">{escape(label)}</text>')
        for start, end, value in _stretches(cells):
            a, b = place(start), place(end)
            parts.append(
                f'<rect class="{"yes" if value else "no"}" x="{a:.1f}" y="{y + 13}" width="{max(b - a, 0.8):.1f}" height="12"/>'
            )
            if not value:  # not by colour alone
                parts.append(f'<line class="limit" x1="{a:.1f}" x2="{b:.1f}" y1="{y + 25}" y2="{y + 13}"/>')
    bottom = top + row_height * len(rows)
    for tick in _ticks(0, longest, Axis("", integer=True)):
        parts.append(
            f'<text class="tick" x="{place(tick):.1f}" y="{bottom + 12}" text-anchor="middle">{number(tick)}</text>'
        )
    parts.append(f'<text class="axis" x="{WIDTH / 2}" y="{bottom + 30}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append("</svg>")
    return "".join(parts)


def number(value: float) -> str:
    """A short form: 1000, 0.25, 2e-4, not finite."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _frame(name: str, title: str, description: str, height: float = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )


def _axes(x: Axis, y: Axis) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return [
        f'<path class="frame" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>',
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>',
        f'<text class="axis" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>',
    ]


def _legend(series: Sequence[Series]) -> str:
    """A sample of each series beside its name: a piece of its line, its point or its bar."""
    parts, at = [], float(LEFT)
    row = 0
    for item in series:
        width = KEY + 5 + CHARACTER * len(item.label) + 10
        if at + width > WIDTH and at > LEFT:
            at, row = float(LEFT), row + 1
        y = 11 + 14 * row
        parts.append(_sample(item, at, y - 3.5))
        parts.append(f'<text class="legend" x="{at + KEY + 5:.1f}" y="{y}">{escape(item.label)}</text>')
        at += width
    return "".join(parts)


def _sample(item: Series, x: float, y: float) -> str:
    if item.form == "bars":
        return f'<g class="bar c{item.colour}"><rect x="{x + KEY - 12:.1f}" y="{y - 4:.1f}" width="11" height="8"/></g>'
    line = f'<line class="line c{item.colour}" x1="{x:.1f}" x2="{x + KEY:.1f}" y1="{y}" y2="{y}"/>'
    point = f'<path class="dot c{item.colour}" d="{_point(item.colour, x + KEY / 2, y, 2.6)}"/>'
    return (line if "line" in item.form else "") + (point if "points" in item.form else "")


def _point(colour: int, x: float, y: float, size: float) -> str:
    """A circle, a square, a triangle or a diamond around a place, of about the same area, as a piece of a path."""
    if colour == 1:
        return f"M{x - size:.1f} {y:.1f}a{size} {size} 0 1 0 {2 * size} 0a{size} {size} 0 1 0 {-2 * size} 0"
    corners = _CORNERS[colour]
    return "M" + "L".join(f"{x + a * size:.1f} {y + b * size:.1f}" for a, b in corners) + "Z"


def _bars(
    item: Series, drawn: Sequence[tuple[float, float]], place_x: Callable[[float], float], index: int, count: int
) -> str:
    whole = (place_x(1) - place_x(0)) * 0.8
    width = whole / count
    bars = "".join(
        f'<rect x="{x - whole / 2 + index * width:.1f}" y="{y:.1f}" width="{width * 0.94:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"/>'
        for x, y in drawn
    )
    return f'<g class="bar c{item.colour}">{bars}</g>'


def _drawable(value: float | None, log: bool) -> bool:
    """Zero has no place on a logarithmic axis and is drawn on its end."""
    return value is not None and math.isfinite(value) and (value >= 0 or not log)


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        # Whole decades; values far below the rest, such as exact agreement, must not flatten it.
        low = max(low, high * 1e-9)
        return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 0.1)
    low = min(low, 0.0)
    return low, high + (high - low) * 0.06 if high > low else low + 1


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    def place(value: float) -> float:
        if log:
            share = (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        else:
            share = (value - low) / (high - low)
        return start + (end - start) * min(max(share, 0.0), 1.0)

    return place


def _ticks(low: float, high: float, axis: Axis) -> list[float]:
    if axis.log:
        first, last = round(math.log10(low)), round(math.log10(high))
        return [10.0**exponent for exponent in range(first, last + 1, max(1, math.ceil((last - first) / 6)))]
    raw = (high - low) / 6
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    if axis.integer:
        step = max(1.0, math.ceil(step))
    start = math.ceil(low / step - 1e-9)
    return [index * step for index in range(start, math.floor(high / step + 1e-9) + 1)]


def _thin(pairs: Sequence[tuple[float, float | None]]) -> Sequence[tuple[float, float | None]]:
    """At most MAX_POINTS, the largest of each stretch, so that a peak stays visible."""
    if len(pairs) <= MAX_POINTS:
        return pairs
    size = math.ceil(len(pairs) / MAX_POINTS)
    return [max(pairs[i : i + size], key=lambda pair: pair[1] or 0.0) for i in range(0, len(pairs), size)]


def _stretches(cells: Sequence[bool]) -> list[tuple[int, int, bool]]:
    out: list[tuple[int, int, bool]] = []
    for index, cell in enumerate(cells):
        if out and out[-1][2] == cell:
            out[-1] = (out[-1][0], index + 1, cell)
        else:
            out.append((index, index + 1, cell))
    return out
