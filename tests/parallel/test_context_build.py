"""`mxcompile build --cp-size`: from a checkpoint to an engine that agrees with PyTorch, and sizes that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_ranks import TOLERANCE

from engines import load
from engines.directory import read_config
from engines.onnxruntime.build import DEFAULT_PREFILL_CHUNK
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.cli.export import command as export_command

pytest.importorskip("mpi4py", reason="running several ranks needs mpi4py and an MPI launcher")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    create_checkpoint("tiny", folder / "checkpoint", seed=0, dtype="float32")
    return folder / "checkpoint"


def test_an_engine_of_two_segments_agrees_with_pytorch(checkpoint: Path, tmp_path: Path) -> None:
    summary = build(checkpoint, tmp_path / "engine", cp_size=2, max_seq_len=512, threads=2)
    config = read_config(tmp_path / "engine")
    assert (config.mapping.tp_size, config.mapping.cp_size, config.mapping.ranks) == (1, 2, 2)
    assert config.limits.prefill_chunk == min(512, 2 * DEFAULT_PREFILL_CHUNK)
    assert summary.sizes["weights"] < 1.1 * 4 * summary.parameters  # all ranks read one copy
    reference, random = PyTorchSession.load(checkpoint, threads=2), np.random.default_rng(0)
    with load(tmp_path / "engine", threads=2) as session:  # type: ignore[attr-defined]
        prompts = [random.integers(0, session.vocab_size, length).tolist() for length in (65, 0, 130)]
        ours, theirs = session.new_state(3), reference.new_state(3)
        for step in range(3):
            found = session.decode([step] * 3, ours) if step else session.prefill(prompts, ours)
            wanted = reference.decode([step] * 3, theirs) if step else reference.prefill(prompts, theirs)
            assert np.abs(found - wanted).max() < TOLERANCE


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cp_size": 0}, "cp_size must be a positive whole number, not 0"),
        ({"cp_size": -2}, "cp_size must be a positive whole number, not -2"),
        ({"cp_size": 3, "prefill_chunk": 2}, "a prefill chunk has 2 tokens.*take --cp-size 2 at most"),
        ({"cp_size": 2, "target": "tensorrt-rtx"}, "tensorrt-rtx does not split prompts over ranks"),
        (
            {"cp_size": 2, "tp_size": 3},
            "tp_size 3: the 4 attention heads do not divide by it; possible near it: 2 and 4",
        ),
    ],
)
def test_impossible_sizes_are_refused_with_the_reason(checkpoint: Path, tmp_path: Path, options, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Exception, match=words) as caught:
        build(checkpoint, tmp_path / "engine", **options)
    assert getattr(caught.value, "exit_code", None) == 2
    assert not (tmp_path / "engine").exists()


def test_the_graphs_of_all_segments_are_exported(tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--layers", "1", "--cp-size", "2", "-o", str(tmp_path / "graphs"), "--json"]
    result = CliRunner().invoke(export_command, arguments, catch_exceptions=False)
    assert json.loads(result.stdout)["layers"] == 1
    assert sorted(file.name for file in (tmp_path / "graphs").iterdir()) == ["rank0.onnx", "rank1.onnx"]
