"""Experts quantized from the checkpoint: the numbers, the graph, and that nothing is read before it is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import load
from export.errors import ExportError
from export.quantize import QuantizeExperts
from model_defs.checkpoint.reader import Checkpoint
from model_defs.quantization import dequantize_rows, quantize_rows
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.exporting import bound_graph, graph

# Logits of about 6 after 8 layers in fp32, as mxcompile/validation/thresholds.py.
LIMIT = 2e-4


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_a_weight_is_off_by_at_most_half_a_step_of_its_row(rows: int, columns: int, size: float, seed: int) -> None:
    weight = (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(np.float32)
    weight[0] = 0
    quantized = np.empty(weight.shape, np.int8)
    scales = quantize_rows(weight, quantized)
    assert quantized.min() >= -127
    assert (np.abs(dequantize_rows(quantized, scales) - weight) <= scales[:, None] * 0.5001).all()
    assert (np.abs(quantized[1:]).max(axis=1, initial=0) == 127).all()
    assert scales[0] == 1


def test_rows_quantize_alone_as_they_do_among_others() -> None:
    weight = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
    whole, part = np.empty(weight.shape, np.int8), np.empty((7, 16), np.int8)
    scales = quantize_rows(weight, whole)
    assert np.array_equal(quantize_rows(weight[2000:2007], part), scales[2000:2007])
    assert np.array_equal(part, whole[2000:2007])


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantize_rows(np.array([[1.0, wrong]], np.float32), np.empty((1, 2), np.int8))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "tiny"
    create_checkpoint("tiny", folder)
    return folder


class Counting:
    """A checkpoint that counts what is read of it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.entries, self.read = checkpoint, checkpoint.entries, 0

    def array(self, name: str) -> np.ndarray:
        self.read += 1
        return self._checkpoint.array(name)


def test_weights_are_read_once_and_when_they_are_asked_for(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    source = Counting(checkpoint)
    model = bound_graph(checkpoint.config.truncated(2), "bfloat16", source)  # type: ignore[arg-type]
    quantize = QuantizeExperts()
    quantize(model)
    assert source.read == 0
    values = model.graph.initializers
    weight = values["layers.1.block_sparse_moe.fc1.weight"]
    stored = weight.const_value.numpy()
    assert (stored.dtype, weight.dtype) == (np.uint8, ir.DataType.UINT8)
    read = source.read
    scales = values["layers.1.block_sparse_moe.fc1.weight.scale"].const_value.numpy()
    assert source.read == read > 0
    gate = checkpoint.array("model.layers.1.block_sparse_moe.experts.5.w1.weight").astype(np.float32)
    read_back = dequantize_rows((stored[5, 0::2].astype(np.int16) - 128).astype(np.int8), scales[5, 0::2])
    assert np.abs(read_back - gate).max() <= scales[5].max() * 0.501
    assert 0 < quantize.error.relative < 0.02


def test_a_graph_without_a_checkpoint_cannot_be_quantized(tiny: Path) -> None:
    with pytest.raises(ExportError, match="not bound to a checkpoint"):
        QuantizeExperts()(graph(Checkpoint.open(tiny).config.truncated(2), "float32"))


def test_onnxruntime_runs_int8_experts_as_pytorch_does(tiny: Path, tmp_path: Path) -> None:
    """Beside PyTorch with the same rounded experts; with the checkpoint's own it must differ, or nothing was quantized."""
    build(tiny, tmp_path / "e", quantize_experts="int8", layers=2, max_seq_len=64, threads=1)
    session = load(tmp_path / "e", threads=1)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9, 8]]
    found = session.prefill(prompts, session.new_state(2))
    rounded, own = (PyTorchSession.load(tiny, layers=2, quantize_experts=how) for how in ("int8", None))
    assert np.abs(found - rounded.prefill(prompts, rounded.new_state(2))).max() < LIMIT
    assert np.abs(found - own.prefill(prompts, own.new_state(2))).max() > 10 * LIMIT
