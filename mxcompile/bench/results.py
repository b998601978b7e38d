"""What a benchmark found: plain records that go to JSON and come back unchanged, and the file that a run grows in."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from model_defs.errors import ConfigError
from mxcompile.errors import MxcompileError
from mxcompile.result_shapes import CheckpointPart, EnginePart, EnvironmentPart
from mxcompile.strict_records import (
    NOT_EMPTY,
    Count,
    NotNegative,
    Positive,
    Rule,
    Whole,
    damaged,
    read_record,
)

SCHEMA = "mxcompile.bench"
SCHEMA_VERSION = 2  # 2: rounds in passes, intervals of medians, memory of devices
MAX_FILE_BYTES = 512 * 2**20


_SHARE = Rule("a number from 0 to 1", lambda value: 0 <= value <= 1)
_FEW = Rule("at most 1000", lambda value: value <= 1000)
_RANKED = Rule(
    "an interval whose rank is at most half of its passes", lambda value: 2 * value["rank"] <= value["passes"] + 1
)


class IntervalValues(TypedDict):
    """See `agreement.interval`."""

    low: NotNegative
    high: NotNegative
    level: Annotated[float, _SHARE]
    rank: Count
    passes: Annotated[Count, _FEW]


class SpreadValues(TypedDict):
    """See `statistics.spread`."""

    median: Positive
    low: NotNegative
    high: NotNegative
    relative: NotNegative
    outliers: list[Whole]
    interval: Annotated[IntervalValues, _RANKED]


class StepValues(SpreadValues):
    """Of all decode steps."""

    p90: NotNegative
    p99: NotNegative
    slow_steps: Whole


class SummaryValues(TypedDict):
    """See `statistics.summary`."""

    ttft_s: SpreadValues
    itl_s: StepValues
    itl_p99_s: SpreadValues
    prefill_tokens_per_s: SpreadValues
    decode_tokens_per_s: SpreadValues
    peak: SpreadValues
    peak_bytes: Count
    state_bytes: Whole
    device_peak_bytes: Whole | None
    device_own_bytes: Whole | None


RoundValues = TypedDict(  # `pass` is no name for a field of a class
    "RoundValues",
    {
        "pass": Whole,
        "ttft_s": Positive,
        "steps_s": Annotated[list[Positive], NOT_EMPTY],
        "peak_bytes": Count,
        "state_bytes": Whole,
        "device_peak_bytes": NotRequired[Whole | None],
        "device_own_bytes": NotRequired[Whole | None],
    },
)
"""What one round measured."""


class BoundValues(TypedDict):
    """Least seconds, and the fraction of them that was reached."""

    prefill_s: NotNegative
    decode_s: NotNegative
    prefill_fraction: NotNegative
    decode_fraction: NotNegative


class RateValues(TypedDict):
    """See `rates.measure`."""

    copy_bytes_per_s: Positive
    matmul_flops_per_s: Positive


class KindValues(TypedDict):
    """See `layer_times.KINDS`."""

    lightning: NotNegative
    softmax: NotNegative
    experts: NotNegative
    rest: NotNegative


class OptionValues(TypedDict, total=False):
    """See `options.BenchOptions`."""

    backends: list[str]
    new_tokens: Count
    repeats: Count
    warmup: Whole
    passes: Count
    threads: Count


@dataclass
class Contestant:
    """One side. `left_out` is the reason why it takes no part; empty when it does. Bytes and seconds."""

    name: str
    dtype: str = ""
    left_out: str = ""
    load_s: NotNegative = 0.0
    loaded_bytes: Whole = 0  # resident after loading
    notes: list[str] = field(default_factory=list)


@dataclass
class Cell:
    """One contestant at one prompt length and batch size. `repeats`: what every round measured; `summary`: see `statistics.summary`.

    `bound`: least seconds of prefill and of a decode step at the machine's measured rates, and the fraction of them that was reached.
    """

    contestant: str
    prompt_length: Count
    batch_size: Count
    repeats: Annotated[list[Annotated[dict[str, Any], RoundValues]], NOT_EMPTY]
    summary: Annotated[dict[str, Any], SummaryValues]
    bound: Annotated[dict[str, float], BoundValues] | None = None


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
    prefill_s: Annotated[dict[str, NotNegative], KindValues]
    decode_s: Annotated[dict[str, NotNegative], KindValues]


@dataclass
class BenchReport:
    """Everything a benchmark found. `to_dict` is the JSON form, `from_dict` its inverse."""

    created: str  # ISO 8601, UTC
    updated: str
    options: Annotated[dict[str, Any], OptionValues]
    engine: EnginePart | None
    checkpoint: CheckpointPart | None
    environment: EnvironmentPart
    finished: bool = False
    interruptions: Whole = 0
    rates: list[Annotated[dict[str, float], RateValues]] = field(default_factory=list)
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
        report = read_record(cls, values)
        if report.cells:
            for option in ("backends", "repeats", "warmup", "passes", "new_tokens", "threads"):
                if option not in report.options:
                    raise damaged(f"options.{option}", "is missing")
        _check_model(report.engine)
        return report


def _check_model(engine: dict[str, Any] | None) -> None:
    """Raises MxcompileError when the engine's model, from which sizes are computed, is none."""
    model = (engine or {}).get("model")
    if model is None:
        return
    from model_defs.config import ModelConfig

    try:
        config = ModelConfig.from_dict(model)
        config.state_elements_per_sequence(), config.cache_elements_per_token()
    except (ConfigError, ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise damaged("engine.model", f"describes no model ({error})") from None


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


def to_json(values: dict[str, Any]) -> str:
    """The text of a file. Raises ValueError for what is no finite number."""
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(values: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write by way of a neighbour that is renamed when it is whole, so that a killed run leaves the last whole file."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    text = to_json(values)
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
