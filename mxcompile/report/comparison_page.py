"""A comparison as one HTML page that needs nothing else. Every number in it is taken from the JSON form: cells carry the key of their
value there (`data-key`) and the value itself (`data-value`), so that a test, or a reader, can hold one against the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from mxcompile.bench.agreement import SAME
from mxcompile.cli.output import bytes_text
from mxcompile.report import drift_section, parts, perplexity_section
from mxcompile.report import html as validation_page
from mxcompile.report.comparison_figures import figures
from mxcompile.report.style import CSS
from mxcompile.report.svg import number
from mxcompile.validation.results import ValidationReport

Values = dict[str, Any]
Column = tuple[str, str, Callable[[Any], str]]  # heading, key in the row, how to show it
SIGNS = {"passed": "✓", "failed": "✗", "inconclusive": "?"}


def page(values: Values) -> str:
    """The whole page."""
    title = f"mxcompile report: {values['verdict']['headline'].lower()}"
    body = "".join(section(values) for section in SECTIONS)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{CSS}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def _head(values: Values) -> str:
    sides = [f"{e['target']} engine in {e['dtype']}, {e['layers']} layers" for e in values["engines"]]
    sides = sides or [f"{m['engine']['target']} engine in {m['engine']['dtype']}" for m in values["machines"]]
    text = "; ".join(dict.fromkeys(sides)) or "no engine"
    return f'<h1>Is it right, how fast is it, what does it cost?</h1><p class="soft">{escape(text)}. {escape(values["created"])}.</p>'


def _verdict(values: Values) -> str:
    verdict = values["verdict"]
    sentences = "".join(f"<p>{escape(text)}</p>" for text in verdict["sentences"])
    return (
        f'<div class="verdict {verdict["status"]}" role="status"><strong>{SIGNS[verdict["status"]]} {escape(verdict["headline"])}</strong>'
        f"{sentences}</div>"
    )


def _cards(values: Values) -> str:
    cards = []
    for index, item in enumerate(values["speedups"]):
        if item["part"] == "memory":
            continue
        what = {"prefill": "to the first token", "decode": "between tokens"}[item["part"]]
        rival = {"pytorch": "PyTorch"}.get(item["rival"], item["rival"])
        which = f", {item['bench']}" if len(values["machines"]) > 1 else ""
        text = f"as fast as {rival} {what} ({number(item['least'])} to {number(item['most'])}){which}"
        cards.append((parts.value(f"speedups.{index}.mean", item["mean"], f"{number(item['mean'])} ×"), text))
    return (
        '<div class="cards">' + "".join(f'<div class="card"><b>{v}</b>{escape(t)}</div>' for v, t in cards) + "</div>"
        if cards
        else ""
    )


def _figures(values: Values) -> str:
    items = "".join(
        f"<figure><h3>{escape(figure.title)}</h3>{figure.svg}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in figures(values)
    )
    return parts.section("Speed, memory and long contexts", f'<div class="figures">{items}</div>') if items else ""


def _ms(value: float) -> str:
    return f"{number(value * 1e3)} ms"


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _ratio(value: float) -> str:
    return f"{number(value)} ×"


_LATENCY: Sequence[Column] = (
    ("First token", "ttft_s", _ms),
    ("least", "ttft_low_s", _ms),
    ("most", "ttft_high_s", _ms),
    ("Next token", "itl_s", _ms),
    ("p90", "itl_p90_s", _ms),
    ("p99", "itl_p99_s", _ms),
    ("Prompt tokens/s", "prefill_tokens_per_s", number),
    ("New tokens/s", "decode_tokens_per_s", number),
    ("Outlying rounds", "outlier_rounds", str),
    ("Slow steps", "slow_steps", str),
)
_AGAINST: Sequence[Column] = (
    ("First token, PyTorch", "prefill_against_pytorch", _ratio),
    ("Next token, PyTorch", "decode_against_pytorch", _ratio),
    ("Memory, PyTorch", "memory_against_pytorch", _ratio),
    ("First token, transformers", "prefill_against_transformers", _ratio),
    ("Next token, transformers", "decode_against_transformers", _ratio),
    ("Memory, transformers", "memory_against_transformers", _ratio),
)
_MEMORY: Sequence[Column] = (
    ("Peak of the process", "peak_bytes", bytes_text),
    ("Peak of the device, all processes", "device_peak_bytes", bytes_text),
    ("Peak of the session on the device", "device_own_bytes", bytes_text),
    ("After loading", "loaded_bytes", bytes_text),
    ("States and cache", "state_bytes", bytes_text),
    ("of that needed, by plan", "predicted_state_bytes", bytes_text),
)
_PREDICTION: Sequence[Column] = (
    ("First token, least", "predicted_prefill_s", _ms),
    ("measured", "ttft_s", _ms),
    ("reached", "prefill_fraction", _share),
    ("Next token, least", "predicted_itl_s", _ms),
    ("measured ", "itl_s", _ms),
    ("reached ", "decode_fraction", _share),
)
_COST: Sequence[Column] = (
    ("Million prompt tokens", "input_cost_per_million", number),
    ("Million new tokens", "output_cost_per_million", number),
)


def _latency(values: Values) -> str:
    text = "<p>Medians. Outliers stay in every number and are counted; least and most are over the rounds, percentiles over all steps.</p>"
    return _table(values, "Latency and throughput", text, _LATENCY)


def _against(values: Values) -> str:
    text = "<p>How many times as fast, or as small, the engine is as the others; above 1 is better.</p>"
    return _table(values, "The engine against the others", text, _AGAINST)


def _memory(values: Values) -> str:
    text = (
        "<p>The peak is the largest resident size while a cell ran, mapped weights and what allocators keep included. "
        "Buffers are allocated ahead, so they are larger than what the plan needs.</p>"
    )
    if all(row["device_own_bytes"] is None for row in values["rows"]):
        text += "<p>Everything was computed on the CPU; there is no device whose memory could be measured.</p>"
    return _table(values, "Memory", text, _MEMORY)


def _prediction(values: Values) -> str:
    rates = [
        f"{m['bench']}: copies {m['rates']['copy_bytes_per_s'] / 1e9:.1f} GB/s, fp32 matrix products "
        f"{m['rates']['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s"
        for m in values["machines"]
        if m["rates"]
    ]
    if not rates:
        return ""
    text = (
        "<p>Least times by the plan: the bytes or the arithmetic of a step, whichever takes longer at what this machine itself "
        f"reached in the same run ({escape('; '.join(rates))}). Above 100 %: the weights stayed in the processor's caches, or the "
        "machine was busier while its rates were measured.</p>"
    )
    return _table(values, "Prediction and measurement", text, _PREDICTION)


def _cost(values: Values) -> str:
    price = values["price_per_hour"]
    if price is None:
        return ""
    shown = parts.value("price_per_hour", price, number(price))
    text = f"<p>At a price of {shown} per hour for the whole machine, kept busy; in the unit of the price.</p>"
    return _table(values, "Cost", text, _COST)


def _table(values: Values, title: str, text: str, columns: Sequence[Column]) -> str:
    """One line per measured cell; columns and lines without any value are left out."""
    rows = values["rows"]
    columns = [column for column in columns if any(row[column[1]] is not None for row in rows)]
    lines = []
    for index, row in enumerate(rows):
        if all(row[key] is None for _, key, _ in columns):
            continue
        several = len(values["machines"]) > 1
        who = f"{row['contestant']} ({row['bench']})" if several else row["contestant"]
        head = f'<th scope="row">{row["prompt_length"]} × {row["batch_size"]}, {escape(who)}</th>'
        cells = "".join(parts.cell(name, f"rows.{index}.{key}", row[key], show) for name, key, show in columns)
        lines.append(f"<tr>{head}{cells}</tr>")
    if not lines or not columns:
        return ""
    return parts.section(
        title, text + parts.scroll(parts.header("Prompt × batch", *(name for name, _, _ in columns)), lines)
    )


def _change(text: str) -> str:
    return "same" if text == SAME else escape(text)  # the sentence above the table says within what


def _baseline(values: Values) -> str:
    found = values["baseline"]
    if not found or not found["rows"]:
        return ""
    columns: Sequence[Column] = (
        ("First token before", "old_ttft_s", _ms),
        ("now", "ttft_s", _ms),
        ("ratio", "ttft_s_ratio", number),
        ("change", "ttft_s_change", _change),
        ("Next token before", "old_itl_s", _ms),
        ("now ", "itl_s", _ms),
        ("ratio ", "itl_s_ratio", number),
        ("change ", "itl_s_change", _change),
        ("p99, ratio", "itl_p99_s_ratio", number),
        ("change  ", "itl_p99_s_change", _change),
        ("Peak memory, ratio", "peak_bytes_ratio", number),
        ("change   ", "peak_bytes_change", _change),
    )
    lines = []
    for index, row in enumerate(found["rows"]):
        cells = "".join(parts.cell(name, f"baseline.rows.{index}.{key}", row[key], show) for name, key, show in columns)
        head = f'<th scope="row">{row["prompt_length"]} × {row["batch_size"]}, {escape(row["contestant"])}</th>'
        lines.append(f"<tr>{head}{cells}</tr>")
    text = (
        f"<p>Against {escape(found['name'])} of {escape(found['created'])}. A number changed where the intervals of the two medians do "
        "not touch (else it is the same within the spread): "
        + parts.value("baseline.changed", found["changed"], str(found["changed"]))
        + " of "
        + parts.value("baseline.numbers", found["numbers"], str(found["numbers"]))
        + ". Of two runs of the same thing, about "
        + parts.value("baseline.changed_by_chance", found["changed_by_chance"], f"{found['changed_by_chance']:.1f}")
        + " would be called changed by chance.</p>"
    )
    return parts.section(
        "Against the baseline", text + parts.scroll(parts.header("Prompt × batch", *(c[0] for c in columns)), lines)
    )


def _needles(values: Values) -> str:
    lines = []
    for index, item in enumerate(values["needles"]):
        for place, cell in enumerate(item["cells"]):
            key = f"needles.{index}.cells.{place}"
            head = f'<th scope="row">{escape(item["name"])}: {cell["length"]} tokens, depth {cell["depth"]} %</th>'
            shown = (
                parts.cell("Logit difference", f"{key}.max_abs", cell["max_abs"], number)
                + parts.cell("KL", f"{key}.kl", cell["kl"], number)
                + parts.cell("Rank of the answer, engine", f"{key}.engine_rank", cell["engine_rank"], str)
                + parts.cell("PyTorch", f"{key}.reference_rank", cell["reference_rank"], str)
                + parts.cell("Result", f"{key}.status", cell["status"], escape)
                + parts.cell("Note", f"{key}.note", cell["note"], escape)
            )
            lines.append(f"<tr>{head}{shown}</tr>")
    head = parts.header("Context", "Logit difference", "KL", "Rank of the answer, engine", "PyTorch", "Result", "Note")
    return parts.section("Long contexts", parts.scroll(head, lines)) if lines else ""


def _accuracy(values: Values) -> str:
    out = []
    for index, item in enumerate(values["validations"]):
        report = ValidationReport.from_dict(
            {key: value for key, value in item.items() if key not in ("name", "verdict", "passed")}
        )
        text = "".join(section(report) for section in validation_page.SECTIONS if section.__name__ not in _ELSEWHERE)
        # Names of drawings must be unique in the page.
        text = re.sub(r'\bid="', f'id="v{index}-', text)
        text = re.sub(r'aria-labelledby="(\S+) (\S+)"', rf'aria-labelledby="v{index}-\1 v{index}-\2"', text)
        text = (
            text.replace("<h2>", "<h2>Accuracy: ")
            if len(values["validations"]) == 1
            else text.replace("<h2>", f"<h2>{escape(item['name'])}: ")
        )
        out.append(text)
    return "".join(out)


_ELSEWHERE = ("_head", "_verdict", "_environment")  # sections of the validation page that this page has itself


def _not_run(values: Values) -> str:
    lists = []
    if values["not_run"]:
        lists.append(
            "<h3>Not run</h3>" + parts.bullets(f"{item['what']}: {item['reason']}" for item in values["not_run"])
        )
    if values["notes"]:
        lists.append("<h3>To know</h3>" + parts.bullets(values["notes"]))
    return parts.section("Not run, and to know", "".join(lists)) if lists else ""


def _machines(values: Values) -> str:
    rows = []
    for item in values["machines"]:
        env, options = item["environment"], item["options"]
        facts = {
            "Measured": f"{item['created']}, {options['repeats']} rounds after {options['warmup']}, {options['new_tokens']} new tokens, "
            "contestants in processes of their own taking turns",
            "Machine": f"{env.get('cpu')}, {env.get('cores')} CPUs, {env.get('threads')} threads, {env.get('system')}",
            "Load average before and after": f"{_loads(env.get('load_average_before'))}; {_loads(env.get('load_average_after'))}",
            "Commit": env.get("commit") or "not from a source tree",
            "Libraries": ", ".join(f"{name} {version}" for name, version in env.get("libraries", {}).items()),
            "Engine": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in (item["engine"] or {}).items()),
            "Checkpoint": (item["checkpoint"] or {}).get("fingerprint", "unknown"),
        }
        lines = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(str(v))}</td></tr>' for k, v in facts.items())
        rows.append(f"<h3>{escape(item['bench'])}</h3><table class='stack facts'><tbody>{lines}</tbody></table>")
    return parts.section("Machine and method", "".join(rows)) if rows else ""


def _loads(values: Any) -> str:
    return " ".join(f"{value:.1f}" for value in values) if values else "unknown"


SECTIONS: Sequence[Callable[[Values], str]] = (
    _head,
    _verdict,
    _cards,
    _figures,
    _latency,
    _against,
    _memory,
    _cost,
    _prediction,
    _baseline,
    _needles,
    perplexity_section.section,
    drift_section.section,
    _accuracy,
    _not_run,
    _machines,
)
