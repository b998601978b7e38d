"""The model that tests of benchmarks and reports use."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engines.directory import read_config
from model_defs.config import ModelConfig
from model_defs.presets import preset
from mxcompile.bench.drift_results import MEASURES, DriftError, DriftReport, DriftRow
from mxcompile.bench.perplexity_results import PerplexityReport, Side
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
