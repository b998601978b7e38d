"""The figures of a validation report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mxcompile.report.svg import Axis, Limit, Series, chart, number, strips
from mxcompile.validation.results import PositionErrors, ValidationReport


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and what it shows in words."""

    name: str
    title: str
    svg: str
    caption: str


def figures(report: ValidationReport) -> list[Figure]:
    """Every figure for which the report has numbers."""
    found = (
        draw(report)
        for draw in (_by_layer, _inside_layers, _by_position, _kl_by_position, _margins, _by_length, _greedy)
    )
    return [figure for figure in found if figure is not None]


def _by_layer(report: ValidationReport) -> Figure | None:
    layers = [item for item in report.layers if item.hidden is not None]
    if not layers:
        return None
    x = [item.layer for item in layers]
    limit = report.thresholds["limits"]["hidden"]["value"]
    series = [
        Series("largest", x, [item.hidden for item in layers], 1, "line+points"),
        Series("median", x, [item.hidden_median for item in layers], 2, "line+points"),
    ]
    return _figure(
        "by-layer",
        "Error by layer",
        "Relative error of the residual stream behind each layer, over the tokens of a prompt. A wrong part is a step up; 0 is the axis.",
        lambda name, title, text: chart(
            name,
            title,
            text,
            series,
            Axis("layer", integer=True),
            Axis("relative error", log=True),
            [Limit("limit", limit)],
        ),
        *(series),
    )


def _inside_layers(report: ValidationReport) -> Figure | None:
    layers = report.layers
    x = [item.layer for item in layers]
    series = [
        Series("recurrent state", x, [item.state for item in layers], 1, "points"),
        Series("keys", x, [item.key for item in layers], 2, "points"),
        Series("values", x, [item.value for item in layers], 3, "points"),
        Series("router logits", x, [item.router for item in layers], 4, "line+points"),
    ]
    series = [item for item in series if any(value is not None for value in item.y)]
    limits = report.thresholds["limits"]
    lines = [Limit("limit of the states", limits["states"]["value"])]
    if limits["router"]["value"] != limits["states"]["value"]:
        lines.append(Limit("limit of the router", limits["router"]["value"]))
    else:
        lines = [Limit("limit of states and router", limits["states"]["value"])]
    return _figure(
        "inside-layers",
        "Error inside the layers",
        "States (relative) show the first half of an attention, router logits (absolute) the rest of it and the router.",
        lambda name, title, text: chart(
            name, title, text, series, Axis("layer", integer=True), Axis("error", log=True), lines
        ),
        *series,
    )


def _longest(report: ValidationReport) -> PositionErrors | None:
    return max(report.positions, key=lambda item: len(item.positions), default=None)


def _by_position(report: ValidationReport) -> Figure | None:
    longest = _longest(report)
    if longest is None:
        return None
    series = Series("largest difference of a logit", longest.positions, longest.max_abs, 1)
    return _figure(
        "by-position",
        "Error by position",
        f"Largest difference of any logit at each position of the prompt of {longest.case} and the tokens decoded behind it.",
        lambda name, title, text: chart(
            name,
            title,
            text,
            [series],
            Axis("position", integer=True),
            Axis("logit difference", log=True),
            [Limit("limit", _logits_limit(report))],
            _decode_mark(longest),
        ),
        series,
    )


def _kl_by_position(report: ValidationReport) -> Figure | None:
    longest = _longest(report)
    if longest is None:
        return None
    series = Series("KL(PyTorch || engine)", longest.positions, longest.kl, 4)
    limit = report.thresholds["limits"]["kl"]["value"] * (_logit_factor(report) ** 2)
    return _figure(
        "kl-by-position",
        "KL divergence by position",
        "How far the engine's distribution of the next token is from PyTorch's, at each position of the same prompt.",
        lambda name, title, text: chart(
            name,
            title,
            text,
            [series],
            Axis("position", integer=True),
            Axis("nats", log=True),
            [Limit("limit", limit)],
            _decode_mark(longest),
        ),
        series,
    )


def _margins(report: ValidationReport) -> Figure | None:
    pairs = [(m, e) for item in report.positions for m, e in zip(item.margin, item.max_abs, strict=True) if m > 0 and e]
    if not pairs:
        return None
    pairs.sort()
    series = Series("one position", [m for m, _ in pairs], [e for _, e in pairs], 3, "points")
    stable = report.thresholds["limits"]["stable_margin"]["value"] * _logit_factor(report)
    return _figure(
        "margins",
        "Margin of the first token against the error",
        f"Right of the line at {number(stable)} PyTorch is sure of its first token, and the engine must choose the same one.",
        lambda name, title, text: chart(
            name,
            title,
            text,
            [series],
            Axis("PyTorch's margin between first and second token", log=True),
            Axis("logit difference", log=True),
            [Limit("limit", _logits_limit(report))],
            (stable, "sure") if pairs[0][0] <= stable <= pairs[-1][0] else None,
        ),
        series,
    )


def _by_length(report: ValidationReport) -> Figure | None:
    cases = [check for check in report.checks if check.group == "Prefill logits against PyTorch"]
    decoded = [check for check in report.checks if check.group == "Decode logits against PyTorch"]
    if len(cases) < 2 or len(decoded) != len(cases) or not all(check.measures for check in cases + decoded):
        return None
    x = range(len(cases))
    series = [
        Series("prefill", x, [check.measures[0].value for check in cases], 1, "bars"),
        Series("decode", x, [check.measures[0].value for check in decoded], 2, "bars"),
    ]
    names = [check.case.partition(" ")[0] for check in cases]
    return _figure(
        "by-length",
        "Error by prompt length",
        "Logit difference of each prompt and of the tokens decoded behind it.",
        lambda name, title, text: chart(
            name,
            title,
            text,
            series,
            Axis("prompt tokens"),
            Axis("logit difference"),
            [Limit("limit", _logits_limit(report))],
            x_names=names,
        ),
        *series,
    )


def _greedy(report: ValidationReport) -> Figure | None:
    rows = [
        (
            f"behind {run.prompt_tokens}: own continuation {run.own_agreed} of {run.tokens}, same input {run.teacher_forced:.1%}",
            run.agreed,
        )
        for run in report.greedy
    ]
    if not any(run.agreed for run in report.greedy):
        return None
    title, text = (
        "Greedy agreement",
        "Per step, whether engine and PyTorch choose the same token behind the same tokens; red where not.",
    )
    return Figure("greedy", title, strips("greedy", title, text, rows, "step"), text)


def _figure(name: str, title: str, text: str, draw: Callable[[str, str, str], str], *series: Series) -> Figure:
    """The figure; where every error is zero (nothing to draw on a logarithmic axis) the caption says so."""
    try:
        return Figure(name, title, draw(name, title, text), text)
    except ValueError:
        return Figure(name, title, "", f"{text} Nothing to draw.")


def _logit_factor(report: ValidationReport) -> float:
    return report.logit_scale / report.thresholds["logit_scale"]


def _logits_limit(report: ValidationReport) -> float:
    return report.thresholds["limits"]["logits"]["value"] * _logit_factor(report)


def _decode_mark(item: PositionErrors) -> tuple[float, str] | None:
    return None if item.decode_from is None else (item.decode_from, "decoded")
