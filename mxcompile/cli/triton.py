"""`mxcompile triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxcompile.cli.options import PATH, Verb, threads_option, together

serving_options = together(
    click.option("--name", default="mxcompile", show_default=True, metavar="NAME", help="The model's name."),
    threads_option,
    click.option(
        "--checkpoint", type=PATH, metavar="DIR", help="Where the engine's checkpoint lies now, if it was moved."
    ),
    click.option(
        "--prefill-chunk", type=click.IntRange(min=1), metavar="TOKENS", help="Read prompts in pieces of this size."
    ),
    click.option(
        "--prefill-budget",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Prompt tokens to read between two decode steps; at least one chunk is read.  [default: one chunk]",
    ),
    click.option(
        "--cache-mib",
        type=click.IntRange(min=0),
        default=1024,
        show_default=True,
        metavar="MIB",
        help="Memory for states of sessions and prompt prefixes; 0 keeps none.",
    ),
    click.option(
        "--state-dir", type=PATH, metavar="DIR", help="Where sessions go that leave memory, and all at the end."
    ),
    click.option(
        "--state-dir-limit",
        type=click.IntRange(min=1),
        metavar="MIB",
        help="Room for sessions in --state-dir; the one not used for longest leaves.  [default: what the disk holds]",
    ),
    click.option(
        "--max-queue",
        type=click.IntRange(min=0),
        default=256,
        show_default=True,
        metavar="N",
        help="Most requests that wait for a slot.",
    ),
    click.option(
        "--max-queue-per-client",
        type=click.IntRange(min=1),
        metavar="N",
        help="Most requests of one client that wait for a slot.  [default: no limit of its own]",
    ),
    click.option(
        "--max-wait",
        "max_wait_s",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="Longest wait for a slot.",
    ),
    click.option(
        "--max-prompt-tokens", type=click.IntRange(min=1), metavar="N", help="Longest prompt.  [default: what fits]"
    ),
)


def settings(
    cache_mib: int, state_dir: Path | None, state_dir_limit: int | None, checkpoint: Path | None, **others: Any
) -> Any:
    """The engine process's settings out of `serving_options`, all but the name."""
    from mxcompile.errors import MxcompileError
    from mxcompile.serving.worker import Settings

    if state_dir is not None and cache_mib == 0:
        raise MxcompileError("--state-dir keeps sessions, and --cache-mib 0 turns them off; give one of the two")
    if state_dir_limit is not None and state_dir is None:
        raise MxcompileError("--state-dir-limit: give --state-dir too; without it no session goes to disk")
    return Settings(
        "",
        state_dir_bytes=state_dir_limit << 20 if state_dir_limit is not None else None,
        cache_bytes=cache_mib << 20,
        state_dir=str(state_dir.resolve()) if state_dir else None,
        checkpoint=str(checkpoint.resolve()) if checkpoint else None,
        **others,
    )


@click.command(cls=Verb)
@click.argument("engine_dir", type=PATH)
@click.option("-o", "--output", required=True, type=PATH, metavar="REPO", help="Folder to write the repository to.")
@serving_options
@click.option(
    "--python", metavar="FILE", help="The Python that has mxcompile, where it is served.  [default: this one]"
)
@click.option("--force", is_flag=True, help="Replace a repository that is already there.")
def command(engine_dir: Path, output: Path, name: str, python: str | None, force: bool, **others: Any) -> None:
    """Write a model repository for a Triton Inference Server that runs elsewhere.

    It holds a copy of the engine, its configuration with comments, and a README.
    """
    import sys

    from mxcompile.serving.triton.repository import write_repository

    write_repository(
        engine_dir, output, name=name, settings=settings(**others), python=python or sys.executable, force=force
    )
    click.echo(f"Wrote {output}: see {output / 'README.md'}")
