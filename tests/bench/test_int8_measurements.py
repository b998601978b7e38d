"""Engines with int8 experts are judged against PyTorch with weights rounded alike; what the rounding costs is stated beside."""

from __future__ import annotations

import pytest

from mxcompile.bench.drift import drift
from mxcompile.bench.needle import needle
from mxcompile.bench.perplexity import perplexity
from mxcompile.bench.perplexity_results import TWIN, verdict
from mxcompile.building import build


@pytest.fixture(scope="module")
def rounded(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "engine"
    build(checkpoint, folder, max_batch_size=1, max_seq_len=100, threads=2, quantize_experts="int8")
    return folder


def test_perplexity_states_what_rounding_costs(rounded, tmp_path):
    (tmp_path / "t.txt").write_text("The sea was calm, and the lamp in the tower turned.")
    report = perplexity(rounded, tmp_path / "t.txt", threads=2)
    assert [side.name for side in report.sides] == ["engine", "pytorch", TWIN]
    assert report.passed, verdict(report)
    row = report.engine_row
    assert row["median_difference"] > 10 * report.judged["median_difference"]  # rounding is far more than fp32
    assert f"Rounding the experts' weights changes the original's perplexity by {row['change']:+.1e}" in verdict(report)


def test_drift_and_needle(rounded):
    assert drift(rounded, None, (20,), threads=2).passed
    assert needle(rounded, None, (40,), (50,), threads=2).passed
