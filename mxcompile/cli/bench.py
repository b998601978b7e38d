"""`mxcompile bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mxcompile.cli.options import PATH, Verb, threads_option, verbose_option


@click.command(cls=Verb)
@click.argument("engine_dir", type=PATH)
@click.option(
    "--prompt-lengths",
    default="128,1k,8k,64k",
    show_default=True,
    metavar="TOKENS,...",
    help="Lengths such as 128 or 8k.",
)
@click.option("--batch-sizes", default="1,4,16", show_default=True, metavar="ROWS,...", help="Sequences at a time.")
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
    "--passes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Spread the rounds over N passes through all cells, each in new processes.  [default: one round each]",
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
    "--perplexity",
    type=PATH,
    metavar="TEXT_FILE",
    help="Instead of times: the text's perplexity under the engine, PyTorch and each --backend.",
)
@click.option("--context", type=click.IntRange(min=2), metavar="TOKENS", help="Cut the text into pieces of so many.")
@click.option(
    "--state-drift",
    metavar="TOKENS,...",
    help="Instead of times: decode so many tokens, such as 1000,10000,100000; are the recurrent states still right?",
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
    passes: int | None,
    no_layer_times: bool,
    resume: bool,
    json_file: str | None,
    perplexity: Path | None,
    context: int | None,
    state_drift: str | None,
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
    from mxcompile.cli import bench_modes
    from mxcompile.cli.progress_bars import progress
    from mxcompile.planning.memory import parse_tokens

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(parse_tokens(part.strip()) for part in text.split(","))

    if sum((needle, perplexity is not None, state_drift is not None)) > 1:
        raise click.UsageError("--needle, --perplexity and --state-drift are separate runs; give one of them")
    if haystack is not None and not needle:
        raise click.UsageError("--haystack belongs to --needle")
    if context is not None and perplexity is None:
        raise click.UsageError("--context belongs to --perplexity")
    if needle and resume:
        raise click.UsageError("--needle runs as a whole and is not resumed")
    common: dict[str, Any] = {"threads": threads, "json_file": json_file, "verbose": verbose}
    if needle:
        where, seed = _numbers(depths, "--depths"), numbers["seed"]
        return bench_modes.needle(engine_dir, against, tokens(prompt_lengths), where, haystack, seed, **common)
    if perplexity is not None:
        how: dict[str, Any] = {"context": context, "dtype": numbers["dtype"], "resume": resume}
        return bench_modes.perplexity(engine_dir, against, perplexity, backends, **how, **common)
    if state_drift is not None:
        return bench_modes.drift(engine_dir, against, tokens(state_drift), numbers["seed"], resume=resume, **common)
    from mxcompile.bench.options import BenchOptions
    from mxcompile.bench.run import bench
    from mxcompile.bench.table import print_bench
    from mxcompile.cli.output import print_json

    options = BenchOptions(
        prompt_lengths=tokens(prompt_lengths),
        batch_sizes=_numbers(batch_sizes, "--batch-sizes"),
        backends=backends or ("engine",),
        limit_s=limit,
        passes=passes or 0,
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
                announce=lambda text: click.echo(text, err=True),
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


def _numbers(text: str, option: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.UsageError(f"{option} takes whole numbers with commas between, not {text!r}")
    return tuple(int(part) for part in parts)
