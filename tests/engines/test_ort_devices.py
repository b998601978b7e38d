"""ONNX Runtime's CUDA provider: what is said where it is not there. Where a GPU is, the whole of `mxcompile validate` runs on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from engines.errors import EngineError
from engines.onnxruntime.devices import check_started, providers
from mxcompile.building import CUDA_DTYPES, build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.errors import MxcompileError


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])


def test_a_missing_provider_is_named_before_anything_is_done(without_cuda: None, tmp_path: Path) -> None:
    create_checkpoint("tiny", tmp_path / "tiny")
    with pytest.raises(EngineError, match="install onnxruntime-gpu") as caught:
        build(tmp_path / "tiny", tmp_path / "e", device="cuda")
    assert caught.value.exit_code == 3
    assert [left.name for left in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("options", [{"target": "tensorrt-rtx"}, {"tp_size": 2}])
def test_a_device_is_for_one_rank_of_onnxruntime(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(MxcompileError, match="--device") as caught:
        build(tmp_path / "tiny", tmp_path / "e", device="cuda", **options)
    assert caught.value.exit_code == 2


def test_the_wanted_provider_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    (cuda, options), cpu = providers("cuda")
    assert (cuda, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["use_tf32"] == "0"  # else float32 products have 10 bits
    assert providers("cpu") == ["CPUExecutionProvider"]
    with pytest.raises(EngineError, match="unknown device 'tpu'"):
        providers("tpu")


class Started:
    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_a_provider_that_did_not_start_is_no_fallback() -> None:
    with pytest.raises(EngineError, match="did not start") as caught:
        check_started(Started(), "cuda")  # type: ignore[arg-type]
    assert caught.value.exit_code == 3
    check_started(Started(), "cpu")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_the_engine_equals_pytorch_on_cuda(tmp_path: Path, dtype: str) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider; install onnxruntime-gpu")
    create_checkpoint("tiny", tmp_path / "tiny")
    build(tmp_path / "tiny", tmp_path / "e", device="cuda", dtype=dtype, max_seq_len=1024)
    command = [sys.executable, "-m", "mxcompile", "validate", tmp_path / "e", "--against", tmp_path / "tiny", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
