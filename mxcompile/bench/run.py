"""`bench`: contestants in processes of their own take turns at every cell; the report grows on disk, cell by cell."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from engines.directory import read_config
from mxcompile.bench import estimate
from mxcompile.bench.contestants import ContestantError, ContestantProcess
from mxcompile.bench.entrants import Entrants
from mxcompile.bench.environment import now
from mxcompile.bench.feasibility import Feasibility
from mxcompile.bench.options import BenchOptions
from mxcompile.bench.results import BenchReport, Cell, LayerTimes, NotRun, write_json
from mxcompile.bench.resuming import begin
from mxcompile.bench.statistics import summary
from mxcompile.bench.subject import find_checkpoint
from mxcompile.progress import Progress, SilentProgress

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
    report = begin(folder, config, checkpoint, options, json_file, resume)
    runner = _Runner(folder, config, options, report, json_file, progress, announce)
    try:
        runner.run()
    except KeyboardInterrupt:
        report.interruptions += 1
        runner.save()
        raise
    return report


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
        self._options, self.report = options, report
        self._feasibility = Feasibility(config, options, report)
        self._entrants = Entrants(folder, config, options, report, self._feasibility)
        self._json_file = json_file
        self._progress, self._announce = progress, announce
        self._left = ""

    def save(self) -> None:
        """Write the report as it stands."""
        self.report.updated = now()
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
                        process = stack.enter_context(ContestantProcess(self._entrants.setup(name)))
                        self._entrants.enter(name, process)
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
        reasons = {name: self._entrants.reason_against(name, length, batch) for name in names}
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
                    sample = self._entrants.sample(name, length, batch, ROUNDS_APART * number + turn)
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

    def _tell(self, cells: list[tuple[int, int]], place: int, number: int) -> None:
        """How long the cells from `place` of this pass on, and the passes behind it, will take; announced before the first cell."""
        options, report = self._options, self.report
        able = self._entrants.able()
        runs: dict[tuple[int, int], bool] = {}
        for length, batch in cells:
            deciding = "engine" if "engine" in able else next(iter(able), None)  # what it cannot run, nobody runs
            runs[length, batch] = deciding is not None and not self._entrants.reason_against(deciding, length, batch)
        rounds = [
            (name, length, batch, options.warmup + options.rounds(later))
            for later in range(number, options.passes)
            for length, batch in (cells[place:] if later == number else cells)
            for name in able
            if runs[length, batch]
            and report.reason(name, length, batch) is None
            and self._rounds_left(name, length, batch, later)
        ]
        seconds = estimate.seconds_left(report, rounds, self._feasibility.bound, options.new_tokens)
        self._left = "" if seconds is None else f", about {estimate.duration(seconds)} left"
        if self._announce is not None:
            missing = sum(not possible for possible in runs.values())
            skipped = f" ({missing} sizes cannot run)" if missing else ""
            how_long = "" if seconds is None else f": about {estimate.duration(seconds)}"
            count = len({(name, length, batch) for name, length, batch, _ in rounds})
            self._announce(f"{count} cells to measure{skipped}, passes: {options.passes}{how_long}")
            self._announce = None

    def _profile(self) -> None:
        """Time by kind of layer, in a process that holds nothing else."""
        lengths = [cell.prompt_length for cell in self.report.cells if cell.contestant == "engine"]
        if not lengths:
            return
        try:
            with ContestantProcess(self._entrants.setup("engine") | {"backend": "layers"}) as process:
                process.start()
                task = {"prompt_length": max(lengths), "steps": min(PROFILED_STEPS, self._options.new_tokens)}
                self.report.layer_times = [LayerTimes("engine", **process.ask(task, self._options.limit_s))]
        except ContestantError as error:
            self.report.not_run.append(NotRun("engine", f"time by kind of layer: {error}"))

    def _bound_all(self) -> None:
        """Hold every cell against the machine's best rates of this run."""
        if not self._feasibility.bounded:
            self.report.not_run.append(
                NotRun("machine", "fractions of the roofline: only for unquantized engines on the CPU")
            )
            return
        self._feasibility.forget_bounds()  # the rates may have been higher at the end
        for cell in self.report.cells:
            least = self._feasibility.bound(cell.contestant, cell.prompt_length, cell.batch_size)
            if least is not None:
                cell.bound = least | {
                    "prefill_fraction": least["prefill_s"] / cell.summary["ttft_s"]["median"],
                    "decode_fraction": least["decode_s"] / cell.summary["itl_s"]["median"],
                }
