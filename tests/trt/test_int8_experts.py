"""Experts in int8: the lowered graph beside PyTorch with the same rounded weights, and the engines that are built of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_limits import LIMITS
from lowered_graph import Evaluated, lowered_ranks, random_model, small_config, with_int8_experts
from reference_ops import on_ranks
from test_lowered_numerics import FP32_LIMIT, STEPS, Torch

from engines.directory import read_config, verify_files
from engines.weights import map_weights
from export.parallel.mapping import ParallelMapping
from model_defs.checkpoint.reader import Checkpoint
from model_defs.quantization import dequantize_rows
from mxcompile.backends.weights import load_model
from mxcompile.building import BuildSummary, build
from mxcompile.inspection import inspect

Engine = tuple[Path, BuildSummary]
# int8 rounds a weight by 1/254 of its row's largest, about a hundredth of a usual one; with a fault in the scales it is off by its size.
WEIGHT_ERROR = 0.02


@pytest.fixture(scope="session")
def int8_ranks(tiny: Path, plugins_at_hand: Path) -> Engine:
    output = tiny.parent / "int8"
    options = LIMITS | {"tp_size": 2, "moe_ep_size": 2, "strip_weights": True, "quantize_experts": "int8"}
    return output, build(tiny, output, target="tensorrt-rtx", **options)


def test_every_layer_of_every_rank_has_the_int8_plugin(int8_ranks: Engine) -> None:
    folder, _ = int8_ranks
    verify_files(folder, read_config(folder), whole=True)
    assert inspect(folder)["plugins"] == {"LinearAttention": 7, "QMoEInt8": 8}


def test_the_engine_says_what_was_lost(int8_ranks: Engine) -> None:
    quantization = read_config(int8_ranks[0]).quantization
    assert quantization is not None
    assert quantization["experts"] == "int8"
    assert 0.001 < quantization["relative_weight_error"] < WEIGHT_ERROR


def test_a_ranks_weight_file_holds_its_experts_in_int8(tiny: Path, int8_ranks: Engine) -> None:
    folder, _ = int8_ranks
    config, whole = read_config(folder), load_model(Checkpoint.open(tiny), Checkpoint.open(tiny).config)
    for rank in range(2):
        weights = map_weights(folder, config, f"rank{rank}.weights.json")
        for name in ("layers.3.block_sparse_moe.fc1.weight", "layers.7.block_sparse_moe.fc2.weight"):
            stored, scales = weights[name], weights[f"{name}.scale"]
            assert (stored.dtype, scales.dtype) == (np.int8, np.float32)
            wanted = whole.get_parameter(name).numpy()[4 * rank : 4 * rank + 4]
            read_back = np.stack([dequantize_rows(*expert) for expert in zip(stored, scales, strict=True)])
            assert np.abs(read_back - wanted).max() <= scales.max() / 2 * 1.001


@pytest.mark.parametrize("mapping", [(1, None, None), (2, None, 2)])
def test_the_lowered_graph_equals_pytorch_with_rounded_experts(mapping: tuple[int, int | None, int | None]) -> None:
    config = small_config(intermediate_size=32)
    own, theirs = Torch(config, "float32"), Torch(config, "float32")
    random = np.random.default_rng(6)
    ids = [random.integers(0, config.vocab_size, (2, max(new))) for new in STEPS]
    source = random_model(config, "float32")
    graphs = lowered_ranks(config, "float32", source, "plugin", ParallelMapping.of(*mapping), quantized=True)
    with_int8_experts(theirs.model)

    def one(rank: int) -> list[np.ndarray]:
        run = Evaluated.of(graphs[rank], batch=2)
        return [run.step(step, new) for step, new in zip(ids, STEPS, strict=True)]

    found, changed = on_ranks(len(graphs), one)[0], 0.0
    for step, new, logits in zip(ids, STEPS, found, strict=True):
        valid = np.arange(max(new)) < np.array(new)[:, None]
        assert np.abs(logits - theirs.step(step, new))[valid].max() < FP32_LIMIT
        changed = max(changed, float(np.abs(logits - own.step(step, new))[valid].max()))
    assert changed > 100 * FP32_LIMIT  # else rounding would not have been seen


def test_bf16_engines_multiply_int8_by_fp32_scales() -> None:
    """The types that the plugin takes: 16-bit tokens beside int8 weights and fp32 scales."""
    config = small_config(intermediate_size=32, num_local_experts=2)
    graph = lowered_ranks(
        config,
        "bfloat16",
        random_model(config, "bfloat16"),
        "plugin",
        ParallelMapping.of(1, None, None),
        quantized=True,
    )[0]
    node = next(node for node in graph.graph if node.op_type == "QMoEInt8")
    types = [value.dtype.name for value in node.inputs]  # type: ignore[union-attr]
    assert types == ["BFLOAT16", "FLOAT", "INT8", "FLOAT", "BFLOAT16", "INT8", "FLOAT"]
    run = Evaluated.of(graph, batch=1)
    assert np.isfinite(run.step(np.array([[1, 2, 3]]), [3])).all()
