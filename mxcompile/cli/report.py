"""`mxcompile report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxcompile.cli.options import PATH, Verb, threads_option, verbose_option


@click.command(cls=Verb)
@click.argument("engine_dirs", type=PATH, nargs=-1, metavar="[ENGINE_DIR]...")
@click.option("--against", type=PATH, metavar="CHECKPOINT", help="Validate the engines against this checkpoint now.")
@click.option("--quick", is_flag=True, help="Validate with fewer and shorter prompts.")
@click.option("--validation", type=PATH, multiple=True, metavar="FILE", help="A validation's JSON instead; repeatable.")
@click.option("--bench", type=PATH, multiple=True, metavar="FILE", help="JSON of `mxcompile bench`; repeatable.")
@click.option(
    "--needle", type=PATH, multiple=True, metavar="FILE", help="JSON of `mxcompile bench --needle`; repeatable."
)
@click.option("--text", type=PATH, metavar="TEXT_FILE", help="Measure the engines' perplexity on this text now.")
@click.option(
    "--perplexity", type=PATH, multiple=True, metavar="FILE", help="JSON of `mxcompile bench --perplexity`; repeatable."
)
@click.option(
    "--state-drift",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="JSON of `mxcompile bench --state-drift`; repeatable.",
)
@click.option(
    "--baseline", type=PATH, metavar="FILE", help="An older benchmark: which numbers changed, beyond the spread?"
)
@click.option(
    "--price-per-hour", type=float, metavar="PRICE", help="Of the whole machine, for the cost of a million tokens."
)
@click.option("-o", "--output", "html", type=PATH, metavar="FILE", help="The HTML page.")
@click.option("--json", "json_file", metavar="FILE", help="Every number of the page; - prints it.")
@click.option("--csv", type=PATH, metavar="FILE", help="A line per measured cell.")
@click.option("--markdown", type=PATH, metavar="FILE", help="Verdict and main numbers.")
@click.option(
    "--fail-on",
    multiple=True,
    metavar="CONDITION",
    help="Exit with 1 when it holds: disagreement, incomplete, or such as 'ttft_ms>500', 'decode_tokens_per_s<20', "
    "'decode_speedup<1', 'slowdown>1.1', 'peak_gib>8', 'logit_difference>1e-3', "
    "'perplexity_change>1e-3', 'state_drift>1e-4', 'changed>1'; repeatable.",
)
@threads_option
@verbose_option
def command(
    engine_dirs: tuple[Path, ...],
    html: Path | None,
    json_file: str | None,
    csv: Path | None,
    markdown: Path | None,
    verbose: bool,
    **options: Any,
) -> int:
    """Say on one page whether an engine is right, how fast it is beside the others, and what it costs.

    The page needs no network. Exits with 1 when the engine is wrong or a --fail-on condition holds.
    """
    from mxcompile.cli.output import print_json
    from mxcompile.cli.progress_bars import progress
    from mxcompile.comparing import report, write
    from mxcompile.report.files import check_place

    check_place(html, json_file, csv, markdown)
    with progress(verbose) as shown:
        values = report(engine_dirs, progress=shown, **options)
    to_stdout = json_file == "-"
    write(values, html=html, json=None if to_stdout else json_file, csv=csv, markdown=markdown)
    verdict = values["verdict"]
    if to_stdout:
        print_json(values)
    else:
        click.echo(verdict["headline"])
        for sentence in verdict["sentences"]:
            click.echo(f"  {sentence}")
    if html is not None:
        click.echo(f"Report: {html.absolute()}", err=True)
    return 1 if verdict["status"] == "failed" else 0
