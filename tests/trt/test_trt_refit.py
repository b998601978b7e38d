"""Refitting TensorRT engines: the plans stay, the weights outside them become those of the other checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from engine_limits import LIMITS
from test_int8_experts import Engine, int8_ranks

from engines.directory import read_config, verify_files
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.errors import MxcompileError
from mxcompile.refitting import refit

__all__ = ["int8_ranks"]


@pytest.fixture(scope="module")
def other(tiny: Path) -> Path:
    folder = tiny.parent / "other"
    create_checkpoint("tiny", folder, seed=1)
    return folder


def test_refitted_ranks_are_those_that_a_build_makes(other: Path, int8_ranks: Engine, tmp_path: Path) -> None:
    ours = shutil.copytree(int8_ranks[0], tmp_path / "ours")
    before = read_config(ours)
    refit(ours, other)
    after = read_config(ours)
    verify_files(ours, after, whole=True)
    options = LIMITS | {"tp_size": 2, "moe_ep_size": 2, "strip_weights": True, "quantize_experts": "int8"}
    build(other, tmp_path / "theirs", target="tensorrt-rtx", **options)
    wanted = read_config(tmp_path / "theirs")
    for rank in range(2):
        assert after.files[f"rank{rank}.engine"] == before.files[f"rank{rank}.engine"]
        for name in (f"rank{rank}.weights.bin", f"rank{rank}.weights.json", f"rank{rank}.layers.json"):
            assert after.files[name] == wanted.files[name]
        assert after.files[f"rank{rank}.weights.bin"] != before.files[f"rank{rank}.weights.bin"]
    assert after.quantization == wanted.quantization != before.quantization
    assert after.checkpoint == wanted.checkpoint


def test_an_engine_with_its_weights_inside_says_how_it_could(bf16_engine: Engine, other: Path) -> None:
    with pytest.raises(MxcompileError, match="--strip-weights") as caught:
        refit(bf16_engine[0], other)
    assert caught.value.exit_code == 2
