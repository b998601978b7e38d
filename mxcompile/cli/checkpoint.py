"""`mxcompile checkpoint create` and `mxcompile checkpoint verify`."""

from __future__ import annotations

from pathlib import Path

import click

from mxcompile.cli.options import DTYPES, PATH, Verb, json_option, layers_option, verbose_option

_PRESETS = ("tiny", "small", "tiny-vl", "text-01", "m1", "vl-01")


@click.group()
def command() -> None:
    """Create or verify a checkpoint."""


@command.command(cls=Verb)
@click.option(
    "--preset", type=click.Choice(_PRESETS), required=True, help="Architecture: tiny for tests, small for measuring."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Seed of the weights."
)
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder to write.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Type of the weights.")
@click.option("--force", is_flag=True, help="Replace a checkpoint that is already there.")
@json_option
@verbose_option
def create(preset: str, seed: int, output: Path, dtype: str, force: bool, as_json: bool, verbose: bool) -> None:
    """Write a checkpoint with random weights and a tokenizer, in the published layout."""
    from mxcompile.checkpoints import create_checkpoint
    from mxcompile.cli.output import bytes_text, print_json
    from mxcompile.cli.progress_bars import progress

    with progress(verbose) as shown:
        made = create_checkpoint(preset, output, seed=seed, dtype=dtype, force=force, progress=shown)
    parameters = sum(made.config.all_parameter_counts().values())
    if as_json:
        print_json({"path": str(made.folder), "parameters": parameters, "bytes": made.total_bytes})
    else:
        click.echo(f"{output}: {parameters} parameters, {bytes_text(made.total_bytes)} in {len(made.files)} files")


@command.command(cls=Verb)
@click.argument("folder", type=PATH)
@layers_option
@click.option("--values", is_flag=True, help="Read every weight too and report NaN, infinity and holes.")
@json_option
@verbose_option
def verify(folder: Path, layers: int | None, values: bool, as_json: bool, verbose: bool) -> int:
    """Check that FOLDER holds exactly the tensors that its configuration asks for.

    Every missing, unexpected, misshapen or truncated one is named. Exits with 2 when there is any.
    """
    from mxcompile.checkpoints import verify_checkpoint
    from mxcompile.cli.output import print_json
    from mxcompile.cli.progress_bars import progress

    with progress(verbose) as shown:
        report = verify_checkpoint(folder, layers=layers, scan_values=values, progress=shown)
    if as_json:
        problems = [{"kind": p.kind, "subject": p.subject, "message": p.message} for p in report.problems]
        print_json(
            {
                "ok": report.ok,
                "tensors": report.tensors_checked,
                "ignored": report.tensors_ignored,
                "problems": problems,
            }
        )
    else:
        for problem in report.problems:
            click.echo(f"{problem.kind}: {problem.message}")
        end = "sound" if report.ok else f"{len(report.problems)} problems"
        click.echo(f"{folder}: {report.tensors_checked} tensors, {report.tensors_ignored} unused, {end}")
    return 0 if report.ok else 2
