"""Everything that a comparison page says, as plain values: the JSON form. Pages, CSV and Markdown are made from it and compute nothing.

Seconds, bytes and tokens per second throughout; costs in the unit of the price.
"""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mxcompile.bench.agreement import SAME, chance_of_change, change
from mxcompile.bench.drift_results import DriftReport
from mxcompile.bench.feasibility import element_bytes
from mxcompile.bench.needle import NeedleReport
from mxcompile.bench.needle import verdict as needle_verdict
from mxcompile.bench.perplexity_results import PerplexityReport
from mxcompile.bench.results import BenchReport, Cell, finished_cells
from mxcompile.report import drift_section, perplexity_section
from mxcompile.validation.results import ValidationReport

SCHEMA = "mxcompile.report"
SCHEMA_VERSION = 2  # 2: perplexities, drifts, intervals
RIVALS = ("pytorch", "transformers")
BUSY = 0.25  # load average per CPU from which times are called uncertain


def compare(
    *,
    engines: Sequence[dict[str, Any]] = (),
    validations: Sequence[tuple[str, ValidationReport]] = (),
    benches: Sequence[tuple[str, BenchReport]] = (),
    needles: Sequence[tuple[str, NeedleReport]] = (),
    perplexities: Sequence[tuple[str, PerplexityReport]] = (),
    drifts: Sequence[tuple[str, DriftReport]] = (),
    baseline: tuple[str, BenchReport] | None = None,
    price_per_hour: float | None = None,
    not_run: Iterable[dict[str, str]] = (),
) -> dict[str, Any]:
    """The whole comparison. Pairs are (name, report); names tell several apart."""
    rows = [row for name, bench in benches for row in _rows(name, bench, price_per_hour)]
    missing = [*not_run, *_not_run(validations, benches, needles)]
    for text in perplexities:
        missing += perplexity_section.not_run(*text)
    for run in drifts:
        missing += drift_section.not_run(*run)
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "price_per_hour": price_per_hour,
        "engines": list(engines),
        "rows": rows,
        "speedups": _speedups(rows),
        "layer_times": [_layer_row(name, item) for name, bench in benches for item in bench.layer_times],
        "machines": [_machine(name, bench) for name, bench in benches],
        "baseline": None if baseline is None else _against_baseline(baseline, benches),
        "needles": [{"name": name, "verdict": needle_verdict(item)} | item.to_dict() for name, item in needles],
        "perplexities": [perplexity_section.plain(*item) for item in perplexities],
        "drifts": [drift_section.plain(*item) for item in drifts],
        "validations": [{"name": name} | item.to_dict() for name, item in validations],
        "notes": [f"{name}: {text}" for name, bench in benches for text in _notes(bench)],
        "not_run": missing,
        "failed_conditions": [],
    }
    return values | {"verdict": _verdict(values)}


def with_failures(values: dict[str, Any], failures: Sequence[str]) -> dict[str, Any]:
    """The comparison with the --fail-on conditions that do not hold, and the verdict that follows."""
    values = values | {"failed_conditions": list(failures)}
    return values | {"verdict": _verdict(values)}


def _rows(name: str, bench: BenchReport, price: float | None) -> list[dict[str, Any]]:
    return [_row(name, bench, cell, price) for cell in finished_cells(bench)]


def _row(name: str, bench: BenchReport, cell: Cell, price: float | None) -> dict[str, Any]:
    """One line of the table: a contestant at one prompt length and batch size."""
    s = cell.summary
    prefill, decode = s["prefill_tokens_per_s"]["median"], s["decode_tokens_per_s"]["median"]
    dtype = next((c.dtype for c in bench.contestants if c.name == cell.contestant), "")
    loaded = next((c.loaded_bytes for c in bench.contestants if c.name == cell.contestant), None)
    row: dict[str, Any] = {
        "bench": name,
        "contestant": cell.contestant,
        "dtype": dtype,
        "prompt_length": cell.prompt_length,
        "batch_size": cell.batch_size,
        "rounds": len(cell.repeats),
        "ttft_s": s["ttft_s"]["median"],
        "ttft_low_s": s["ttft_s"]["low"],
        "ttft_high_s": s["ttft_s"]["high"],
        "itl_s": s["itl_s"]["median"],
        "itl_low_s": s["itl_s"]["low"],
        "itl_high_s": s["itl_s"]["high"],
        "ttft_interval_low_s": s["ttft_s"]["interval"]["low"],
        "ttft_interval_high_s": s["ttft_s"]["interval"]["high"],
        "itl_interval_low_s": s["itl_s"]["interval"]["low"],
        "itl_interval_high_s": s["itl_s"]["interval"]["high"],
        "interval_level": s["ttft_s"]["interval"]["level"],
        "itl_p90_s": s["itl_s"]["p90"],
        "itl_p99_s": s["itl_s"]["p99"],
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "peak_bytes": s["peak_bytes"],
        "loaded_bytes": loaded,
        "device_peak_bytes": s["device_peak_bytes"],
        "device_own_bytes": s["device_own_bytes"],
        "state_bytes": s["state_bytes"],
        "outlier_rounds": len(s["ttft_s"]["outliers"]),
        "slow_steps": s["itl_s"]["slow_steps"],
        "predicted_state_bytes": _state_bytes(bench, cell, dtype),
        "predicted_prefill_s": cell.bound and cell.bound["prefill_s"],
        "predicted_itl_s": cell.bound and cell.bound["decode_s"],
        "prefill_fraction": cell.bound and cell.bound["prefill_fraction"],
        "decode_fraction": cell.bound and cell.bound["decode_fraction"],
        "input_cost_per_million": None if price is None else price / 3600 / prefill * 1e6,
        "output_cost_per_million": None if price is None else price / 3600 / decode * 1e6,
    }
    for rival in RIVALS:
        other = bench.cell(rival, cell.prompt_length, cell.batch_size)
        known = other is not None and cell.contestant == "engine"
        theirs = other.summary if known and other is not None else None
        row[f"prefill_against_{rival}"] = theirs and theirs["ttft_s"]["median"] / s["ttft_s"]["median"]
        row[f"decode_against_{rival}"] = theirs and theirs["itl_s"]["median"] / s["itl_s"]["median"]
        row[f"memory_against_{rival}"] = theirs and theirs["peak_bytes"] / s["peak_bytes"]
    return row


def _state_bytes(bench: BenchReport, cell: Cell, dtype: str) -> int | None:
    """States and cache that the plan counts for this cell."""
    model = (bench.engine or {}).get("model")
    if model is None:
        return None
    from model_defs.config import ModelConfig

    config = ModelConfig.from_dict(model)
    tokens = cell.prompt_length + len(cell.repeats[0]["steps_s"])
    per_sequence = 4 * config.state_elements_per_sequence()
    return cell.batch_size * (per_sequence + tokens * config.cache_elements_per_token() * element_bytes(dtype))


def _speedups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster engines are than each rival: geometric mean, least and most over the cells."""
    out = []
    for name in dict.fromkeys(row["bench"] for row in rows):
        for rival in RIVALS:
            for part in ("prefill", "decode", "memory"):
                key = f"{part}_against_{rival}"
                values = [row[key] for row in rows if row["bench"] == name and row[key]]
                if values:
                    mean = statistics.geometric_mean(values)
                    out.append(
                        {
                            "bench": name,
                            "rival": rival,
                            "part": part,
                            "mean": mean,
                            "least": min(values),
                            "most": max(values),
                        }
                    )
    return out


def _layer_row(name: str, item: Any) -> dict[str, Any]:
    return {
        "bench": name,
        "contestant": item.contestant,
        "prompt_length": item.prompt_length,
        "prefill_s": item.prefill_s,
        "decode_s": item.decode_s,
    }


def _machine(name: str, bench: BenchReport) -> dict[str, Any]:
    engine = bench.engine or {}
    return {
        "bench": name,
        "created": bench.created,
        "finished": bench.finished,
        "interruptions": bench.interruptions,
        "busy": _busy(bench),
        "engine": {
            key: engine.get(key) for key in ("path", "digest", "target", "dtype", "layers", "ranks", "max_seq_len")
        },
        "checkpoint": bench.checkpoint,
        "environment": bench.environment,
        "options": bench.options,
        "rates": bench.best_rates(),
    }


AGREEING: dict[str, tuple[str, tuple[str, str]]] = {
    "ttft_s": ("ttft_s", ("slower", "faster")),
    "itl_s": ("itl_s", ("slower", "faster")),
    "itl_p99_s": ("itl_p99_s", ("slower", "faster")),
    "peak_bytes": ("peak", ("larger", "smaller")),
}
"""Numbers that two runs are compared by -> where a cell's summary has them, and what a larger and a smaller one is called."""


def _against_baseline(baseline: tuple[str, BenchReport], benches: Sequence[tuple[str, BenchReport]]) -> dict[str, Any]:
    """New over old; a number changed where the intervals of the two medians do not touch (see `bench.agreement`)."""
    name, old = baseline
    rows, missing = [], 0
    for bench_name, bench in benches:
        for cell in finished_cells(bench):
            before = old.cell(cell.contestant, cell.prompt_length, cell.batch_size)
            if before is None:
                missing += 1
                continue
            row: dict[str, Any] = {
                "bench": bench_name,
                "contestant": cell.contestant,
                "prompt_length": cell.prompt_length,
                "batch_size": cell.batch_size,
            }
            for key, (place, words) in AGREEING.items():
                new_s, old_s = cell.summary[place], before.summary[place]
                row[key], row[f"old_{key}"] = new_s["median"], old_s["median"]
                row[f"{key}_ratio"] = new_s["median"] / old_s["median"]
                row[f"{key}_change"] = change(new_s["interval"], old_s["interval"], words)
            row["chance"] = chance_of_change(cell.summary["ttft_s"]["interval"], before.summary["ttft_s"]["interval"])
            rows.append(row)
    machines = {(b.environment.get("cpu"), b.environment.get("threads")) for _, b in benches}
    same = machines == {(old.environment.get("cpu"), old.environment.get("threads"))}
    changes = [row[f"{key}_change"] for row in rows for key in AGREEING]
    return {
        "name": name,
        "created": old.created,
        "same_machine": same,
        "without_counterpart": missing,
        "numbers": len(changes),
        "changed": len(changes) - changes.count(SAME),
        "changed_by_chance": sum(row["chance"] for row in rows) * len(AGREEING),
        "rows": rows,
    }


def _notes(bench: BenchReport) -> list[str]:
    notes = [f"{item.name}: {note}" for item in bench.contestants for note in item.notes]
    for item in bench.failures:
        how = "the second try went well" if item.retried else "the second try failed too"
        notes.append(
            f"execution error of {item.contestant} at {item.prompt_length} x {item.batch_size}: {item.error} ({how})"
        )
    if _busy(bench):
        load, cores = bench.environment["load_average_before"][0], bench.environment["cores"]
        notes.append(
            f"the machine was busy when the run began (load {load:.1f} on {cores} CPUs), so its times are uncertain"
        )
    if bench.interruptions:
        notes.append(f"the run was interrupted {bench.interruptions} times and gone on with")
    return notes


def _busy(bench: BenchReport) -> bool:
    """Whether others used the machine when the run began."""
    load, cores = bench.environment.get("load_average_before"), bench.environment.get("cores")
    return bool(load and cores and load[0] > BUSY * cores)


def _not_run(
    validations: Sequence[tuple[str, ValidationReport]],
    benches: Sequence[tuple[str, BenchReport]],
    needles: Sequence[tuple[str, NeedleReport]],
) -> list[dict[str, str]]:
    found = []
    for name, validation in validations:
        found += [{"what": f"{name}: {item.check}", "reason": item.reason} for item in validation.not_run]
    for name, bench in benches:
        found += [{"what": f"{name}: {c.name}", "reason": c.left_out} for c in bench.contestants if c.left_out]
        for item in bench.not_run:
            where = f" at {item.prompt_length} tokens x {item.batch_size}" if item.prompt_length is not None else ""
            found.append({"what": f"{name}: {item.contestant}{where}", "reason": item.reason})
        if not bench.finished:
            found.append(
                {
                    "what": f"{name}: the rest of the run",
                    "reason": "it was interrupted; go on with `mxcompile bench --resume`",
                }
            )
    for name, needle in needles:
        found += [{"what": f"{name}: context of {item['length']}", "reason": item["reason"]} for item in needle.not_run]
    return found


def _verdict(values: dict[str, Any]) -> dict[str, Any]:
    """status: passed, failed or inconclusive; headline and sentences in plain words."""
    sentences: list[str] = []
    bad, open_questions = False, False
    several = len(values["validations"]) > 1
    for item in values["validations"]:
        sentences.append((f"{item['name']}: " if several else "") + item["verdict"])
        failed = any(check["status"] == "failed" for check in item["checks"])
        bad |= failed
        open_questions |= not item["passed"] and not failed
    for item in values["needles"]:
        sentences.append(f"Long contexts: {item['verdict']}")
        differs = any(cell["status"] == "differs" for cell in item["cells"])
        bad |= differs or (not item["passed"] and not item["exact"])
        open_questions |= not item["passed"] and not differs
    for item in (*values["perplexities"], *values["drifts"]):
        sentences.append(item["verdict"])
        bad |= not item["passed"] and item["finished"]
        open_questions |= not item["finished"]
    if not values["validations"]:
        open_questions = True
        sentences.append("Whether the engine is right was not checked here.")
    sentences += _speed_sentences(values)
    if values["baseline"]:
        sentences.append(_baseline_sentence(values["baseline"]))
    for failure in values["failed_conditions"]:
        bad = True
        sentences.append(f"A condition does not hold: {failure}.")
    status = "failed" if bad else "inconclusive" if open_questions else "passed"
    headline = {
        "passed": "The engine is right",
        "failed": "Do not put this engine into production",
        "inconclusive": "Not everything was judged",
    }[status]
    if status == "failed" and not any(
        [
            *(c["status"] == "failed" for item in values["validations"] for c in item["checks"]),
            *(c["status"] == "differs" for item in values["needles"] for c in item["cells"]),
            *(not item["passed"] and item["finished"] for item in (*values["perplexities"], *values["drifts"])),
        ]
    ):
        headline = "The engine does not meet the conditions"
    return {"status": status, "headline": headline, "sentences": sentences}


def _speed_sentences(values: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(item["bench"] for item in values["speedups"]))
    out = []
    for name in names:
        prefix = f"{name}: the" if len(names) > 1 else "The"
        for rival in RIVALS:
            found = {i["part"]: i for i in values["speedups"] if (i["bench"], i["rival"]) == (name, rival)}
            if found:
                who = {"pytorch": "PyTorch", "transformers": "transformers"}[rival]
                prefill, decode = found["prefill"]["mean"], found["decode"]["mean"]
                out.append(
                    f"{prefix} engine is {_about(prefill)} times as fast as {who} to the first token and {_about(decode)} times between "
                    "tokens (geometric means over what was measured)."
                )
    if any(machine["busy"] for machine in values["machines"]):
        out.append("The machine was busy when this was measured, so the times are uncertain.")
    if not values["rows"]:
        out.append("How fast it is was not measured here.")
    elif not names:
        out.append("It was measured alone, so it is not compared with another runtime.")
    return out


def _about(ratio: float) -> str:
    """Two digits; whole numbers from ten on."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _baseline_sentence(baseline: dict[str, Any]) -> str:
    changes = [row[f"{key}_change"] for row in baseline["rows"] for key in AGREEING]
    where = "" if baseline["same_machine"] else " (of another machine or number of threads, so times do not compare)"
    parts = [f"{changes.count(word)} {word}" for word in dict.fromkeys(changes) if word != SAME]
    found = f"{', '.join(parts)}, {'the rest' if changes.count(SAME) else 'none'} {SAME}" if parts else f"all {SAME}"
    chance = (
        f"of two runs of the same thing, about {baseline['changed_by_chance']:.1f} would be called changed by chance"
    )
    return f"Against {baseline['name']}{where}, of {len(changes)} numbers: {found} ({chance})."


def short_name(path: str | os.PathLike[str], taken: set[str]) -> str:
    """A name for a file or folder that is not taken yet."""
    base = Path(path).stem if Path(path).suffix == ".json" else Path(path).name
    name, number = base, 2
    while name in taken:
        name, number = f"{base} ({number})", number + 1
    taken.add(name)
    return name
