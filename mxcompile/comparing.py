"""`mxcompile report`: gather validations, benchmarks and grids, refuse what does not belong together, and write every form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.directory import read_config
from mxcompile.bench.drift_results import read_drift
from mxcompile.bench.needle import read_needle
from mxcompile.bench.perplexity import perplexity as measure_perplexity
from mxcompile.bench.perplexity_results import read_perplexity
from mxcompile.bench.results import read_json, to_json
from mxcompile.bench.subject import describe_engine
from mxcompile.errors import MxcompileError
from mxcompile.progress import Progress, SilentProgress
from mxcompile.report.comparison import compare, short_name, with_failures
from mxcompile.report.comparison_page import page
from mxcompile.report.comparison_text import to_csv, to_markdown
from mxcompile.report.conditions import parse, violations
from mxcompile.report.files import read_json as read_validation
from mxcompile.report.files import write_text
from mxcompile.validation import ValidationOptions, validate

Path_ = str | os.PathLike[str]


def report(
    engine_dirs: Sequence[Path_] = (),
    *,
    against: Path_ | None = None,
    bench: Sequence[Path_] = (),
    needle: Sequence[Path_] = (),
    validation: Sequence[Path_] = (),
    perplexity: Sequence[Path_] = (),
    state_drift: Sequence[Path_] = (),
    text: Path_ | None = None,
    baseline: Path_ | None = None,
    price_per_hour: float | None = None,
    fail_on: Sequence[str] = (),
    quick: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The comparison as plain values; `write` makes files of it.

    Engines without a validation file are validated now, when `against` is given; with `text`, their perplexity on that file is measured
    now too. Raises MxcompileError (exit code 2) for files that are
    damaged, of another version, or of another engine or checkpoint than the others.
    """
    progress = progress or SilentProgress()
    conditions = parse(fail_on)
    if price_per_hour is not None and price_per_hour <= 0:
        raise MxcompileError(f"the price per hour must be above 0, not {price_per_hour}")
    if not any((engine_dirs, bench, validation, needle, perplexity, state_drift)):
        raise MxcompileError("nothing to report on; give an engine directory, --bench or --validation")
    if text is not None and not engine_dirs:
        raise MxcompileError("--text measures the perplexity of engines; name an engine directory")
    taken: set[str] = set()
    engines = [(Path(path).absolute(), read_config(path)) for path in engine_dirs]
    benches = [(short_name(path, taken), read_json(path)) for path in bench]
    needles = [(short_name(path, taken), read_needle(path)) for path in needle]
    validations = [(short_name(path, taken), read_validation(path)) for path in validation]
    perplexities = [(short_name(path, taken), read_perplexity(path)) for path in perplexity]
    drifts = [(short_name(path, taken), read_drift(path)) for path in state_drift]
    fingerprint = _fingerprint(against)
    digests = {describe_engine(folder, config)["digest"]: folder for folder, config in engines}
    for folder, config in engines:
        _same_checkpoint(
            str(folder), config.checkpoint.fingerprint if config.checkpoint else None, fingerprint, against
        )
    for name, item in benches:
        _same_checkpoint(name, (item.checkpoint or {}).get("fingerprint"), fingerprint, against)
        _known_engine(name, item.engine, digests)
    others: list[tuple[str, Any]] = [*needles, *perplexities, *drifts]
    for name, other in others:
        _same_checkpoint(name, other.checkpoint.get("fingerprint"), fingerprint, against)
        _known_engine(name, other.engine, digests)
    for name, done in validations:
        _same_checkpoint(name, (done.engine.get("checkpoint") or {}).get("fingerprint"), fingerprint, against)
    not_run: list[dict[str, str]] = []
    if not validations:
        for folder, _ in engines:
            if against is None:
                not_run.append(
                    {"what": f"{folder.name}: accuracy", "reason": "no --against CHECKPOINT and no --validation file"}
                )
            else:
                options = ValidationOptions(quick=quick, threads=threads)
                validations.append((short_name(folder, taken), validate(folder, against, options, progress)))
    if text is not None:
        for folder, _ in engines:
            measured = measure_perplexity(folder, text, against, threads=threads, progress=progress)
            perplexities.append((short_name(text, taken), measured))
    if not benches:
        not_run.append(
            {"what": "speed", "reason": "no --bench file; `mxcompile bench ENGINE_DIR --json FILE` writes one"}
        )
    if not needles:
        not_run.append(
            {
                "what": "long contexts",
                "reason": "no --needle file; `mxcompile bench ENGINE_DIR --needle --json FILE` writes one",
            }
        )
    if not perplexities:
        not_run.append({"what": "perplexity", "reason": "no --text and no --perplexity file"})
    if not drifts:
        reason = "no --state-drift file; `mxcompile bench ENGINE_DIR --state-drift 1000,10000 --json FILE` writes one"
        not_run.append({"what": "drift of the recurrent state", "reason": reason})
    if price_per_hour is None:
        not_run.append({"what": "cost", "reason": "no --price-per-hour"})
    values = compare(
        engines=[describe_engine(folder, config) for folder, config in engines],
        validations=validations,
        benches=benches,
        needles=needles,
        perplexities=perplexities,
        drifts=drifts,
        baseline=None if baseline is None else (short_name(baseline, taken), read_json(baseline)),
        price_per_hour=price_per_hour,
        not_run=not_run,
    )
    return with_failures(values, violations(conditions, values))


def write(
    values: dict[str, Any],
    *,
    html: Path_ | None = None,
    json: Path_ | None = None,
    csv: Path_ | None = None,
    markdown: Path_ | None = None,
) -> None:
    """Every form that has a path, each whole or not at all; all are made before the first is written."""
    forms = [
        (path, make(values))
        for path, make in ((html, page), (json, to_json), (csv, to_csv), (markdown, to_markdown))
        if path is not None
    ]
    for path, text in forms:
        write_text(path, text)


def _fingerprint(against: Path_ | None) -> str | None:
    if against is None:
        return None
    from model_defs.checkpoint.reader import Checkpoint

    return Checkpoint.open(against).fingerprint()


def _same_checkpoint(name: str, theirs: str | None, ours: str | None, against: Path_ | None) -> None:
    if ours is not None and theirs is not None and theirs != ours:
        raise MxcompileError(
            f"{name}: is of another checkpoint than {against}; give that one with --against, or leave the file out"
        )


def _known_engine(name: str, engine: dict[str, Any] | None, digests: dict[str, Path]) -> None:
    if digests and engine is not None and engine.get("digest") not in digests:
        given = ", ".join(str(folder) for folder in digests.values())
        raise MxcompileError(
            f"{name}: was measured on another engine ({engine.get('path')}) than {given}; measure this one"
        )
