"""What benchmarks/gpu/engine_run.py does with steps that fail or hang, and without a GPU; and that what it prepares builds an engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from model_defs.config_schemas import config_to_schema, read_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(1, str(ROOT / "benchmarks" / "gpu"))

import engine_run  # noqa: E402
from engine_run import Runner, run_engines  # noqa: E402


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _steps(folder: Path) -> dict:
    return json.loads((folder / "gpu-engines.json").read_text())["steps"]


def test_every_step_is_kept_whatever_becomes_of_it(tmp_path: Path) -> None:
    runner = Runner({"hardware": "made up"}, tmp_path / "gpu-engines.json", seconds=600)
    assert _steps(tmp_path) == {}
    result = tmp_path / "result.json"
    assert runner.step("good", _python(f"open({str(result)!r}, 'w').write('[1, 2]')"), 300, result)
    assert runner.clean
    assert not runner.step("bad", _python("print('wrong number'); raise SystemExit(4)"), 300, result)
    assert not runner.step("crashes", _python("import os; os.abort()"), 300)
    assert not runner.step("hangs", _python("import time; time.sleep(600)"), 2)
    assert not runner.skip("other", "tensorrt: not there")
    found = _steps(tmp_path)
    assert {name: record["outcome"] for name, record in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "crashes": "failed",
        "hangs": "hung",
        "other": "not run: tensorrt: not there",
    }
    assert found["good"]["result"] == [1, 2]
    assert "result" not in found["bad"]  # the file of the step before is gone
    assert found["bad"]["said"][-1] == "wrong number"
    assert (found["bad"]["exit_code"], found["crashes"]["exit_code"]) == (4, -6)
    assert not runner.clean


def test_steps_beyond_the_time_are_not_begun(tmp_path: Path) -> None:
    runner = Runner({}, tmp_path / "gpu-engines.json", seconds=0)
    assert not runner.step("late", _python("raise SystemExit(0)"), 300)
    assert _steps(tmp_path) == {"late": {"outcome": "not run: out of time"}}


def test_an_engine_that_is_not_built_is_neither_validated_nor_timed(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    runner = Runner({}, tmp_path / "gpu-engines.json", seconds=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
    targets = {"onnxruntime": "", "tensorrt": "tensorrt: not there"}
    run_engines(runner, tmp_path, ("tiny",), targets, "cpu", tmp_path)
    found = {name: record["outcome"] for name, record in _steps(tmp_path).items()}
    assert found == {"tiny, onnxruntime: build": "failed", "tiny, tensorrt": "not run: tensorrt: not there"}


@pytest.mark.parametrize("model", engine_run.MODELS)
def test_every_model_can_be_written_as_a_checkpoint(model: str, tmp_path: Path) -> None:
    config, file = engine_run.config_of(model), tmp_path / "config.json"
    file.write_text(json.dumps(config_to_schema(config, "original")))
    assert read_config(file) == config


def test_what_is_missing_is_named() -> None:
    found = {
        "tensorrt": "not there: ModuleNotFoundError",
        "onnxruntime": "1.31.1",
        "providers": ["CPUExecutionProvider"],
    }
    assert engine_run.missing("tensorrt", found, "cuda") == "tensorrt: not there: ModuleNotFoundError"
    assert "onnxruntime-gpu" in engine_run.missing("onnxruntime", found, "cuda")
    assert engine_run.missing("onnxruntime", found, "cpu") == ""


def test_without_a_gpu_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["engine_run.py", "run", str(tmp_path)])
    assert engine_run.main() == 3
    assert capsys.readouterr().err.startswith("error: no NVIDIA GPU found")
    monkeypatch.setattr(sys, "argv", ["engine_run.py", "rehearse", str(tmp_path)])
    assert engine_run.main() == 2
    assert "run prepare first" in capsys.readouterr().err
