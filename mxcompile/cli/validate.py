"""`mxcompile validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxcompile.cli.options import PATH, Verb, threads_option, verbose_option

if TYPE_CHECKING:
    from mxcompile.validation import ValidationReport


@click.command(cls=Verb)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--against", type=PATH, required=True, metavar="CHECKPOINT", help="Checkpoint that the engine was built from."
)
@click.option("--quick", is_flag=True, help="Fewer and shorter prompts.")
@click.option(
    "--reference-dtype",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="Type that the PyTorch definition computes in.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Seed of the random prompts.")
@threads_option
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
    reference_dtype: str,
    seed: int,
    threads: int | None,
    force: bool,
    json_file: str | None,
    html_file: Path | None,
    verbose: bool,
) -> int:
    """Compare an engine with the PyTorch definition of its checkpoint.

    Exits with 0 when every comparison keeps its limit, with 1 when one does not.
    """
    from mxcompile.cli.progress_bars import progress
    from mxcompile.validation import ValidationOptions, validate

    for file in (html_file, Path(json_file) if json_file not in (None, "-") else None):
        if file is not None and not file.absolute().parent.is_dir():
            raise click.UsageError(f"{file}: its folder does not exist", click.get_current_context())
    options = ValidationOptions(quick=quick, seed=seed, threads=threads, reference_dtype=reference_dtype, force=force)
    with progress(verbose) as shown:
        report = validate(engine_dir, against, options, shown)
    _write(report, json_file, html_file)
    return 0 if report.passed else 1


def _write(report: ValidationReport, json_file: str | None, html_file: Path | None) -> None:
    import json

    if json_file == "-":
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        if json_file is not None:
            Path(json_file).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        _print(report)
    if html_file is not None:
        from mxcompile.report import render_html

        html_file.write_text(render_html(report), encoding="utf-8")
        click.echo(f"Report: {html_file.absolute()}", err=True)


def _print(report: ValidationReport) -> None:
    """A line per group of checks, with the one nearest to its limit; then every check that failed, and the verdict."""
    from mxcompile.cli.output import print_table

    groups: dict[str, list] = {}
    for check in report.checks:
        groups.setdefault(check.group, []).append(check)
    rows = []
    for group, checks in groups.items():
        worst = max((c for c in checks if c.worst), key=lambda c: c.worst.strain, default=None)
        cells = (
            (f"{worst.worst.value:.3g}", f"{worst.worst.limit:.3g}", worst.worst.name, worst.case)
            if worst
            else ("",) * 4
        )
        rows.append((group, f"{sum(c.passed for c in checks)}/{len(checks)}", *cells))
    print_table("Validation", ("check", "passed", "worst", "limit", "of", "on"), rows)
    for check in report.failed:
        for measure in check.measures:
            if not measure.passed:
                where = f" at {measure.where}" if measure.where else ""
                numbers = f"{measure.value:.3g}, limit {measure.limit:.3g}"
                click.echo(f"failed: {check.group}, {check.case}: {measure.name} {numbers}{where}")
    for item in report.not_run:
        click.echo(f"not run: {item.check}: {item.reason}")
    click.echo(report.verdict)
