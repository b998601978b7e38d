"""What a benchmark found: plain records that go to JSON and come back unchanged, and the file that a run grows in."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mxcompile.errors import MxcompileError

SCHEMA = "mxcompile.bench"
SCHEMA_VERSION = 2  # 2: rounds in passes, intervals of medians, memory of devices
MAX_FILE_BYTES = 512 * 2**20


@dataclass
class Contestant:
    """One side. `left_out` is the reason why it takes no part; empty when it does. Bytes and seconds."""

    name: str
    dtype: str = ""
    left_out: str = ""
    load_s: float = 0.0
    loaded_bytes: int = 0  # resident after loading
    notes: list[str] = field(default_factory=list)


@dataclass
class Cell:
    """One contestant at one prompt length and batch size. `repeats`: what every round measured; `summary`: see `statistics.summary`.

    `bound`: least seconds of prefill and of a decode step at the machine's measured rates, and the fraction of them that was reached.
    """

    contestant: str
    prompt_length: int
    batch_size: int
    repeats: list[dict[str, Any]]
    summary: dict[str, Any]
    bound: dict[str, float] | None = None


@dataclass
class NotRun:
    """A cell that could not run, and why. `prompt_length` and `batch_size` are None for a part that is no cell."""

    contestant: str
    reason: str
    prompt_length: int | None = None
    batch_size: int | None = None


@dataclass
class Failure:
    """An execution error. `retried`: whether the second try went well."""

    contestant: str
    prompt_length: int
    batch_size: int
    error: str
    retried: bool


@dataclass
class LayerTimes:
    """Seconds by kind of layer in a separate profiled run: one prompt, and one decode step behind it (median of `steps`)."""

    contestant: str
    prompt_length: int
    steps: int
    prefill_s: dict[str, float]
    decode_s: dict[str, float]


@dataclass
class BenchReport:
    """Everything a benchmark found. `to_dict` is the JSON form, `from_dict` its inverse."""

    created: str  # ISO 8601, UTC
    updated: str
    options: dict[str, Any]
    engine: dict[str, Any] | None
    checkpoint: dict[str, Any] | None
    environment: dict[str, Any]
    finished: bool = False
    interruptions: int = 0
    rates: list[dict[str, float]] = field(default_factory=list)
    contestants: list[Contestant] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    layer_times: list[LayerTimes] = field(default_factory=list)

    def cell(self, contestant: str, prompt_length: int, batch_size: int) -> Cell | None:
        """The cell that was measured, if it was."""
        key = (contestant, prompt_length, batch_size)
        return next((c for c in self.cells if (c.contestant, c.prompt_length, c.batch_size) == key), None)

    def reason(self, contestant: str, prompt_length: int, batch_size: int) -> str | None:
        """Why that cell was not run, if it was tried."""
        key = (contestant, prompt_length, batch_size)
        return next((n.reason for n in self.not_run if (n.contestant, n.prompt_length, n.batch_size) == key), None)

    def best_rates(self) -> dict[str, float] | None:
        """The highest of every rate that was measured in this run."""
        if not self.rates:
            return None
        return {key: max(item[key] for item in self.rates) for key in ("copy_bytes_per_s", "matmul_flops_per_s")}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> BenchReport:
        """Inverse of `to_dict`. Raises MxcompileError for another kind of file or schema version."""
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            raise MxcompileError("this is not a benchmark of mxcompile; `mxcompile bench --json` writes one")
        if values.get("schema_version") != SCHEMA_VERSION:
            raise MxcompileError(
                f"the benchmark has schema version {values.get('schema_version')!r}, this mxcompile reads {SCHEMA_VERSION}; "
                "measure again"
            )
        try:
            known = {item.name: values[item.name] for item in dataclasses.fields(cls)}
            known["contestants"] = [Contestant(**item) for item in values["contestants"]]
            known["cells"] = [Cell(**item) for item in values["cells"]]
            known["not_run"] = [NotRun(**item) for item in values["not_run"]]
            known["failures"] = [Failure(**item) for item in values["failures"]]
            known["layer_times"] = [LayerTimes(**item) for item in values["layer_times"]]
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise MxcompileError(f"the benchmark is damaged ({error}); measure again") from None


def finished_cells(report: BenchReport) -> Iterator[Cell]:
    """Cells in the order of batch, prompt length and contestant."""
    order = {name: index for index, name in enumerate(report.options["backends"])}
    yield from sorted(report.cells, key=lambda c: (c.batch_size, c.prompt_length, order.get(c.contestant, 9)))


def read_json(path: str | os.PathLike[str]) -> BenchReport:
    """Read what `write_json` wrote. Raises MxcompileError, naming the file, when it is damaged, something else or of another version."""
    return read_any(path, BenchReport.from_dict)


def read_any(path: str | os.PathLike[str], convert: Any) -> Any:
    """`convert` of the file's JSON; every complaint is a MxcompileError that names the file."""
    source = Path(path)
    if not source.is_file():
        raise MxcompileError(f"{path}: there is no such file")
    if source.stat().st_size > MAX_FILE_BYTES:
        raise MxcompileError(f"{path}: is too large for a benchmark")
    try:
        values = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise MxcompileError(
            f"{path}: not valid JSON ({error}); the file is damaged or was cut off, measure again"
        ) from None
    try:
        return convert(values)
    except MxcompileError as error:
        raise MxcompileError(f"{path}: {error}") from None


def write_json(values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write by way of a neighbour that is renamed when it is whole, so that a killed run leaves the last whole file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            json.dump(values, stream, indent=1, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
