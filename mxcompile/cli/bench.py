"""`mxcompile bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxcompile.cli.options import PATH, Verb, threads_option, verbose_option


@click.command(cls=Verb)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--prompt-lengths", default="128,1k,8k", show_default=True, metavar="TOKENS,...", help="Lengths such as 128 or 8k."
)
@click.option("--batch-sizes", default="1,4", show_default=True, metavar="ROWS,...", help="Sequences at a time.")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Decoded behind every prompt.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="N",
    help="Measured rounds of every cell.",
)
@click.option(
    "--warmup", type=click.IntRange(min=0), default=1, show_default=True, metavar="N", help="Rounds before those."
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(["engine", "pytorch", "transformers"]),
    help="Whom to measure; repeatable.  [default: engine]",
)
@click.option(
    "--against", type=PATH, metavar="CHECKPOINT", help="The engine's checkpoint.  [default: where it was built from]"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the others.",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="S",
    help="Longest round.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Seed of the random prompts.")
@click.option("--no-layer-times", is_flag=True, help="Leave out the time by kind of layer.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in the --json file.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write all numbers, after every cell; - prints them instead of tables."
)
@click.option(
    "--needle", is_flag=True, help="Instead of times: does the engine answer as PyTorch does, with a key at all depths?"
)
@click.option(
    "--depths", default="0,25,50,75,100", show_default=True, metavar="%,...", help="Where --needle puts the key."
)
@click.option("--haystack", type=PATH, metavar="TEXT_FILE", help="Text for --needle, instead of random tokens.")
@threads_option
@verbose_option
def command(
    engine_dir: Path,
    prompt_lengths: str,
    batch_sizes: str,
    backends: tuple[str, ...],
    against: Path | None,
    limit: float,
    no_layer_times: bool,
    resume: bool,
    json_file: str | None,
    needle: bool,
    depths: str,
    haystack: Path | None,
    threads: int | None,
    verbose: bool,
    **numbers: Any,
) -> int:
    """Measure an engine: time to first token, time between tokens, memory, and how near it comes to what this machine can do.

    With --backend, PyTorch and transformers run the same prompts on the engine's checkpoint, taking turns with it. A run that was
    interrupted goes on with --resume. Take the machine for yourself: times mean nothing while others use it.
    """
    from mxcompile.cli.progress_bars import progress
    from mxcompile.planning.memory import parse_tokens

    lengths = tuple(parse_tokens(part.strip()) for part in prompt_lengths.split(","))
    if needle:
        return _needle(engine_dir, against, lengths, depths, haystack, threads, numbers["seed"], json_file, verbose)
    if haystack is not None:
        raise click.UsageError("--haystack belongs to --needle")
    from mxcompile.bench.options import BenchOptions
    from mxcompile.bench.run import bench
    from mxcompile.bench.table import print_bench
    from mxcompile.cli.output import print_json

    options = BenchOptions(
        prompt_lengths=lengths,
        batch_sizes=_numbers(batch_sizes, "--batch-sizes"),
        backends=backends or ("engine",),
        limit_s=limit,
        layer_times=not no_layer_times,
        **(numbers if threads is None else numbers | {"threads": threads}),
    )
    to_stdout = json_file == "-"
    try:
        with progress(verbose) as shown:
            report = bench(
                engine_dir,
                options,
                against=against,
                json_file=None if to_stdout else json_file,
                resume=resume,
                progress=shown,
            )
    except KeyboardInterrupt:
        if json_file is not None and not to_stdout:
            click.echo(f"Measured cells are in {json_file}; go on with the same command and --resume.", err=True)
        raise
    if to_stdout:
        print_json(report.to_dict())
    else:
        print_bench(report)
    if not report.cells:
        click.echo("error: nothing could be measured; the reasons are above", err=True)
        return 3
    return 0


def _needle(
    engine_dir: Path,
    against: Path | None,
    lengths: tuple[int, ...],
    depths: str,
    haystack: Path | None,
    threads: int | None,
    seed: int,
    json_file: str | None,
    verbose: bool,
) -> int:
    from mxcompile.bench.needle import needle, print_needle
    from mxcompile.bench.results import write_json
    from mxcompile.cli.output import print_json
    from mxcompile.cli.progress_bars import progress

    with progress(verbose) as shown:
        report = needle(
            engine_dir,
            against,
            lengths,
            _numbers(depths, "--depths"),
            haystack=haystack,
            threads=threads,
            seed=seed,
            progress=shown,
        )
    if json_file == "-":
        print_json(report.to_dict())
    else:
        print_needle(report)
        if json_file is not None:
            write_json(report.to_dict(), json_file)
    return 0 if report.passed else 1


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.UsageError(f"{option} takes whole numbers with commas between, not {text!r}")
    return tuple(int(part) for part in parts)
