"""`validate`: open both sides, run every check, find where a failing engine leaves the reference."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.config import EngineConfig
from engines.interface import Session
from mxcompile.errors import MxcompileError
from mxcompile.progress import Progress, SilentProgress
from mxcompile.quantized import int8_activations, numbers_of, reference_options, yardstick_options
from mxcompile.same_model import first_difference
from mxcompile.validation import checks
from mxcompile.validation.checks import Bench, Schedule
from mxcompile.validation.greedy import check_greedy
from mxcompile.validation.images import check_images
from mxcompile.validation.judge import Judge
from mxcompile.validation.layers import fault_from_states, first_fault, layer_errors
from mxcompile.validation.observe import has_taps, observe, one_piece
from mxcompile.validation.options import ValidationOptions
from mxcompile.validation.results import Check, Fault, LayerErrors, Measure, NotRun, ValidationReport
from mxcompile.validation.thresholds import EXACT, LOGIT_SCALE, Thresholds, rounded_thresholds, thresholds_for
from mxcompile.validation.yardstick import measure_yardstick, quantization_effect

if TYPE_CHECKING:
    from model_defs.checkpoint.reader import Checkpoint
    from mxcompile.backends.pytorch import PyTorchSession

LAYERS_GROUP = "Layers against PyTorch"
UNROUNDED = "Activations in fp32"
UNROUNDED_LENGTHS = (65, 257)


def validate(
    engine: str | os.PathLike[str] | Session,
    against: str | os.PathLike[str] | Checkpoint | Session,
    options: ValidationOptions | None = None,
    progress: Progress | None = None,
) -> ValidationReport:
    """Hold an engine against the PyTorch definition of its checkpoint.

    Args:
        engine: an engine directory or a loaded session.
        against: the checkpoint (folder or opened), or a session to take for the reference.
        options: what to run; default: everything.

    A disagreement is a report that did not pass, never an exception. Raises MxcompileError (exit code 2) when the engine was built
    from another checkpoint or has another architecture, and what the engine or checkpoint raise when they cannot be read.
    """
    options, progress = options or ValidationOptions(), progress or SilentProgress()
    started, created = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    with progress.stage("load"):
        session, reference, opened = _open(engine, against, options)
        thresholds = thresholds_for(session.config)
        _check_same_model(session.config, reference.config)
        yardstick = _yardstick_session(session, opened, options) if thresholds is None else None
    kinds = list(session.config.model["layer_kinds"])
    with progress.stage("layers"):
        judge = Judge(thresholds or EXACT["float32"], LOGIT_SCALE)
        bench = Bench(session, reference, options, judge)
        probe = Schedule([bench.prompt(min(options.layer_length, bench.longest), row=3)], [], "one piece")
        probe.pieces = one_piece(probe.rows)
        probe.text = f"a prompt of {len(probe.rows[0])} tokens"
        scale_trace = bench.run_reference(probe.rows[0])
        judge.logit_scale = max(1e-3, float(np.abs(scale_trace.logits_PN).max(-1).mean()))
        if yardstick is not None:
            measured = measure_yardstick(reference, yardstick, probe.rows[0], judge.factor, numbers_of(session.config))
            judge.thresholds = rounded_thresholds(measured)
            bench.yardstick = yardstick
        layers, fault, layer_checks = _compare_layers(bench, probe, kinds)
        engine_description = _description(session)
        if session.config.quantization is not None and opened is not None:
            own = _reference(opened, options, session.config.num_layers, {})
            # What rounds activations has no counterpart in the reference, so the engine itself is compared.
            rounded = session if int8_activations(session.config) else reference
            effect = quantization_effect(rounded, own, probe.rows[0])
            engine_description["quantization"] = session.config.quantization | {"effect": effect}
    report = ValidationReport(
        created=created.isoformat(timespec="seconds"),
        seconds=0.0,
        engine=engine_description,
        reference=_description(reference),
        environment=_environment(options),
        options=_options(options),
        thresholds=_thresholds(judge.thresholds),
        logit_scale=judge.logit_scale,
        layers=layers,
        fault=fault,
        not_run=bench.not_run,
        reroutes=judge.reroutes,
    )
    lengths = checks.prompt_lengths(bench)
    with progress.stage("prompts", len(lengths)) as stage:
        for length in lengths:
            found, curve = checks.check_length(bench, length)
            report.checks += found
            report.positions.append(curve)
            stage.advance()
        report.checks.append(judge.next_token_check(bench.comparisons))
        bench.comparisons.clear()
    report.checks += layer_checks
    with progress.stage("batches", len(options.ragged_batches)) as stage:
        for batch in options.ragged_batches:
            report.checks += checks.check_ragged(bench, batch)
            stage.advance()
    with progress.stage("chunks", len(options.chunks) + 1) as stage:
        for chunk in options.chunks:
            if chunk < bench.longest:
                report.checks += checks.check_chunked(bench, min(options.layer_length, bench.longest), chunk)
            stage.advance()
        report.checks += checks.check_stepwise(bench, min(options.stepwise_length, bench.longest))
        stage.advance()
    if int8_activations(session.config):
        with progress.stage("unrounded"):
            _check_unrounded(engine, opened, bench, probe, report)
    with progress.stage("greedy"):
        found, report.greedy = check_greedy(bench)
        report.checks += found
    if session.config.vision is not None:
        with progress.stage("images"):
            found, runs, fault = check_images(bench)
            report.checks += found
            report.greedy += runs
            report.fault = report.fault or fault
    if report.failed and report.fault is None:
        with progress.stage("locate"):
            report.fault = _locate(bench, kinds)
    report.seconds = round(time.perf_counter() - started, 3)
    return report


def _open(engine: Any, against: Any, options: ValidationOptions) -> tuple[Session, Session, Checkpoint | None]:
    """Both sessions, and the checkpoint when there is one. Fingerprints are compared before an engine is loaded."""
    from engines import load
    from engines.directory import read_config
    from model_defs.checkpoint.reader import Checkpoint

    is_folder = isinstance(engine, (str, os.PathLike))
    config = read_config(engine) if is_folder else engine.config
    opened = Checkpoint.open(against) if isinstance(against, (str, os.PathLike)) else against
    moved = False
    if isinstance(opened, Checkpoint):
        built_from = config.checkpoint
        if built_from is not None and built_from.fingerprint != opened.fingerprint():
            if not options.force:
                raise MxcompileError(
                    f"the engine was built from another checkpoint ({built_from.path}) than {opened.folder}; "
                    "give that one, or compare anyway with --force"
                )
        else:
            moved = built_from is not None and Path(built_from.path) != opened.folder
    threads = {} if options.threads is None else {"threads": options.threads}
    session = load(engine, **threads, **({"checkpoint": opened.folder} if moved else {})) if is_folder else engine
    if not isinstance(opened, Checkpoint):
        return session, opened, None
    layers = session.config.num_layers
    if layers > opened.config.num_layers:
        raise MxcompileError(
            f"the engine has {layers} layers, the checkpoint {opened.folder} {opened.config.num_layers}"
        )
    rounding = reference_options(config) | {"vision": config.vision is not None}
    return session, _reference(opened, options, layers, rounding), opened


def _reference(opened: Checkpoint, options: ValidationOptions, layers: int, rounding: dict[str, Any]) -> PyTorchSession:
    """The PyTorch definition, with its weights rounded as the engine's are."""
    from mxcompile.backends.pytorch import PyTorchSession

    rounding = rounding | {"stream": options.stream_weights}
    return PyTorchSession.load(opened, options.reference_dtype, layers, threads=options.threads, **rounding)


def _yardstick_session(session: Session, opened: Checkpoint | None, options: ValidationOptions) -> Session:
    """The PyTorch definition in the engine's rounded type."""
    from mxcompile.backends.pytorch import PyTorchSession

    if opened is None:
        raise MxcompileError(
            f"an engine in {numbers_of(session.config)} is validated against a checkpoint, not a session"
        )
    return PyTorchSession.load(
        opened,
        session.config.dtype,
        session.config.num_layers,
        threads=options.threads,
        stream=options.stream_weights,
        **yardstick_options(session.config),
    )


def _check_same_model(engine: EngineConfig, reference: EngineConfig) -> None:
    """Everything that decides what is computed must be equal."""
    difference = first_difference(engine.model, reference.model, "the checkpoint")
    if difference is not None:
        raise MxcompileError(f"the engine and the checkpoint are different models: {difference}")
    if engine.vision is not None and reference.vision is not None:
        # The checks take tiles, so how images become tiles must be the same on both sides.
        mine, theirs = (
            dataclasses.asdict(half) | {"graph": "", "weights": ""} for half in (engine.vision, reference.vision)
        )
        for key in mine:
            if mine[key] != theirs[key]:
                raise MxcompileError(
                    f"the engine and the checkpoint prepare images differently: {key} is {mine[key]} in the engine and "
                    f"{theirs[key]} in the checkpoint; build the engine again"
                )


def _compare_layers(
    bench: Bench, schedule: Schedule, kinds: list[str]
) -> tuple[list[LayerErrors], Fault | None, list[Check]]:
    """Errors by layer of a run's first row, the fault if one shows, and the check."""
    missing = [
        name for name, session in (("engine", bench.engine), ("reference", bench.reference)) if not has_taps(session)
    ]
    thresholds, judge = bench.judge.thresholds, bench.judge
    if missing:
        bench.not_run.append(NotRun(LAYERS_GROUP, f"the {' and the '.join(missing)} has no taps"))
        return [], None, []
    row = max(range(len(schedule.rows)), key=lambda index: len(schedule.rows[index]))
    reference = observe(bench.reference, schedule.rows, schedule.pieces, want="taps")[row]
    engine = observe(bench.engine, schedule.rows, schedule.pieces, want="taps")[row]
    k = int(bench.engine.config.model["num_experts_per_tok"])
    errors = layer_errors(reference, engine, kinds, k, thresholds)
    whole = len(schedule.pieces) == 1
    session = bench.reference if whole else None
    fault = first_fault(schedule.text, errors, reference, engine, thresholds, k, session)
    measures = []
    for name, limit, values in (
        (
            "relative error of the residual stream",
            thresholds.hidden,
            [e.hidden if thresholds.exact else e.hidden_median for e in errors],
        ),
        ("router logit difference", thresholds.router, [e.router for e in errors]),
        ("relative error of recurrent states", thresholds.states, [e.state for e in errors]),
        ("relative error of cached keys", thresholds.states, [e.key for e in errors]),
        ("relative error of cached values", thresholds.states, [e.value for e in errors]),
    ):
        known = [(value, layer) for layer, value in enumerate(values) if value is not None]
        if known:
            value, layer = max(known)
            measures.append(Measure(f"{judge.word} {name}", value, limit.value, f"layer {layer}"))
    check = Check(LAYERS_GROUP, schedule.text, measures, len(kinds), len(kinds))
    return errors, fault, [check]


def _check_unrounded(
    engine: Any, opened: Checkpoint | None, bench: Bench, probe: Schedule, report: ValidationReport
) -> None:
    """The same engine without packed weights computes with fp32 activations: it must then keep the limits of float32."""
    from engines import load
    from engines.parallel.join import launched

    if bench.engine.config.mapping.ranks > 1 and launched() is not None:
        reason = "ranks that somebody else started serve one session; run it without the launcher"
        report.not_run.append(NotRun(UNROUNDED, reason))
        return
    if not isinstance(engine, (str, os.PathLike)) or opened is None:
        report.not_run.append(NotRun(UNROUNDED, "needs the engine's folder, not a loaded session"))
        return
    session = load(engine, threads=bench.options.threads, prepack=False, checkpoint=opened.folder)
    judge = Judge(EXACT["float32"], bench.judge.logit_scale)
    exact = Bench(session, bench.reference, bench.options, judge)
    kinds = list(session.config.model["layer_kinds"])
    _, fault, found = _compare_layers(exact, probe, kinds)
    found = list(found)
    for length in UNROUNDED_LENGTHS:
        if length + exact.options.decode_steps <= exact.longest:
            found += checks.check_length(exact, length)[0]
    report.checks += [dataclasses.replace(check, group=f"{UNROUNDED}: {check.group}") for check in found]
    report.reroutes += judge.reroutes
    report.fault = report.fault or fault


def _locate(bench: Bench, kinds: list[str]) -> Fault:
    """Where a failure comes from that the layers of a plain prompt do not show: repeat the failed runs with taps."""
    thresholds = bench.judge.thresholds
    if not bench.failed:
        return Fault(None, "unknown", "only checks of the engine against itself fail", "the failed checks")
    tapped = has_taps(bench.engine) and has_taps(bench.reference)
    for schedule in bench.failed:
        if tapped:
            _, fault, _ = _compare_layers(bench, schedule, kinds)
        else:
            row = max(range(len(schedule.rows)), key=lambda index: len(schedule.rows[index]))
            reference = observe(bench.reference, schedule.rows, schedule.pieces)[row]
            engine = observe(bench.engine, schedule.rows, schedule.pieces)[row]
            fault = fault_from_states(schedule.text, reference, engine, kinds, thresholds)
        if fault is not None:
            return fault
    first = bench.failed[0]
    errors = _head_error(bench, first)
    if errors > bench.judge.logits_limit:
        part = "the final norm or the output projection; every layer keeps its limit"
        return Fault(None, "head", part, first.text, "logits off by", errors, bench.judge.logits_limit)
    return Fault(None, "unknown", "it does not show when the same tokens run with taps", first.text)


def _head_error(bench: Bench, schedule: Schedule) -> float:
    reference = observe(bench.reference, schedule.rows, schedule.pieces)
    engine = observe(bench.engine, schedule.rows, schedule.pieces)
    compared = bench.judge.compare(schedule.text, reference, engine)
    return max((bench.judge.summary(row.errors_P[row.judged_P])[0] for row in compared.rows), default=0.0)


def _description(session: Session) -> dict[str, Any]:
    config = session.config
    return {
        "target": config.target,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "model": config.model,
        "streams": bool(getattr(session, "streams", False)),
        "layers": config.num_layers,
        "max_batch_size": session.max_batch_size,
        "max_seq_len": session.max_seq_len,
        "mapping": dataclasses.asdict(config.mapping),
        "vision": None if config.vision is None else dataclasses.asdict(config.vision),
        "checkpoint": None if config.checkpoint is None else dataclasses.asdict(config.checkpoint),
        "mxcompile_version": config.mxcompile_version,
        "versions": config.versions,
    }


def _environment(options: ValidationOptions) -> dict[str, Any]:
    from mxcompile.machine import examine

    machine = examine()
    return {
        "mxcompile": machine.mxcompile,
        "python": machine.python,
        "system": machine.system,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_total": machine.memory_total,
        "gpus": [dataclasses.asdict(gpu) for gpu in machine.gpus],
        "libraries": {name: version for name, version in machine.libraries.items() if version},
        "threads": options.threads,
    }


def _options(options: ValidationOptions) -> dict[str, Any]:
    return dataclasses.asdict(options) | {
        "lengths": list(options.prompt_lengths),
        "decode_steps": options.decode_steps,
        "chunks": list(options.chunks),
        "ragged_batches": [list(batch) for batch in options.ragged_batches],
        "greedy_tokens": options.greedy_tokens,
    }


def _thresholds(thresholds: Thresholds) -> dict[str, Any]:
    limits = {name: dataclasses.asdict(limit) for name, limit in thresholds.limits().items()}
    return {"dtype": thresholds.dtype, "exact": thresholds.exact, "logit_scale": LOGIT_SCALE, "limits": limits}
