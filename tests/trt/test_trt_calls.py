"""Every member of TensorRT's Python module that we use is there and takes our arguments: of the flavours that are installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorrt_calls import problems, uses

from plugins.tensorrt_runtime import MODULES


@pytest.mark.parametrize("flavour", ["tensorrt-rtx", pytest.param("tensorrt", marks=pytest.mark.machine)])
def test_tensorrt_has_what_we_call(flavour: str) -> None:
    if importlib.util.find_spec(MODULES[flavour]) is None:
        pytest.skip(f"{MODULES[flavour]} is not installed")
    command = [sys.executable, Path(__file__).parent / "tensorrt_calls.py", flavour]  # one flavour per process
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 of them wrong" in done.stdout


def test_the_uses_are_read_from_the_code() -> None:
    members = {use.member for use in uses()}
    assert {"Builder", "IExecutionContext.execute_async_v3", "OnnxParser.load_initializer"} <= members
    assert len(members) > 50


def test_a_missing_member_and_another_signature_are_found() -> None:
    def context() -> None:
        """create_execution_context(self: M.ICudaEngine, strategy: M.Strategy) -> M.IExecutionContext"""

    engine = SimpleNamespace(create_execution_context=context)
    found = problems(SimpleNamespace(ICudaEngine=engine), rtx=False)
    assert any("there is no Builder.create_network" in line for line in found)
    assert any("ICudaEngine.create_execution_context is called with (0, ())" in line for line in found)
    assert not any("ComputeCapability" in line for line in found)
