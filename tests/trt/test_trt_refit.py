"""Refitting TensorRT engines: the plans stay, the weights outside them become those of the other checkpoint."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from engine_limits import LIMITS
from test_int8_experts import Engine, int8_ranks
from test_trt_ranks import two_ranks

from engines.directory import read_config, verify_files
from engines.weights import map_weights
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from model_defs.checkpoint.reader import Checkpoint
from model_defs.weights import weight_recipes
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.errors import MxcompileError
from mxcompile.refitting import refit

__all__ = ["int8_ranks", "two_ranks"]


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


def test_weights_that_stay_in_a_checkpoint_are_then_in_the_other(
    other: Path, two_ranks: Engine, tmp_path: Path
) -> None:
    ours = shutil.copytree(two_ranks[0], tmp_path / "ours")
    summary, source = refit(ours, other), Checkpoint.open(other)
    config, plan = read_config(ours), ShardingPlan(source.config, ParallelMapping.of(2, None, 2))
    assert summary.referenced_bytes == 2 * 2 * sum(math.prod(plan.held_shape(name)) for name in plan.shapes)
    for rank in range(2):
        weights = map_weights(ours, config, f"rank{rank}.weights.json")
        for name, recipe in weight_recipes(source.config).items():
            whole = recipe.assemble(source.array)
            assert np.array_equal(weights[name], whole[plan.part(name, rank).slices]), name


def test_an_engine_with_its_weights_inside_says_how_it_could(bf16_engine: Engine, other: Path) -> None:
    with pytest.raises(MxcompileError, match="--strip-weights") as caught:
        refit(bf16_engine[0], other)
    assert caught.value.exit_code == 2
