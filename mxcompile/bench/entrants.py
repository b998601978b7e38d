"""The contestants of a benchmark: loads them, notes why one is left out, and takes a round from one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engines.config import EngineConfig
from mxcompile.bench.contestants import ContestantError, ContestantProcess, ContestantTimeout
from mxcompile.bench.feasibility import Feasibility
from mxcompile.bench.options import BenchOptions
from mxcompile.bench.results import BenchReport, Contestant, Failure, NotRun


class Entrants:
    """The processes that take part in the present pass, by name."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        options: BenchOptions,
        report: BenchReport,
        feasibility: Feasibility,
    ) -> None:
        self._folder, self._config, self._options = folder, config, options
        self._report, self._feasibility = report, feasibility
        self._processes: dict[str, ContestantProcess] = {}

    def setup(self, name: str) -> dict[str, Any]:
        """What a contestant's process must know to open its side."""
        checkpoint = self._report.checkpoint or {}
        return {
            "backend": name,
            "engine": str(self._folder),
            "checkpoint": checkpoint.get("path"),
            "moved": checkpoint.get("moved", False),
            "dtype": self._options.dtype,
            "layers": self._config.num_layers,
            "threads": self._options.threads,
        }

    def enter(self, name: str, process: ContestantProcess) -> None:
        """Load a contestant, or note why it is left out; one that was left out in an earlier pass stays out."""
        entry = next((item for item in self._report.contestants if item.name == name), None)
        if entry is None:
            entry = Contestant(name, self._feasibility.dtype(name))
            self._report.contestants.append(entry)
        elif entry.left_out:
            return
        entry.left_out = self._reason_to_leave_out(name)
        if entry.left_out:
            return
        try:
            ready = process.start()
        except ContestantError as error:
            entry.left_out = str(error)
            return
        entry.load_s, entry.loaded_bytes = ready["load_s"], max(entry.loaded_bytes, ready["loaded_bytes"])
        entry.notes = ready["notes"]
        self._processes[name] = process

    def _reason_to_leave_out(self, name: str) -> str:
        if name == "transformers":
            if find_spec("transformers") is None:
                return "transformers is not installed; install it with: pip install 'mxcompile[transformers]'"
            if (self._report.checkpoint or {}).get("layers") != self._config.num_layers:
                return "the engine holds the first layers only, and the port always runs all of them"
        return self._feasibility.too_large_to_load(name)

    def able(self) -> list[str]:
        """Names of those that were loaded, in the order of the options."""
        return [name for name in self._options.backends if name in self._processes]

    def reason_against(self, name: str, length: int, batch: int) -> str:
        """Why a contestant that was loaded cannot run a cell, or nothing."""
        return self._feasibility.reason_against(name, self._processes[name].ready, length, batch)

    def sample(self, name: str, length: int, batch: int, number: int) -> dict[str, Any] | None:
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
                self._feasibility.was_too_slow(name, length, batch)
                self._report.not_run.append(NotRun(name, f"one round {error}", length, batch))
                return None
            except ContestantError as error:
                if attempt:
                    self._report.failures.append(Failure(name, length, batch, str(error), retried=False))
                    self._report.not_run.append(NotRun(name, f"failed twice: {error}", length, batch))
                    return None
                failed = str(error)
                continue
            if failed:
                self._report.failures.append(Failure(name, length, batch, failed, retried=True))
            return answer
        return None
