"""The model that tests of benchmarks and reports use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engines.directory import read_config
from model_defs.config import ModelConfig
from model_defs.presets import preset
from mxcompile.bench.drift_results import MEASURES, DriftError, DriftReport, DriftRow
from mxcompile.bench.needle import NeedleCell, NeedleReport
from mxcompile.bench.perplexity_results import PerplexityReport, Side
from mxcompile.bench.results import BenchReport, Cell, Contestant, LayerTimes, NotRun
from mxcompile.bench.statistics import summary
from mxcompile.bench.subject import describe_engine
from mxcompile.validation.thresholds import EXACT


def two_layers() -> ModelConfig:
    """Preset tiny with one layer of each kind."""
    return dataclasses.replace(preset("tiny"), layer_kinds=("lightning", "softmax"), slope_layers=2)


def _head(engine: Path, options: dict) -> dict:
    config = read_config(engine)
    assert config.checkpoint is not None
    checkpoint = {"path": config.checkpoint.path, "fingerprint": config.checkpoint.fingerprint, "moved": False}
    head = {"created": "2026-01-01T00:00:00+00:00", "options": options, "environment": {}, "finished": True}
    return head | {"engine": describe_engine(engine, config), "checkpoint": checkpoint}


def made_perplexity(engine: Path, off: float = 1e-6) -> PerplexityReport:
    """A measurement with made-up values: two segments, the engine's -log p `off` above PyTorch's, transformers' 0.5."""
    values = [[2.0, 3.0, 2.5], [1.0]]
    sides = [
        Side(name, "float32", [[value + more for value in part] for part in values], logit_scale=6.0)
        for name, more in (("engine", off), ("pytorch", 0.0), ("transformers", 0.5))
    ]
    text = {"path": "sea.txt", "bytes": 40, "sha256": "00", "tokens": 5, "segments": 2}
    report = PerplexityReport(**_head(engine, {"context": 4}), text=text, sides=sides)
    report.judge(EXACT["float32"])
    return report


def made_needle(engine: Path) -> NeedleReport:
    """A grid of one cell with made-up numbers."""
    head = {key: value for key, value in _head(engine, {}).items() if key not in ("options", "finished")}
    cell = NeedleCell(64, 50, 1e-5, 1e-12, True, 0.4, 3, 3)
    missing = [{"length": 999, "reason": "exceeds the engine's max_seq_len 200"}]
    return NeedleReport(**head, haystack="random tokens", limit=2e-4, exact=True, cells=[cell], not_run=missing)


def made_drift(engine: Path, error: float | None = 1e-6) -> DriftReport:
    """A measurement with made-up errors at two steps of one layer."""
    rows = []
    for step in (10, 1000):
        found = [
            DriftError(name, 1, error, 1e-4, 9.5, "agrees" if error is not None and error <= 1e-4 else "differs")
            for name in MEASURES
        ]
        rows.append(DriftRow(step, 0, found))
    missing = [{"steps": 100000, "reason": "exceeds the engine's max_seq_len 2000"}]
    return DriftReport(**_head(engine, {"steps": [10, 1000, 100000]}), rows=rows, followed=3, not_run=missing)


def made_bench(engine, factor=1.0) -> BenchReport:
    """A benchmark with made-up times: PyTorch takes `3 / factor` times as long as the engine."""
    config = read_config(engine)
    cells = []
    for batch in (1, 2):
        for length in (16, 64):
            for name, slow in (("engine", factor), ("pytorch", 3.0)):
                first, step = 0.01 * slow * length / 16 * batch, 0.002 * slow
                rounds = [
                    {
                        "pass": i,
                        "ttft_s": first * (1 + i / 50),
                        "steps_s": [step * (1 + i / 40)] * 4,
                        "peak_bytes": 50_000_000,
                        "state_bytes": 90_000,
                    }
                    for i in range(3)
                ]
                bound = {
                    "prefill_s": first / 3,
                    "decode_s": step / 4,
                    "prefill_fraction": 1 / 3,
                    "decode_fraction": 0.25,
                }
                cells.append(Cell(name, length, batch, rounds, summary(rounds, length, batch), bound))
    environment = {
        "cpu": "a CPU",
        "cores": 2,
        "threads": 2,
        "load_average_before": [0.0, 0.0, 0.0],
        "libraries": {"numpy": "2"},
    }
    kinds = {"lightning": 0.5, "softmax": 0.2, "experts": 0.2, "rest": 0.1}
    return BenchReport(
        created="2026-01-01T00:00:00+00:00",
        updated="2026-01-01T00:10:00+00:00",
        options={
            "backends": ["engine", "pytorch"],
            "repeats": 3,
            "warmup": 1,
            "passes": 3,
            "new_tokens": 4,
            "threads": 2,
        },
        engine=describe_engine(engine, config),
        checkpoint={"path": config.checkpoint.path, "fingerprint": config.checkpoint.fingerprint},
        environment=environment,
        finished=True,
        rates=[{"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e11}],
        contestants=[Contestant("engine", "float32"), Contestant("pytorch", "float32")],
        cells=cells,
        not_run=[NotRun("engine", "exceeds its max_seq_len 200", 512, 1)],
        layer_times=[LayerTimes("engine", 64, 4, kinds, kinds)],
    )
