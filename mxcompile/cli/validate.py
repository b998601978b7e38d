"""`mxcompile validate`."""

from __future__ import annotations

from pathlib import Path

import click

from mxcompile.cli.options import PATH, Verb


@click.command(cls=Verb)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--against", type=PATH, required=True, metavar="CHECKPOINT", help="Checkpoint that the engine is built from."
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Write all findings as JSON; - prints them.")
@click.option("--html", "html_file", type=PATH, metavar="FILE", help="Write a self-contained page with plots.")
@click.option("--quick", is_flag=True, help="Fewer and shorter prompts.")
def command(engine_dir: Path, against: Path, json_file: Path | None, html_file: Path | None, quick: bool) -> int:
    """Compare an engine with the PyTorch definition of its checkpoint.

    Exits with 0 when every comparison is within its threshold, 1 when one is not.
    """
    raise NotImplementedError
