"""`bench`: contestants in processes of their own take turns at every cell; the report grows on disk, cell by cell."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.directory import read_config
from mxcompile.bench import estimate, memory, rates
from mxcompile.bench.contestants import ContestantError, ContestantProcess, ContestantTimeout
from mxcompile.bench.options import BenchOptions
from mxcompile.bench.results import BenchReport, Cell, Contestant, Failure, LayerTimes, NotRun, read_json, write_json
from mxcompile.bench.statistics import summary
from mxcompile.errors import MxcompileError
from mxcompile.progress import Progress, SilentProgress

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
PROFILED_STEPS = 16
ROUNDS_APART = 1000  # seeds of a pass from those of the next, so that rounds never share their tokens


def bench(
    engine_dir: str | os.PathLike[str],
    options: BenchOptions | None = None,
    *,
    against: str | os.PathLike[str] | None = None,
    json_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure an engine, and other backends on its checkpoint.

    Args:
        against: the checkpoint; default: where it lay when the engine was built.
        json_file: written whole after every cell.
        resume: go on with the unfinished run in `json_file`.
        announce: is told once, before the first cell, what will be measured and how long that may take.

    Raises MxcompileError: another checkpoint than the engine's, a file that cannot be gone on with. What cannot run is in the report.
    """
    options, progress = options or BenchOptions(), progress or SilentProgress()
    folder = Path(engine_dir).absolute()
    config = read_config(folder)
    checkpoint = find_checkpoint(config, against, needed=set(options.backends) != {"engine"})
    report = _begin(folder, config, checkpoint, options, json_file, resume)
    runner = _Runner(folder, config, options, report, json_file, progress, announce)
    try:
        runner.run()
    except KeyboardInterrupt:
        report.interruptions += 1
        runner.save()
        raise
    return report


def find_checkpoint(
    config: EngineConfig, against: str | os.PathLike[str] | None, needed: bool
) -> dict[str, Any] | None:
    """Path and fingerprint of the checkpoint, which must be the engine's."""
    built_from = config.checkpoint
    if against is None:
        if built_from is None or not Path(built_from.path).is_dir():
            if needed:
                raise MxcompileError(
                    "pytorch and transformers run on the checkpoint; say where it is with --against CHECKPOINT"
                )
            return None
        if not needed:
            return {"path": built_from.path, "fingerprint": built_from.fingerprint, "moved": False}
        against = built_from.path
    from model_defs.checkpoint.reader import Checkpoint

    opened = Checkpoint.open(against)
    fingerprint = opened.fingerprint()
    if built_from is not None and built_from.fingerprint != fingerprint:
        raise MxcompileError(
            f"the engine was built from another checkpoint ({built_from.path}) than {opened.folder}; give that one with --against"
        )
    moved = built_from is not None and Path(built_from.path) != opened.folder
    return {
        "path": str(Path(opened.folder).absolute()),
        "fingerprint": fingerprint,
        "moved": moved,
        "layers": opened.config.num_layers,
    }


def _begin(
    folder: Path,
    config: EngineConfig,
    checkpoint: dict[str, Any] | None,
    options: BenchOptions,
    json_file: str | os.PathLike[str] | None,
    resume: bool,
) -> BenchReport:
    engine = describe_engine(folder, config)
    if resume and json_file is None:
        raise MxcompileError("--resume goes on with the run in a file; name it with --json FILE")
    if json_file is not None and Path(json_file).exists():
        old = _previous(json_file, resume)
        if resume and old is not None:
            if old.finished:
                return old
            _check_same_run(old, engine, checkpoint, options, json_file)
            # What was not run may be possible now: only measured cells are kept.
            old.not_run, old.layer_times, old.contestants = [], [], []
            return old
    now = _now()
    return BenchReport(now, now, options.to_dict(), engine, checkpoint, environment(options.threads))


def _previous(json_file: str | os.PathLike[str], resume: bool) -> BenchReport | None:
    try:
        old = read_json(json_file)
    except MxcompileError:
        if resume:
            raise
        raise MxcompileError(f"{json_file}: is there already and is no benchmark; choose another file") from None
    if not resume and not old.finished and old.cells:
        raise MxcompileError(
            f"{json_file}: holds an unfinished run of {len(old.cells)} cells; go on with --resume, or remove it"
        )
    return old


def _check_same_run(
    old: BenchReport, engine: dict[str, Any], checkpoint: dict[str, Any] | None, options: BenchOptions, json_file: Any
) -> None:
    def refuse(what: str) -> None:
        raise MxcompileError(f"{json_file}: cannot be resumed, {what}; remove the file or choose another")

    if (old.engine or {}).get("digest") != engine["digest"]:
        refuse("it is of another engine")
    if (
        checkpoint is not None
        and old.checkpoint is not None
        and old.checkpoint["fingerprint"] != checkpoint["fingerprint"]
    ):
        refuse("it is of another checkpoint")
    new = options.to_dict()
    different = [key for key in sorted(set(new) | set(old.options)) if new.get(key) != old.options.get(key)]
    if different:
        key = different[0]
        refuse(f"its {key.replace('_', ' ')} were {old.options.get(key)}, not {new.get(key)}")


class _Runner:
    """One run, from where the report stands to its end."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        options: BenchOptions,
        report: BenchReport,
        json_file: str | os.PathLike[str] | None,
        progress: Progress,
        announce: Callable[[str], None] | None,
    ) -> None:
        self._folder, self._config, self._options = folder, config, options
        self.report = report
        self._json_file = json_file
        self._progress, self._announce = progress, announce
        self._bounds: dict[tuple[str, int, int], dict[str, float] | None] = {}
        self._processes: dict[str, ContestantProcess] = {}
        self._left = ""
        self._too_slow: dict[str, list[tuple[int, int]]] = {}

    def save(self) -> None:
        """Write the report as it stands."""
        self.report.updated = _now()
        if self._json_file is not None:
            write_json(self.report.to_dict(), self._json_file)

    def run(self) -> None:
        """Everything that is still to be measured."""
        options, report = self._options, self.report
        if report.finished:
            return
        with self._progress.stage("machine"):
            self._measure_rates()
        cells = [(length, batch) for batch in options.batch_sizes for length in options.prompt_lengths]
        for number in range(options.passes):
            if all(self._rounds_left(name, *cell, number) == 0 for name in options.backends for cell in cells):
                continue  # of a run that is gone on with
            with contextlib.ExitStack() as stack:
                for name in options.backends:
                    with self._progress.stage(f"load {name}"):
                        process = stack.enter_context(ContestantProcess(self._setup(name)))
                        self._enter(name, process)
                self.save()
                for place, (length, batch) in enumerate(cells):
                    self._tell(cells, place, number)
                    self._run_cell(length, batch, number)
                    self.save()
        if options.layer_times and "engine" in options.backends:
            with self._progress.stage("layers"):
                self._profile()
        with self._progress.stage("machine again"):
            self._measure_rates()
        self._bound_all()
        report.environment["load_average_after"] = list(os.getloadavg())
        report.finished = True
        self.save()

    def _setup(self, name: str) -> dict[str, Any]:
        checkpoint = self.report.checkpoint or {}
        return {
            "backend": name,
            "engine": str(self._folder),
            "checkpoint": checkpoint.get("path"),
            "moved": checkpoint.get("moved", False),
            "dtype": self._options.dtype,
            "layers": self._config.num_layers,
            "threads": self._options.threads,
        }

    def _dtype(self, name: str) -> str:
        return self._config.dtype if name == "engine" else self._options.dtype

    def _enter(self, name: str, process: ContestantProcess) -> None:
        """Load a contestant, or note why it is left out; one that was left out in an earlier pass stays out."""
        entry = next((item for item in self.report.contestants if item.name == name), None)
        if entry is None:
            entry = Contestant(name, self._dtype(name))
            self.report.contestants.append(entry)
        elif entry.left_out:
            return
        if name == "transformers":
            from importlib.util import find_spec

            if find_spec("transformers") is None:
                entry.left_out = "transformers is not installed; install it with: pip install 'mxcompile[transformers]'"
            elif (self.report.checkpoint or {}).get("layers") != self._config.num_layers:
                entry.left_out = "the engine holds the first layers only, and the port always runs all of them"
        free = memory.available_bytes()
        need = memory.load_bytes(self._config.model, name, ELEMENT_BYTES.get(entry.dtype, 4))
        if not entry.left_out and free is not None and need > memory.ROOM * free:
            entry.left_out = f"loading takes about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are available"
        if not entry.left_out:
            try:
                ready = process.start()
                entry.load_s, entry.loaded_bytes = ready["load_s"], max(entry.loaded_bytes, ready["loaded_bytes"])
                entry.notes = ready["notes"]
                self._processes[name] = process
            except ContestantError as error:
                entry.left_out = str(error)

    def _measure_rates(self) -> None:
        with ContestantProcess({"backend": "rates", "threads": self._options.threads}) as process:
            try:
                process.start()
                self.report.rates.append(process.ask({"do": "rates"}, self._options.limit_s))
            except ContestantError as error:
                self.report.not_run.append(NotRun("machine", f"the machine's rates could not be measured: {error}"))

    def _rounds_left(self, name: str, length: int, batch: int, number: int) -> int:
        """Rounds of pass `number` that are still to be measured."""
        cell = self.report.cell(name, length, batch)
        done = 0 if cell is None else sum(item["pass"] == number for item in cell.repeats)
        return max(0, self._options.rounds(number) - done)

    def _run_cell(self, length: int, batch: int, number: int) -> None:
        """The rounds of one pass, all contestants that can taking turns; one that fails twice is noted and the others go on."""
        options, report = self._options, self.report
        left_out = {item.name for item in report.contestants if item.left_out}  # said once, not at every cell
        names = [
            name
            for name in options.backends
            if name not in left_out
            and report.reason(name, length, batch) is None
            and self._rounds_left(name, length, batch, number)
        ]
        reasons = {name: self._reason_against(name, length, batch) for name in names}
        if reasons.get("engine") and len(names) > 1:
            reasons |= {
                name: "the engine cannot run this, so there is nothing to compare"
                for name in names
                if not reasons[name]
            }
        for name, reason in reasons.items():
            if reason:
                report.not_run.append(NotRun(name, reason, length, batch))
        taking_part = [name for name in names if not reasons[name]]
        rounds = options.warmup + options.rounds(number)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in taking_part}
        title = f"{length} x {batch}" + (f", pass {number + 1} of {options.passes}" if options.passes > 1 else "")
        with self._progress.stage(title + self._left, rounds * len(taking_part)) as stage:
            for turn in range(rounds):
                first = (number + turn) % max(1, len(taking_part))
                for name in taking_part[first:] + taking_part[:first]:
                    if name not in found:
                        continue
                    sample = self._sample(name, length, batch, ROUNDS_APART * number + turn)
                    if sample is None:
                        del found[name]
                    elif turn >= options.warmup:
                        found[name].append(sample | {"pass": number})
                    stage.advance()
        for name, repeats in found.items():
            cell = report.cell(name, length, batch)
            if cell is None:
                cell = Cell(name, length, batch, [], {})
                report.cells.append(cell)
            # Rounds of this pass from before an interruption give way to those that belong together.
            cell.repeats = [item for item in cell.repeats if item["pass"] != number] + repeats
            cell.summary = summary(cell.repeats, length, batch)

    def _bound(self, name: str, length: int, batch: int) -> dict[str, float] | None:
        """Least prefill_s and decode_s of a cell at the machine's best rates so far, or None where they say nothing about it."""
        best = self.report.best_rates()
        if best is None or self._config.quantization is not None or self._config.target != "onnxruntime":
            return None
        key = (name, length, batch)
        if key not in self._bounds:
            element = ELEMENT_BYTES.get(self._dtype(name), 4)
            self._bounds[key] = rates.bound(self._config.model, element, best, length, batch, self._options.new_tokens)
        return self._bounds[key]

    def _tell(self, cells: list[tuple[int, int]], place: int, number: int) -> None:
        """How long the cells from `place` of this pass on, and the passes behind it, will take; announced before the first cell."""
        options, report = self._options, self.report
        able = [name for name in options.backends if name in self._processes]
        runs: dict[tuple[int, int], bool] = {}
        for length, batch in cells:
            deciding = "engine" if "engine" in able else next(iter(able), None)  # what it cannot run, nobody runs
            runs[length, batch] = deciding is not None and not self._reason_against(deciding, length, batch)
        rounds = [
            (name, length, batch, options.warmup + options.rounds(later))
            for later in range(number, options.passes)
            for length, batch in (cells[place:] if later == number else cells)
            for name in able
            if runs[length, batch]
            and report.reason(name, length, batch) is None
            and self._rounds_left(name, length, batch, later)
        ]
        seconds = estimate.seconds_left(report, rounds, self._bound, options.new_tokens)
        self._left = "" if seconds is None else f", about {estimate.duration(seconds)} left"
        if self._announce is not None:
            missing = sum(not possible for possible in runs.values())
            skipped = f" ({missing} sizes cannot run)" if missing else ""
            how_long = "" if seconds is None else f": about {estimate.duration(seconds)}"
            count = len({(name, length, batch) for name, length, batch, _ in rounds})
            self._announce(f"{count} cells to measure{skipped}, passes: {options.passes}{how_long}")
            self._announce = None

    def _reason_against(self, name: str, length: int, batch: int) -> str:
        """Why a contestant cannot run a cell, or nothing."""
        process = self._processes[name]
        tokens, longest, rows = (
            length + self._options.new_tokens,
            process.ready["max_seq_len"],
            process.ready["max_batch_size"],
        )
        if tokens > longest:
            return f"{length} and {self._options.new_tokens} new tokens exceed its max_seq_len {longest}"
        if batch > rows:
            return f"{batch} rows exceed its max_batch_size {rows}"
        for slow_length, slow_batch in self._too_slow.get(name, ()):
            if length >= slow_length and batch >= slow_batch:
                return f"{slow_length} tokens x {slow_batch} already took more than {self._options.limit_s:g} s"
        bound = self._bound(name, length, batch)
        least = 0.0 if bound is None else estimate.least_seconds(bound, self._options.new_tokens)
        if least > self._options.limit_s:
            took = estimate.duration(least)
            return f"a round takes at least {took} at this machine's rates, more than {self._options.limit_s:g} s"
        need = memory.cell_bytes(
            self._config.model,
            name,
            ELEMENT_BYTES.get(self._dtype(name), 4),
            self._config.limits.prefill_chunk,
            batch,
            length,
            self._options.new_tokens,
        )
        free = memory.available_bytes()
        if free is not None and need > memory.ROOM * free:
            return f"it takes about {need / 2**30:.1f} GiB beside the weights, {free / 2**30:.1f} GiB are available"
        return ""

    def _sample(self, name: str, length: int, batch: int, number: int) -> dict[str, Any] | None:
        """One round, tried twice; None when the contestant cannot do this cell."""
        task = {
            "do": "cell",
            "prompt_length": length,
            "batch_size": batch,
            "new_tokens": self._options.new_tokens,
            "seed": self._options.seed + number,
        }
        process = self._processes[name]
        failed = ""
        for attempt in range(2):
            try:
                if not process.running:
                    process.start()
                answer = process.ask(task, self._options.limit_s)
            except ContestantTimeout as error:
                self._too_slow.setdefault(name, []).append((length, batch))
                self.report.not_run.append(NotRun(name, f"one round {error}", length, batch))
                return None
            except ContestantError as error:
                if attempt:
                    self.report.failures.append(Failure(name, length, batch, str(error), retried=False))
                    self.report.not_run.append(NotRun(name, f"failed twice: {error}", length, batch))
                    return None
                failed = str(error)
                continue
            if failed:
                self.report.failures.append(Failure(name, length, batch, failed, retried=True))
            return answer
        return None

    def _profile(self) -> None:
        """Time by kind of layer, in a process that holds nothing else."""
        lengths = [cell.prompt_length for cell in self.report.cells if cell.contestant == "engine"]
        if not lengths:
            return
        try:
            with ContestantProcess(self._setup("engine") | {"backend": "layers"}) as process:
                process.start()
                task = {"prompt_length": max(lengths), "steps": min(PROFILED_STEPS, self._options.new_tokens)}
                self.report.layer_times = [LayerTimes("engine", **process.ask(task, self._options.limit_s))]
        except ContestantError as error:
            self.report.not_run.append(NotRun("engine", f"time by kind of layer: {error}"))

    def _bound_all(self) -> None:
        """Hold every cell against the machine's best rates of this run."""
        if self._config.quantization is not None or self._config.target != "onnxruntime":
            self.report.not_run.append(
                NotRun("machine", "fractions of the roofline: only for unquantized engines on the CPU")
            )
            return
        self._bounds.clear()  # the rates may have been higher at the end
        for cell in self.report.cells:
            least = self._bound(cell.contestant, cell.prompt_length, cell.batch_size)
            if least is not None:
                cell.bound = least | {
                    "prefill_fraction": least["prefill_s"] / cell.summary["ttft_s"]["median"],
                    "decode_fraction": least["decode_s"] / cell.summary["itl_s"]["median"],
                }


def describe_engine(folder: Path, config: EngineConfig) -> dict[str, Any]:
    """What identifies an engine in a report. `digest` is of its config.json, which holds the digests of all its files."""
    return {
        "path": str(folder),
        "digest": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
        "target": config.target,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "layers": config.num_layers,
        "model": config.model,
        "ranks": config.mapping.ranks,
        "max_batch_size": config.limits.max_batch_size,
        "max_seq_len": config.limits.max_seq_len,
        "prefill_chunk": config.limits.prefill_chunk,
        "checkpoint": None if config.checkpoint is None else config.checkpoint.fingerprint,
        "mxcompile_version": config.mxcompile_version,
        "versions": config.versions,
    }


def environment(threads: int | None) -> dict[str, Any]:
    """Machine, versions, threads, commit and how busy the machine was."""
    from mxcompile.machine import examine

    machine = examine()
    return {
        "mxcompile": machine.mxcompile,
        "commit": _commit(),
        "python": machine.python,
        "system": machine.system,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_total": machine.memory_total,
        "gpus": [gpu.name for gpu in machine.gpus],
        "libraries": {name: version for name, version in machine.libraries.items() if version},
        "threads": threads,
        "load_average_before": list(os.getloadavg()),
    }


def _commit() -> str | None:
    """Commit of this source tree, with + when it has changes; None when it is not one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def finished_cells(report: BenchReport) -> Iterator[Cell]:
    """Cells in the order of batch, prompt length and contestant."""
    order = {name: index for index, name in enumerate(report.options["backends"])}
    yield from sorted(report.cells, key=lambda c: (c.batch_size, c.prompt_length, order.get(c.contestant, 9)))
