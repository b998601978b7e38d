"""The transformers port as a contestant: the same weights, the faults it is known for, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from bench_models import two_layers

from engines.errors import EngineError
from mxcompile.backends.pytorch import PyTorchSession
from mxcompile.backends.transformers import TransformersSession
from mxcompile.checkpoints import create_checkpoint

# Two fp32 programs of the same formula that add in different orders; logits here are up to 6. A wrong weight shows from 0.1 on.
LIMIT = 2e-3


@pytest.mark.parametrize("schema", ["original", "hf"])
def test_lightning_layers_compute_the_same_from_any_schema(tmp_path, schema):
    config = dataclasses.replace(two_layers(), layer_kinds=("lightning", "lightning"))
    create_checkpoint(config, tmp_path / "c", seed=2, schema=schema)
    port, ours = TransformersSession.load(tmp_path / "c", threads=2), PyTorchSession.load(tmp_path / "c", threads=2)
    prompts = np.random.default_rng(0).integers(0, ours.vocab_size, (2, 300)).tolist()
    state, reference = port.new_state(2), ours.new_state(2)
    assert np.abs(port.prefill(prompts, state) - ours.prefill(prompts, reference)).max() < LIMIT
    for tokens in ([3, 4], [5, 6]):
        assert np.abs(port.decode(tokens, state) - ours.decode(tokens, reference)).max() < LIMIT
    assert state.lengths.tolist() == [302, 302]
    assert state.nbytes == reference.nbytes


def test_full_rotary_is_the_fault_that_is_stated(checkpoint):
    port, ours = TransformersSession.load(checkpoint, threads=2), PyTorchSession.load(checkpoint, threads=2)
    state, reference = port.new_state(1), ours.new_state(1)
    assert np.abs(port.prefill([[7]], state) - ours.prefill([[7]], reference)).max() < LIMIT  # position 0 turns nothing
    assert np.abs(port.decode([8], state) - ours.decode([8], reference)).max() > 10 * LIMIT
    assert any("rotary" in note for note in port.notes)


def test_what_it_refuses(checkpoint):
    port = TransformersSession.load(checkpoint)
    with pytest.raises(EngineError, match="in chunks"):
        port.prefill([[1, 2, 3]], port.new_state(1), chunk=2)
    with pytest.raises(EngineError, match="equal length"):
        port.prefill([[1, 2], [3]], port.new_state(2))
    with pytest.raises(EngineError, match="between 0 and 511"):
        port.prefill([[512]], port.new_state(1))
    with pytest.raises(EngineError, match="float32, bfloat16"):
        TransformersSession.load(checkpoint, "int3")
