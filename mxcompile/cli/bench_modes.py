"""`mxcompile bench` where it measures something else than times. Each prints or writes what it found and returns the exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from mxcompile.cli.output import print_json
from mxcompile.cli.progress_bars import progress


def needle(
    engine_dir: Path,
    against: Path | None,
    lengths: Sequence[int],
    depths: Sequence[int],
    haystack: Path | None,
    seed: int,
    *,
    threads: int | None,
    json_file: str | None,
    verbose: bool,
) -> int:
    """--needle."""
    from mxcompile.bench.needle import needle as run
    from mxcompile.bench.needle import print_needle
    from mxcompile.bench.results import write_json

    with progress(verbose) as shown:
        report = run(
            engine_dir, against, lengths, depths, haystack=haystack, threads=threads, seed=seed, progress=shown
        )
    if json_file is not None and json_file != "-":
        write_json(report.to_dict(), json_file)
    return _tell(report, print_needle, json_file)


def perplexity(
    engine_dir: Path,
    against: Path | None,
    text: Path,
    backends: Sequence[str],
    *,
    context: int | None,
    dtype: str,
    resume: bool,
    threads: int | None,
    json_file: str | None,
    verbose: bool,
) -> int:
    """--perplexity."""
    from mxcompile.bench.perplexity import perplexity as run
    from mxcompile.bench.perplexity_results import print_perplexity

    with progress(verbose) as shown, _say_how_to_go_on(json_file):
        report = run(
            engine_dir,
            text,
            against,
            backends=backends,
            context=context,
            dtype=dtype,
            threads=threads,
            json_file=_file(json_file),
            resume=resume,
            progress=shown,
        )
    return _tell(report, print_perplexity, json_file)


def drift(
    engine_dir: Path,
    against: Path | None,
    steps: Sequence[int],
    seed: int,
    *,
    resume: bool,
    threads: int | None,
    json_file: str | None,
    verbose: bool,
) -> int:
    """--state-drift."""
    from mxcompile.bench.drift import drift as run
    from mxcompile.bench.drift_results import print_drift

    with progress(verbose) as shown, _say_how_to_go_on(json_file):
        report = run(
            engine_dir,
            against,
            steps,
            threads=threads,
            seed=seed,
            json_file=_file(json_file),
            resume=resume,
            progress=shown,
        )
    return _tell(report, print_drift, json_file)


def _tell(report: Any, show: Callable[[Any], None], json_file: str | None) -> int:
    if json_file == "-":
        print_json(report.to_dict())
    else:
        show(report)
    return 0 if report.passed else 1


def _file(json_file: str | None) -> str | None:
    return None if json_file == "-" else json_file


@contextlib.contextmanager
def _say_how_to_go_on(json_file: str | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if _file(json_file) is not None:
            click.echo(f"What was measured is in {json_file}; go on with the same command and --resume.", err=True)
        raise
