"""`mxcompile validate`."""

from __future__ import annotations

from pathlib import Path

import click

from mxcompile.cli.options import PATH, Verb, threads_option, verbose_option


@click.command(cls=Verb)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--against", type=PATH, required=True, metavar="CHECKPOINT", help="Checkpoint that the engine was built from."
)
@click.option("--quick", is_flag=True, help="Fewer and shorter prompts.")
@click.option(
    "--lengths", metavar="TOKENS,...", help="Lengths of the prompts, such as 1,256,1k.  [default: around block sizes]"
)
@click.option(
    "--reference-dtype",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="Type that the PyTorch definition computes in.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Seed of the random prompts.")
@threads_option
@click.option(
    "--stream-weights/--hold-weights",
    default=None,
    help="Let PyTorch read its weights from the checkpoint whenever it uses them, or hold them in memory.  [default: hold, if they fit]",
)
@click.option("--force", is_flag=True, help="Compare although the engine was built from another checkpoint.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write all findings as JSON; - prints them instead of tables."
)
@click.option("--html", "html_file", type=PATH, metavar="FILE", help="Write a self-contained page with plots.")
@verbose_option
def command(
    engine_dir: Path,
    against: Path,
    quick: bool,
    lengths: str | None,
    reference_dtype: str,
    seed: int,
    threads: int | None,
    stream_weights: bool | None,
    force: bool,
    json_file: str | None,
    html_file: Path | None,
    verbose: bool,
) -> int:
    """Compare an engine with the PyTorch definition of its checkpoint.

    Exits with 0 when every comparison keeps its limit, with 1 when one does not.
    """
    from mxcompile.cli.output import print_json
    from mxcompile.cli.progress_bars import progress
    from mxcompile.planning.memory import parse_tokens
    from mxcompile.report import print_report, write_html, write_json
    from mxcompile.report.files import check_place
    from mxcompile.validation import ValidationOptions, validate

    options = ValidationOptions(
        quick=quick,
        lengths=None if lengths is None else tuple(parse_tokens(part.strip()) for part in lengths.split(",")),
        seed=seed,
        threads=threads,
        reference_dtype=reference_dtype,
        force=force,
        stream_weights=stream_weights,
    )
    check_place(json_file, html_file)
    with progress(verbose) as shown:
        report = validate(engine_dir, against, options, shown)
    if json_file == "-":
        print_json(report.to_dict())
    else:
        print_report(report)
        if json_file is not None:
            write_json(report, json_file)
    if html_file is not None:
        write_html(report, html_file)
        click.echo(f"Report: {html_file.absolute()}", err=True)
    return 0 if report.passed else 1
