"""`mxcompile refit`."""

from __future__ import annotations

from pathlib import Path

import click

from mxcompile.cli.options import PATH, Verb, json_option, verbose_option


@click.command(cls=Verb)
@click.argument("engine", type=PATH)
@click.option(
    "--checkpoint", type=PATH, required=True, metavar="DIR", help="Checkpoint of the same model, with other weights."
)
@json_option
@verbose_option
def command(engine: Path, checkpoint: Path, as_json: bool, verbose: bool) -> None:
    """Give an engine the weights of another checkpoint of the same model, without building it again.

    Only weight files and digests are written. The old engine stays until the new one is complete. TensorRT engines must have been built
    with --strip-weights.
    """
    from mxcompile.cli.progress_bars import progress
    from mxcompile.refitting import refit

    with progress(verbose) as shown:
        summary = refit(engine, checkpoint, progress=shown)
    if as_json:
        from mxcompile.cli.output import print_json

        print_json(summary.to_dict())
        return

    from mxcompile.cli.output import bytes_text, print_pairs

    print_pairs(
        f"Refitted {summary.output}",
        {
            "checkpoint": summary.checkpoint,
            "weights": f"{summary.weights}: {bytes_text(summary.written_bytes)} written, "
            f"{bytes_text(summary.referenced_bytes)} read in place",
            "time": f"{sum(summary.seconds.values()):.1f} s",
            "peak memory": bytes_text(summary.peak_memory),
        },
    )
