import shutil
from pathlib import Path

import pytest
from checkpoint_helpers import MICRO

from model_defs.checkpoint.create import create_checkpoint


@pytest.fixture(scope="session")
def _micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro") / "checkpoint"
    create_checkpoint(MICRO, folder, seed=1, dtype="float32", max_shard_bytes=40_000)
    return folder


@pytest.fixture
def micro(_micro: Path, tmp_path: Path) -> Path:
    """A fresh copy of a sharded fp32 checkpoint of MICRO, for damaging."""
    return Path(shutil.copytree(_micro, tmp_path / "micro"))
