"""`mxcompile plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxcompile.cli.options import PATH, Verb, json_option

GPU_KEYS = ("h20", "h100", "h200")
SCHEME_KEYS = ("bf16", "int8-experts", "int8", "int4-experts", "int4")


@click.command(cls=Verb)
@click.argument("checkpoint", type=PATH, required=False)
@click.option(
    "--preset", metavar="NAME", help="Plan a named architecture instead of a checkpoint: text-01, m1, small, tiny."
)
@click.option("--tp-size", type=int, default=8, show_default=True, metavar="N", help="GPUs that share the model.")
@click.option("--moe-tp-size", type=int, metavar="N", help="Of them, how many share each expert's inner width.")
@click.option("--moe-ep-size", type=int, metavar="N", help="Of them, how many share the experts out.")
@click.option(
    "--cp-size",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Sets of such GPUs, each with the whole model, that share the tokens of a long prompt.",
)
@click.option(
    "--gpu", "gpus", type=click.Choice(GPU_KEYS), multiple=True, help="GPU to plan for; repeatable.  [default: all]"
)
@click.option(
    "--weights", type=click.Choice(SCHEME_KEYS), multiple=True, help="Bits of the weights; repeatable.  [default: all]"
)
@click.option(
    "--context",
    "contexts",
    multiple=True,
    default=("128k", "1M", "4M"),
    show_default=True,
    metavar="TOKENS",
    help="Tokens of a sequence; repeatable.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, metavar="ROWS", help="Sequences."
)
@click.option(
    "--cache-bits", type=click.Choice(["16", "8"]), default="16", show_default=True, help="Type of keys and values."
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    metavar="TOKENS",
    help="Tokens of a prefill step; decides the workspace.",
)
@json_option
def command(
    checkpoint: Path | None,
    preset: str | None,
    tp_size: int,
    moe_tp_size: int | None,
    moe_ep_size: int | None,
    cp_size: int,
    gpus: tuple[str, ...],
    weights: tuple[str, ...],
    contexts: tuple[str, ...],
    batch_size: int,
    cache_bits: str,
    prefill_chunk: int,
    as_json: bool,
) -> None:
    """Say what a model needs on several GPUs: memory per rank, what fits and why not, and how fast it can be at best.

    CHECKPOINT is a folder with a config.json; weights are not read. Without it, plans MiniMax-Text-01.
    """
    if checkpoint is not None and preset is not None:
        raise click.UsageError("give a checkpoint or --preset, not both", click.get_current_context())

    from export.parallel.mapping import ParallelMapping
    from mxcompile.planning import gpus as known
    from mxcompile.planning.memory import SCHEMES, parse_tokens
    from mxcompile.planning.report import plan_report

    report = plan_report(
        _config(checkpoint, preset),
        ParallelMapping.of(tp_size, moe_tp_size, moe_ep_size, cp_size),
        [known.gpu(key) for key in gpus or GPU_KEYS],
        [SCHEMES[key] for key in weights or SCHEME_KEYS],
        [parse_tokens(text) for text in contexts],
        batch=batch_size,
        cache_bytes=int(cache_bits) // 8,
        chunk=prefill_chunk,
    )
    if as_json:
        from mxcompile.cli.output import print_json

        print_json(report)
    else:
        _print(report, batch_size, prefill_chunk)


def _copied(mapping: dict[str, int]) -> str:
    """What ranks hold more than once."""
    if mapping["cp_size"] > 1:
        return "everything: every set of ranks has the whole model, all states and the whole cache"
    return "norms, routers" + (", key/value heads" if mapping["tp_size"] > 8 else "")


def _cpu_text(size: int | str) -> str:
    return f"{size / 1e9:.2f} GB" if isinstance(size, int) else f"not with these sizes ({size})"


def _config(checkpoint: Path | None, preset: str | None) -> Any:
    if checkpoint is None:
        from model_defs.presets import preset as named

        return named(preset or "text-01")

    from model_defs.config_schemas import read_config

    return read_config(checkpoint / "config.json" if checkpoint.is_dir() else checkpoint)


def _print(report: dict[str, Any], batch: int, chunk: int) -> None:
    from mxcompile.cli.output import bytes_text, count_text, print_pairs, print_table
    from mxcompile.planning.gpus import GPUS
    from mxcompile.planning.memory import SCHEMES, tokens_text

    parameters, rank, mapping = report["parameters"], report["per_rank"], report["mapping"]
    print_pairs(
        "Plan",
        {
            "ranks": f"{mapping['tp_size'] * mapping['cp_size']} (experts: {mapping['moe_ep_size']} ranges x "
            f"{mapping['moe_tp_size']} parts of the inner width)"
            + (f", in {mapping['cp_size']} sets that share a chunk's tokens" if mapping["cp_size"] > 1 else ""),
            "parameters": f"{parameters['total']:,}",
            "per rank": f"{max(parameters['per_rank']):,}",
            "held more than once": f"{parameters['copies']:,} ({_copied(mapping)})",
            "state per sequence": f"{rank['state_bytes_per_sequence'] / 2**20:.1f} MiB per rank",
            "cache per token": f"{rank['cache_bytes_per_token']:,} bytes per rank",
            "weights on CPUs": ", ".join(f"{name} {_cpu_text(size)}" for name, size in rank["cpu_weight_bytes"].items())
            + " per rank",
            "collectives per step": str(sum(item["count"] for item in report["collectives"])),
        },
    )
    if report["segment_exchanges"]:
        print_table(
            f"Exchanged over {mapping['cp_size']} sets of ranks in a prefill chunk of {tokens_text(chunk)} tokens",
            ("what", "how", "times", "a rank receives", "grows with the chunk"),
            [
                (
                    item["of"],
                    item["operation"],
                    str(item["count"]),
                    bytes_text(item["bytes_received_per_chunk"]),
                    "yes" if item["elements_per_token"] else "no",
                )
                for item in report["segment_exchanges"]
            ],
        )
    print_table(
        f"Memory per rank in GB, {batch} sequence{'s' if batch > 1 else ''}",
        (
            "GPU",
            "weights are",
            "context",
            "weights",
            "state",
            "cache",
            "workspace",
            "fits",
            "longest context",
            "why not",
        ),
        [
            (
                GPUS[row["gpu"]].name,
                SCHEMES[row["scheme"]].name,
                tokens_text(row["context"]),
                *(f"{row[key] / 1e9:.2f}" for key in ("weights", "state", "cache", "workspace")),
                "yes" if row["fits"] else "no",
                tokens_text(row["longest_context"]) if row["longest_context"] else "none",
                row["reason"],
            )
            for row in report["fits"]
        ],
    )
    print_table(
        "Prefill of one prompt, lower bounds",
        ("GPU", "tokens", "PFLOP", "softmax share", "s at 100 %", "s at 75 %", "exchange s"),
        [
            (
                GPUS[row["gpu"]].name,
                tokens_text(row["context"]),
                f"{row['flops'] / 1e15:.2f}",
                f"{row['softmax_share']:.1%}",
                *(f"{row[key]:.2f}" for key in ("seconds", "seconds_at_75_percent", "exchange_seconds")),
            )
            for row in report["prefill"]
        ],
    )
    print_table(
        "Decode step, lower bounds, where it fits",
        ("GPU", "weights are", "context", "batch", "memory ms", "arithmetic ms", "tokens/s", "bound by"),
        [
            (
                GPUS[row["gpu"]].name,
                SCHEMES[row["scheme"]].name,
                tokens_text(row["context"]),
                str(row["batch"]),
                f"{row['memory_seconds'] * 1e3:.2f}",
                f"{row['compute_seconds'] * 1e3:.2f}",
                count_text(int(row["tokens_per_second"])),
                row["bound"],
            )
            for row in report["decode"]
        ],
    )
    click.echo("Assumptions:\n" + "\n".join(f"  - {line}" for line in report["assumptions"]))
