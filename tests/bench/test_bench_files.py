"""Benchmark files and the statistics in them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxcompile.bench import memory
from mxcompile.bench.results import BenchReport, read_json, write_json
from mxcompile.bench.statistics import spread, summary
from mxcompile.errors import MxcompileError


def empty_report() -> BenchReport:
    return BenchReport("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00", {}, None, None, {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a benchmark"),
        ('{"schema": "mxcompile.validation"}', "not a benchmark"),
        (
            '{"schema": "mxcompile.bench", "schema_version": 99}',
            "schema version 99, this mxcompile reads 2; measure again",
        ),
        ('{"schema": "mxcompile.bench", "schema_version": 2}', "damaged"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(MxcompileError, match=message) as error:
        read_json(tmp_path / "b.json")
    assert "b.json" in str(error.value)


def test_a_cut_off_file_is_refused_and_a_missing_one(tmp_path):
    write_json(empty_report().to_dict(), tmp_path / "b.json")
    whole = (tmp_path / "b.json").read_text()
    assert read_json(tmp_path / "b.json") == empty_report()
    (tmp_path / "b.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(MxcompileError, match="was cut off"):
        read_json(tmp_path / "b.json")
    with pytest.raises(MxcompileError, match="no such file"):
        read_json(tmp_path / "none.json")


def test_a_failed_write_leaves_the_last_whole_file(tmp_path):
    write_json({"a": 1}, tmp_path / "b.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"a": float("nan")}, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_spread_holds_every_value(values):
    found = spread(values)
    assert found["low"] <= found["median"] <= found["high"]
    assert found["low"] == min(values)
    assert found["high"] == max(values)


def test_an_outlier_is_marked_and_kept():
    found = spread([1.0, 1.01, 0.99, 1.02, 5.0])
    assert found["outliers"] == [4]
    assert found["high"] == 5.0
    assert found["median"] == 1.01


def test_summary_against_a_second_computation():
    random = np.random.default_rng(0)
    repeats = [
        {"ttft_s": 0.5 + i, "steps_s": random.random(20).tolist(), "peak_bytes": 10 + i, "state_bytes": 3}
        for i in range(3)
    ]
    found = summary(repeats, prompt_tokens=100, batch=4)
    steps = sorted(value for item in repeats for value in item["steps_s"])
    assert found["itl_s"]["median"] == pytest.approx((steps[29] + steps[30]) / 2)
    assert found["itl_s"]["p90"] == pytest.approx(steps[53] + 0.1 * (steps[54] - steps[53]))
    assert found["ttft_s"]["median"] == 1.5
    assert found["prefill_tokens_per_s"]["median"] == pytest.approx(400 / 1.5)
    assert found["decode_tokens_per_s"]["high"] == pytest.approx(max(80 / sum(item["steps_s"]) for item in repeats))
    assert found["peak_bytes"] == 12


def test_peak_memory_sees_what_was_held_and_given_back():
    memory.reset_peak()
    before = memory.peak_bytes()
    block = np.ones(64 << 17)  # 64 MiB
    del block
    assert memory.peak_bytes() - before > 48 << 20
    memory.reset_peak()
    assert memory.peak_bytes() - before < 48 << 20


def test_a_build_does_not_tell_the_peak_memory_of_what_started_it():
    block = np.ones(64 << 20)  # 512 MiB
    child = [sys.executable, "-c", "from mxcompile.exporting import peak_memory; print(peak_memory())"]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    assert int(done.stdout) < block.nbytes
