"""Does the recurrent state stay right over very long decodes? An engine decodes given tokens one by one; after so many, the state of
every lightning layer is held against two oracles (`drift_oracle`).

The engine decodes twice, side by side: with taps, which tell what each layer was given, and as users run it. An unfinished run keeps
all states in a file beside the JSON, so that it goes on where it stopped and ends with the same numbers.

Shape suffixes: T tokens, D hidden, E experts, H heads.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import load
from engines.directory import read_config
from engines.interface import RowSnapshot, Session, State
from export.contract import hidden_tap, router_tap
from mxcompile.bench.drift_oracle import FollowingReference, Recurrence, model_limit, recurrence_limit, remembered
from mxcompile.bench.drift_results import DriftError, DriftReport, DriftRow, read_drift
from mxcompile.bench.environment import environment
from mxcompile.bench.records import plain, previous
from mxcompile.bench.results import write_json
from mxcompile.bench.subject import describe_engine, find_checkpoint
from mxcompile.errors import MxcompileError
from mxcompile.progress import Progress, SilentProgress, Stage
from mxcompile.quantized import numbers_of, reference_options
from mxcompile.validation.observe import has_taps, top_margin
from mxcompile.validation.thresholds import Thresholds, thresholds_for

DEFAULT_STEPS = (1000, 10000, 100000)
CHUNK = 256
"""Tokens that are decoded before the oracles read them."""
SAVE_EVERY_S = 120.0
FORGOTTEN = 20
"""A head has forgotten what lies this many times its memory back: exp(-20) is 2e-9."""


def drift(
    engine_dir: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    steps: Sequence[int] = DEFAULT_STEPS,
    *,
    threads: int | None = None,
    seed: int = 0,
    json_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> DriftReport:
    """Decode `max(steps)` random tokens and judge the states after each of `steps`.

    Args:
        against: the checkpoint; default: where the engine was built from.
        json_file: written whole after each of `steps` and every two minutes, with a file of states beside it until the run ends.
        resume: go on with the unfinished run in `json_file`.

    Raises MxcompileError: another checkpoint, an engine without taps, without lightning layers or of a rounded type, steps below 1.
    """
    progress = progress or SilentProgress()
    steps = sorted(set(steps))
    if not steps or steps[0] < 1:
        raise MxcompileError(f"the state's drift is measured after at least 1 token, not after {steps}")
    folder = Path(engine_dir).absolute()
    config = read_config(folder)
    thresholds = thresholds_for(config)
    if thresholds is None:
        raise MxcompileError(
            f"no limits are set for the drift of engines in {numbers_of(config)}; build one in float32, without --quantize"
        )
    if "lightning" not in config.model["layer_kinds"]:
        raise MxcompileError(f"{folder}: this engine has no lightning layer, so it has no recurrent state")
    checkpoint = find_checkpoint(config, against, needed=True)
    assert checkpoint is not None
    report = DriftReport(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        options=plain({"steps": tuple(steps), "seed": seed, "threads": threads}),
        engine=describe_engine(folder, config),
        checkpoint=checkpoint,
        environment=environment(threads),
    )
    target = None if json_file is None else Path(json_file)
    old = previous(target, resume, read_drift, report, "no measurement of drift")
    if old is not None:
        if old.finished:
            return old
        report = old
    with progress.stage("load"):
        from mxcompile.backends.pytorch import PyTorchSession

        options: dict[str, Any] = {} if threads is None else {"threads": threads}
        moved = {"checkpoint": checkpoint["path"]} if checkpoint["moved"] else {}
        engine = load(folder, **options, **moved)
        if not has_taps(engine):
            raise MxcompileError(f"{folder}: this {config.target} engine does not tell what its layers are given")
        options |= reference_options(config)
        reference = PyTorchSession.load(checkpoint["path"], "float32", config.num_layers, **options)
    longest = min(engine.max_seq_len, reference.max_seq_len)
    fitting = [step for step in steps if step <= longest]
    report.not_run = [
        {"steps": step, "reason": f"exceeds the engine's max_seq_len {longest}"} for step in steps if step > longest
    ]
    if fitting:
        run = _Run(engine, reference, thresholds, report, target)
        try:
            with progress.stage("decode", fitting[-1]) as stage:
                run.to(fitting, np.random.default_rng(seed).integers(0, config.vocab_size, fitting[-1]), stage)
        except KeyboardInterrupt:
            report.interruptions += 1
            if target is not None:
                write_json(report.to_dict(), target)
            raise
    report.finished = True
    _drop_state(report, target)
    if target is not None:
        write_json(report.to_dict(), target)
    return report


class _Run:
    """Both decodes and both oracles at the same token."""

    def __init__(
        self, engine: Session, reference: Any, thresholds: Thresholds, report: DriftReport, target: Path | None
    ) -> None:
        self._engine, self._thresholds, self._report, self._target = engine, thresholds, report, target
        self._tapped, self._plain = engine.new_state(1), engine.new_state(1)
        self._recurrence = Recurrence(reference.model)
        self._reference = FollowingReference(reference, thresholds.router_tie.value)
        self._reference.followed, self._reference.refused = report.followed, report.refused
        self._embedding_ND = reference.model.embed_tokens.weight.float().numpy()
        self._layers, self._k = engine.config.num_layers, int(engine.config.model["num_experts_per_tok"])
        self._last_tie = [-1] * self._layers  # step of the last near-tie of each layer's router
        self._step, self._saved = 0, time.monotonic()

    def to(self, steps: list[int], tokens: NDArray[np.int64], stage: Stage) -> None:
        """Decode on, from where the report's state stands, and judge after each of `steps`."""
        if self._report.state is not None:
            self._load()
            stage.advance(self._step)
        while self._step < steps[-1]:
            following = next(step for step in steps if step > self._step)
            size = min(CHUNK, following - self._step)
            part = tokens[self._step : self._step + size].tolist()
            inputs, router = self._decode(part)
            self._recurrence.feed(inputs)
            self._reference.feed(part, router)
            self._step += size
            stage.advance(size)
            if self._step == following:
                self._report.rows += self._judge()
            if self._step == following or time.monotonic() - self._saved > SAVE_EVERY_S:
                self._save()

    def _decode(self, tokens: list[int]) -> tuple[dict[int, NDArray], list[NDArray]]:
        """Both decodes; what each lightning layer was given [T, D], and the router logits of every layer [T, E]."""
        hidden: list[list[NDArray]] = [[] for _ in range(self._layers)]
        router: list[list[NDArray]] = [[] for _ in range(self._layers)]
        one = np.ones(1, np.int64)
        for token in tokens:
            taps = self._engine.forward(np.array([[token]]), one, self._tapped, taps=True).taps
            for layer in range(self._layers):
                hidden[layer].append(taps[hidden_tap(layer)][0, 0].copy())
                router[layer].append(taps[router_tap(layer)][0, 0].copy())
            self._engine.decode([token], self._plain)
        stacked = [np.stack(rows) for rows in router]
        for layer, logits_TE in enumerate(stacked):
            ties = np.flatnonzero(top_margin(logits_TE, self._k) <= self._thresholds.router_tie.value)
            if len(ties):
                self._last_tie[layer] = self._step + int(ties[-1])
        before = [self._embedding_ND[tokens], *(np.stack(rows) for rows in hidden)]
        return {layer: before[layer] for layer in self._recurrence.layers}, stacked

    def _judge(self) -> list[DriftRow]:
        self._report.followed, self._report.refused = self._reference.followed, self._reference.refused
        recurrence = self._recurrence.errors(self._tapped.recurrent)
        plain_errors = self._recurrence.errors(self._plain.recurrent)
        model = {
            layer: _relative(self._reference.state.recurrent(layer)[0], self._tapped.recurrent(layer)[0])
            for layer in self._recurrence.layers
        }
        rows = []
        for layer in self._recurrence.layers:
            slopes_H = self._recurrence.slopes[layer]
            own_H = recurrence_limit(slopes_H, self._step)
            whole_H = model_limit(slopes_H, self._step, self._thresholds.states.value)
            memory_H = remembered(slopes_H, self._step)
            errors = [
                _worst("recurrence", recurrence[layer], own_H, memory_H),
                _worst("model", model[layer], whole_H, memory_H),
                _worst("plain", plain_errors[layer], own_H, memory_H),
            ]
            if errors[2].status == "differs" and errors[0].status == "agrees" and self._tie_before(layer, memory_H):
                errors[2].status = "tie"
            rows.append(DriftRow(self._step, layer, errors))
        return rows

    def _tie_before(self, layer: int, memory_H: NDArray) -> bool:
        """Whether a near-tie of a router before `layer`, not yet forgotten, may have sent a token to another expert."""
        since = self._step - FORGOTTEN * float(memory_H.max())
        return any(last >= max(0.0, since) for last in self._last_tie[:layer])

    def _save(self) -> None:
        """All states to a file of its own, then the report that names it."""
        self._saved = time.monotonic()
        if self._target is None:
            return
        arrays: dict[str, NDArray] = {
            f"fp64.{layer}": self._recurrence.states[layer] for layer in self._recurrence.layers
        }
        arrays["ties"] = np.array(self._last_tie)
        for name, state in self._states().items():
            row = state.read_row(0)
            for role, part in (("recurrent", row.recurrent), ("key", row.key), ("value", row.value)):
                arrays |= {f"{name}.{role}.{layer}": array for layer, array in part.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        content = buffer.getbuffer()
        file = self._target.with_name(f"{self._target.name}.step-{self._step}.npz")
        unfinished = file.with_name(f".{file.name}.part")
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
        before = self._report.state
        self._report.state = {
            "file": file.name,
            "step": self._step,
            "sha256": hashlib.sha256(content).hexdigest(),
            "followed": self._reference.followed,
            "refused": self._reference.refused,
        }
        write_json(self._report.to_dict(), self._target)
        if before is not None and before["file"] != file.name:
            self._target.with_name(before["file"]).unlink(missing_ok=True)

    def _load(self) -> None:
        """The states that `_save` wrote. MxcompileError when the file is not the one that the report names."""
        assert self._target is not None
        saved = self._report.state
        assert saved is not None
        file = self._target.with_name(Path(saved["file"]).name)
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != saved["sha256"]:
            raise MxcompileError(
                f"{file}: is missing or damaged, so {self._target} cannot be resumed; remove it to begin again"
            )
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            self._step = int(saved["step"])
            self._last_tie = arrays["ties"].tolist()
            for layer in self._recurrence.layers:
                self._recurrence.states[layer] = arrays[f"fp64.{layer}"]
            for name, state in self._states().items():
                parts: dict[str, dict[int, NDArray]] = {"recurrent": {}, "key": {}, "value": {}}
                for key in arrays.files:
                    head, _, rest = key.partition(".")
                    if head == name:
                        role, _, layer = rest.partition(".")
                        parts[role][int(layer)] = arrays[key]
                state.write_row(0, RowSnapshot(self._step, parts["recurrent"], parts["key"], parts["value"]))
        self._reference.followed, self._reference.refused = saved["followed"], saved["refused"]
        self._report.rows = [row for row in self._report.rows if row.step <= self._step]

    def _states(self) -> dict[str, State]:
        return {"tapped": self._tapped, "plain": self._plain, "reference": self._reference.state}


def _relative(reference_HKV: NDArray, other_HKV: NDArray) -> NDArray[np.float64]:
    from mxcompile.validation.metrics import relative_norm

    return relative_norm(reference_HKV, other_HKV, axes=2)


def _worst(measure: str, errors_H: NDArray, limits_H: NDArray, memory_H: NDArray) -> DriftError:
    head = int((errors_H / limits_H).argmax())
    error, limit = float(errors_H[head]), float(limits_H[head])
    status = "agrees" if error <= limit else "differs"
    return DriftError(measure, head, error if math.isfinite(error) else None, limit, float(memory_H[head]), status)


def _drop_state(report: DriftReport, target: Path | None) -> None:
    if report.state is not None and target is not None:
        target.with_name(Path(report.state["file"]).name).unlink(missing_ok=True)
    report.state = None
