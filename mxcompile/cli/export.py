"""`mxcompile export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxcompile.cli.options import PATH, Verb, dtype_option, json_option, layers_option, parallel_options, verbose_option


@click.command(cls=Verb)
@click.argument("checkpoint", type=PATH, required=False)
@click.option("--preset", metavar="NAME", help="Instead of a checkpoint: tiny, small, text-01 or m1, without weights.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    metavar="FILE.onnx",
    help="File to write; for several ranks, the folder.",
)
@dtype_option
@layers_option
@parallel_options
@click.option("--no-weights", is_flag=True, help="Write the graph alone; CHECKPOINT may then be a config.json.")
@click.option("--force", is_flag=True, help="Replace a file that is already there.")
@json_option
@verbose_option
def command(
    checkpoint: Path | None,
    preset: str | None,
    output: Path,
    no_weights: bool,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Write the canonical ONNX graph of a checkpoint or a preset.

    Weights are referred to in the checkpoint's files, not copied, wherever their bytes can be used as they are.
    """
    if (checkpoint is None) == (preset is None):
        raise click.UsageError("give CHECKPOINT or --preset", click.get_current_context())

    from model_defs.presets import preset as named
    from mxcompile.cli.progress_bars import progress
    from mxcompile.exporting import export_onnx

    source: Any = checkpoint if preset is None else named(preset)
    with progress(verbose) as shown:
        summary = export_onnx(source, output, weights=not no_weights and preset is None, progress=shown, **options)
    if as_json:
        from mxcompile.cli.output import print_json

        print_json(summary.to_dict())
        return

    from mxcompile.cli.output import bytes_text, print_pairs

    print_pairs(
        f"Exported {summary.path}",
        {
            "model": f"{summary.layers} layers, {summary.dtype}",
            "graph": f"{summary.nodes} nodes, {bytes_text(summary.graph_bytes)}",
            "weights": f"{bytes_text(summary.referenced_bytes)} in place, {bytes_text(summary.derived_bytes)} derived",
            "time": f"{sum(summary.seconds.values()):.1f} s",
            "peak memory": bytes_text(summary.peak_memory),
        },
    )
