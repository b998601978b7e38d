"""A tiny checkpoint of two layers, one of each kind, and engines built from it; made once for all tests of benchmarks and reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_models import two_layers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Do not write into it."""
    from mxcompile.checkpoints import create_checkpoint

    folder = tmp_path_factory.mktemp("bench") / "checkpoint"
    create_checkpoint(two_layers(), folder, seed=5)
    return folder


@pytest.fixture(scope="session")
def engine(checkpoint, tmp_path_factory) -> Path:
    """For at most 2 sequences of 200 tokens; do not write into it."""
    from mxcompile.building import build

    folder = tmp_path_factory.mktemp("bench") / "engine"
    build(checkpoint, folder, max_batch_size=2, max_seq_len=200, threads=2)
    return folder


@pytest.fixture(scope="session")
def mxcompile():
    """Runs the real command in a process of its own."""

    def run(*arguments, **options):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        command = [sys.executable, "-m", "mxcompile", *map(str, arguments)]
        return subprocess.run(
            command, **({"capture_output": True, "text": True, "timeout": 300, "env": environment} | options)
        )

    return run
