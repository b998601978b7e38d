"""A benchmark as tables on the terminal."""

from __future__ import annotations

from typing import Any

from mxcompile.bench.results import BenchReport, finished_cells
from mxcompile.cli.output import bytes_text, print_table

COLUMNS = (
    "prompt x batch",
    "contestant",
    "first token ms",
    "±",
    "next token ms",
    "p90",
    "p99",
    "±",
    "prefill tok/s",
    "decode tok/s",
    "peak",
    "device",
    "state",
    "of roofline",
    "outliers",
)


def print_bench(report: BenchReport) -> None:
    """All cells, times by kind of layer, what was not run, and the notes."""
    rows = []
    for cell in finished_cells(report):
        s, first, step = cell.summary, cell.summary["ttft_s"], cell.summary["itl_s"]
        share = (
            "" if cell.bound is None else f"{cell.bound['prefill_fraction']:.0%} / {cell.bound['decode_fraction']:.0%}"
        )
        rows.append(
            (
                f"{cell.prompt_length} x {cell.batch_size}",
                cell.contestant,
                f"{first['median'] * 1e3:.2f}",
                f"{first['relative']:.0%}",
                *(f"{step[key] * 1e3:.2f}" for key in ("median", "p90", "p99")),
                f"{step['relative']:.0%}",
                f"{s['prefill_tokens_per_s']['median']:.0f}",
                f"{s['decode_tokens_per_s']['median']:.1f}",
                bytes_text(s["peak_bytes"]),
                device_text(s),
                bytes_text(s["state_bytes"]),
                share,
                f"{len(first['outliers'])} rounds, {step['slow_steps']} steps",
            )
        )
    threads, repeats, passes = (report.options[key] for key in ("threads", "repeats", "passes"))
    if rows:
        level = min(cell.summary["ttft_s"]["interval"]["level"] for cell in report.cells)
        title = f"Medians of {repeats} rounds in {passes} passes, {threads} threads (± half the {level:.0%} interval of the median)"
        print_table(title, COLUMNS, rows)
    for item in report.layer_times:
        total_p, total_d = sum(item.prefill_s.values()) or 1.0, sum(item.decode_s.values()) or 1.0
        print_table(
            f"Time by kind of layer, {item.prompt_length} tokens (separate run)",
            ("kind", "prefill ms", "share", "decode step ms", "share"),
            [
                (kind, f"{p * 1e3:.2f}", f"{p / total_p:.0%}", f"{d * 1e3:.3f}", f"{d / total_d:.0%}")
                for kind, p, d in ((k, item.prefill_s[k], item.decode_s[k]) for k in item.prefill_s)
            ],
        )
    best = report.best_rates()
    if best:
        copy, products = best["copy_bytes_per_s"] / 1e9, best["matmul_flops_per_s"] / 1e9
        print(f"machine: copies {copy:.1f} GB/s, fp32 matrix products {products:.0f} GFLOP/s")
    for line in remarks(report):
        print(line)


def device_text(summary: dict[str, Any]) -> str:
    """Largest memory in use on the device, or what the session itself held there."""
    used, own = summary["device_peak_bytes"], summary["device_own_bytes"]
    if own is None:
        return "no device"
    return bytes_text(own if used is None else used)


def remarks(report: BenchReport) -> list[str]:
    """What a reader must know beside the numbers."""
    lines = []
    for item in report.contestants:
        if item.left_out:
            lines.append(f"left out: {item.name}: {item.left_out}")
        lines += [f"note on {item.name}: {note}" for note in item.notes]
    for failure in report.failures:
        how = "the second try went well" if failure.retried else "the second try failed too"
        where = f"{failure.prompt_length} x {failure.batch_size}"
        lines.append(f"execution error: {failure.contestant}, {where}: {failure.error} ({how})")
    for missing in report.not_run:
        where = f", {missing.prompt_length} x {missing.batch_size}" if missing.prompt_length is not None else ""
        lines.append(f"not run: {missing.contestant}{where}: {missing.reason}")
    if not report.finished:
        lines.append("this run is unfinished; go on with --resume")
    return lines
