"""Everything at once on the real server, for some seconds: see soak.py for the long form."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from served import triton_venv
from soak import LIMITS, RANKS, soak
from soak_questions import ask


@pytest.fixture(scope="module")
def questions(loaded):
    return ask(loaded, 30, 6, seed=0)


def test_everything_at_once(installation, engine, questions, tmp_path):
    found = soak(engine, triton_venv(), tmp_path, questions, 8, 12)
    assert not found["wrong"]
    assert found["right_answers"] > 24
    assert found["happened"]["malformed, refused"] > 0
    assert found["happened"]["left"] > 0


def test_ranks_that_are_killed(installation, checkpoint, questions, tmp_path):
    """An engine of two ranks. How many answers come between the kills depends on the machine; one before, one after must."""
    if shutil.which("mpirun", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("mpirun is not installed here")
    from mxcompile.building import build

    build(checkpoint, tmp_path / "engine", **(LIMITS | RANKS))
    found = soak(tmp_path / "engine", triton_venv(), tmp_path, questions, 12, 6, kill_every_s=5)
    assert not found["wrong"]
    assert "rank" in found["killed"]
