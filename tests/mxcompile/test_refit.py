"""`mxcompile refit`: the engine that a build from the other checkpoint would have made, or the old one."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines import load
from engines.directory import read_config, verify_files
from model_defs.presets import preset
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.errors import MxcompileError
from mxcompile.refitting import refit

LIMITS = {"max_batch_size": 2, "max_seq_len": 64, "layers": 2, "threads": 1}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model with other weights."""
    folder = tmp_path_factory.mktemp("refit")
    for seed, name in enumerate(("before", "after")):
        create_checkpoint("tiny", folder / name, seed=seed)
    return folder / "before", folder / "after"


@pytest.fixture(scope="module")
def engine(checkpoints: tuple[Path, Path]) -> Path:
    folder = checkpoints[0].parent / "engine"
    build(checkpoints[0], folder, **LIMITS)
    return folder


@pytest.mark.parametrize("options", [{}, {"quantize_experts": "int8"}, {"tp_size": 2, "moe_ep_size": 2}])
def test_a_refitted_engine_is_the_one_that_a_build_makes(
    checkpoints: tuple[Path, Path], tmp_path: Path, options: dict[str, object]
) -> None:
    before, after = checkpoints
    build(before, tmp_path / "refitted", **LIMITS, **options)  # type: ignore[arg-type]
    summary = refit(tmp_path / "refitted", after)
    build(after, tmp_path / "built", **LIMITS, **options)  # type: ignore[arg-type]
    ours, theirs = read_config(tmp_path / "refitted"), read_config(tmp_path / "built")
    verify_files(tmp_path / "refitted", ours, whole=True)
    differing = [name for name in theirs.files if ours.files.get(name) != theirs.files[name]]
    # What a rank's pieces hold tells apart builds, among other things by the checkpoint.
    assert not [name for name in differing if not name.endswith(".pieces")]
    left = {"files": {}, "options": {}}
    assert dataclasses.replace(ours, **left) == dataclasses.replace(theirs, **left)
    assert summary.weights > 20
    assert summary.written_bytes > 10**6
    sessions = [load(tmp_path / name, threads=1) for name in ("refitted", "built")]
    found, wanted = (session.prefill([[1, 2, 3]], session.new_state(1)) for session in sessions)
    assert np.array_equal(found, wanted)
    for session in sessions:
        getattr(session, "close", lambda: None)()


def test_another_model_is_refused_and_the_engine_stays(engine: Path, tmp_path: Path) -> None:
    create_checkpoint(dataclasses.replace(preset("tiny"), vocab_size=640), tmp_path / "wider")
    config = read_config(engine)
    with pytest.raises(MxcompileError, match="vocab_size is 512 in the engine and 640 in the checkpoint") as caught:
        refit(engine, tmp_path / "wider")
    assert caught.value.exit_code == 2
    assert read_config(engine) == config
    verify_files(engine, config, whole=True)


def test_a_checkpoint_that_does_not_compute_leaves_the_engine(
    checkpoints: tuple[Path, Path], engine: Path, tmp_path: Path
) -> None:
    """As a build: what gives no finite logits never takes the engine's place."""
    broken = shutil.copytree(checkpoints[1], tmp_path / "broken")
    _write_nan(broken, "model.norm.weight")
    config = read_config(engine)
    with pytest.raises(Exception, match="not finite") as caught:
        refit(engine, broken)
    assert getattr(caught.value, "exit_code", None) == 1
    assert read_config(engine) == config
    assert [left.name for left in engine.parent.glob(f".{engine.name}*")] == []


def test_a_killed_refit_leaves_the_old_engine(checkpoints: tuple[Path, Path], engine: Path) -> None:
    """Killed when everything is written and nothing is in place yet."""
    code = (
        "import os, signal, sys; from engines.directory import EngineDirWriter; from mxcompile.refitting import refit; "
        "EngineDirWriter.commit = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL); refit(sys.argv[1], sys.argv[2])"
    )
    config = read_config(engine)
    done = subprocess.run([sys.executable, "-c", code, engine, checkpoints[1]], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_config(engine) == config
    session = load(engine, threads=1)
    assert np.isfinite(session.prefill([[1]], session.new_state(1))).all()
    assert list(engine.parent.glob(f".{engine.name}.partial-*"))
    copy = shutil.copytree(engine, engine.parent / "copy")
    copy.rename(engine.parent / "other")  # the remains belong to `engine` alone
    refit(engine, checkpoints[0])
    assert not list(engine.parent.glob(f".{engine.name}.partial-*"))


def test_the_command_says_what_it_did(checkpoints: tuple[Path, Path], engine: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(engine, tmp_path / "copy")
    command = [sys.executable, "-m", "mxcompile", "refit", copy, "--checkpoint", checkpoints[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Refitted" in done.stdout
    config = read_config(copy)
    assert config.checkpoint is not None
    assert config.checkpoint.path == str(checkpoints[1])


def _write_nan(checkpoint: Path, name: str) -> None:
    """Overwrite a tensor's first number in place."""
    from model_defs.checkpoint.reader import Checkpoint

    entry = Checkpoint.open(checkpoint).entries[name]
    with Path(entry.file).open("r+b") as file:
        file.seek(entry.offset)
        file.write(b"\xff\xff\xff\xff")
