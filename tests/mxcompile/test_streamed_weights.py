"""The PyTorch definition with weights that stay in the checkpoint, beside the one that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from model_defs.checkpoint.reader import Checkpoint
from model_defs.presets import preset
from model_defs.quantization import WHOLE, BlockScheme, rounded_blocks, rounded_rows
from mxcompile.backends import weights
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.building import build
from mxcompile.checkpoints import create_checkpoint
from mxcompile.cli.main import main
from mxcompile.validation.options import ValidationOptions
from mxcompile.validation.run import validate

# Sums of at most 1,152 products of size 1 in another order: 2^-24 * 1152 / 2 of the largest, for logits of 6 and eight layers.
LIMIT = 2e-4
PROMPTS = [[5, 9, 200, 31, 7] * 13, [11]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed") / "tiny"
    create_checkpoint(preset("tiny"), folder, seed=3)
    return folder


def run(checkpoint: Path, **options: Any) -> list[np.ndarray]:
    session = PyTorchSession.load(checkpoint, **options)
    state = session.new_state(2)
    found = [session.prefill(PROMPTS, state, chunk=40), session.decode([3, 4], state)]
    result = session.forward(np.array([[8, 9], [10, 11]]), [2, 1], state, positions="all", taps=True)
    return [*found, result.logits, *result.taps.values(), state.recurrent(0)]


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, LIMIT),
        ({"dtype": "float64"}, 1e-9),
        ({"layers": 3}, LIMIT),
        ({"quantize_experts": "int8", "expert_parts": 2}, LIMIT),
        ({"quantize": "int8"}, LIMIT),
        # In fp64, because an activation at half a step may be rounded to either side.
        ({"quantize": "int4", "int8_activations": True, "dtype": "float64"}, 1e-9),
    ],
    ids=["fp32", "fp64", "layers", "experts", "int8", "activations"],
)
def test_weights_that_are_read_as_they_are_used_compute_the_same(
    tiny: Path, options: dict[str, Any], limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of 50 rows, so that matrices are read in many and the last one is not whole."""
    monkeypatch.setattr(weights, "_BLOCK", 128 * 50)
    held, streamed = (run(tiny, stream=stream, **options) for stream in (False, True))
    for found, expected in zip(streamed, held, strict=True):
        np.testing.assert_allclose(found, expected, atol=limit, rtol=0)


def test_streamed_experts_read_only_what_tokens_chose(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = PyTorchSession.load(tiny, stream=True, layers=1)
    read: set[int] = set()
    whole = weights.StreamedWeight.linear_of

    def noted(self: Any, x: Any, index: int) -> Any:
        if self is session.model.layers[0].block_sparse_moe.fc2:
            read.add(index)
        return whole(self, x, index)

    monkeypatch.setattr(weights.StreamedWeight, "linear_of", noted)
    model = weights.load_model(Checkpoint.open(tiny), session.model.config, stream=True)
    session = PyTorchSession(model)
    session.prefill([[5]], session.new_state(1))
    assert len(read) == session.model.config.num_experts_per_tok


def test_only_vectors_and_routers_are_held(tiny: Path) -> None:
    streamed = PyTorchSession.load(tiny, stream=True).model
    assert all(parameter.dim() == 1 or ".gate." in name for name, parameter in streamed.named_parameters())


def test_an_engine_is_validated_against_weights_that_do_not_fit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "e"
    build(tiny, engine, max_batch_size=4, max_seq_len=128, layers=2, threads=1)
    options = ValidationOptions(quick=True, lengths=(1, 65), threads=1)
    assert not validate(engine, tiny, options).reference["streams"]
    monkeypatch.setattr("mxcompile.machine.available_memory", lambda: 1 << 20)
    report = validate(engine, tiny, options)
    assert report.passed
    assert report.reference["streams"]
    for option, streamed in (("--hold-weights", False), ("--stream-weights", True)):
        with pytest.raises(SystemExit) as end:
            main(["validate", str(engine), "--against", str(tiny), "--quick", "--lengths", "1", option])
        assert end.value.code == 0
        assert ("read as they are used" in capsys.readouterr().out) == streamed


def test_a_tensor_of_another_shape_is_named(tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    config = checkpoint.config
    wider = type(config).from_dict(config.to_dict() | {"vocab_size": config.vocab_size + 1})
    with pytest.raises(weights.EngineError, match=r"embed_tokens.*the model needs"):
        weights.load_model(checkpoint, wider, stream=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_weights_are_rounded_to_the_very_numbers_of_an_engine(dtype: Any) -> None:
    """Among them blocks of zeros and, in 4 bits, blocks whose largest magnitude occurs with both signs."""
    random = np.random.default_rng(1)
    for size in (1e-3, 1.0, 1e3):
        weight_RC = (random.standard_normal((40, 768)) * size).astype(dtype)
        weight_RC[0], weight_RC[1, ::2], weight_RC[1, 1::2] = 0, size, -size
        wide = torch.from_numpy(weight_RC.astype(np.float32))
        for scheme in WHOLE.values():
            assert np.array_equal(weights.rounded(wide, scheme).numpy(), rounded_blocks(weight_RC, scheme))
        assert np.array_equal(weights.rounded(wide, BlockScheme(8, 768)).numpy(), rounded_rows(weight_RC))
    weight_RC[3, 5] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        weights.rounded(torch.from_numpy(weight_RC.astype(np.float32)), WHOLE["int4"])
