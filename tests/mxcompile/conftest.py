"""A small checkpoint and an engine built from it, made once for all tests of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_process import environment


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of preset tiny; do not write into it."""
    from mxcompile.checkpoints import create_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    create_checkpoint("tiny", folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint, tmp_path_factory) -> Path:
    """Its fp32 ONNX Runtime engine for at most 4 sequences of 96 tokens; do not write into it."""
    from mxcompile.building import build

    folder = tmp_path_factory.mktemp("engines") / "tiny"
    build(tiny_checkpoint, folder, max_batch_size=4, max_seq_len=96, threads=2)
    return folder


@pytest.fixture(scope="session")
def mxcompile():
    """Runs the real command in a process of its own: mxcompile("run", folder, cwd=...) -> CompletedProcess."""

    def run(*arguments, **options):
        command = [sys.executable, "-m", "mxcompile", *map(str, arguments)]
        return subprocess.run(
            command, **({"capture_output": True, "text": True, "timeout": 300, "env": environment()} | options)
        )

    return run
