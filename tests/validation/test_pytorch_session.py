"""The PyTorch definition as a session: the parts of the interface that validation of engines stands on."""

from __future__ import annotations

import numpy as np
import pytest
from plain_models import PLAIN, plain_checkpoint

from engines.errors import EngineError
from engines.interface import Session, State
from export.contract import hidden_tap, router_tap
from mxcompile.backends.pytorch import PyTorchSession


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    checkpoint = plain_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint")
    return PyTorchSession.load(checkpoint, threads=1, max_seq_len=600, max_batch_size=3)


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 96, count).tolist()


def test_it_is_a_session(session):
    assert isinstance(session, Session)
    assert isinstance(session.new_state(1), State)
    assert session.config.target == "pytorch"
    assert session.config.checkpoint is not None
    assert session.vocab_size == 96
    assert session.config.layers("softmax") == [2]


def test_rows_move_between_states(session):
    """A row read from one state and written to another goes on as if nothing had happened; cleared rows are fresh."""
    first, second = session.new_state(1), session.new_state(2)
    session.prefill([tokens(290)], first)  # past the first capacity
    session.prefill([tokens(5, 1), tokens(7, 2)], second)
    second.write_row(1, first.read_row(0))
    assert np.array_equal(first.read_row(0, 280).key[2], first.read_row(0).key[2][:, 280:])
    assert second.lengths.tolist() == [5, 290]
    expected = session.decode([3], first)[0]
    got = session.decode([4, 3], second)[1]
    np.testing.assert_allclose(got, expected, atol=2e-5)
    second.clear_row(1)
    fresh = session.new_state(1)
    np.testing.assert_allclose(session.decode([4, 9], second)[1], session.decode([9], fresh)[0], atol=2e-5)
    assert second.read_row(1).nbytes > 0
    assert second.key(2).shape == (2, 2, 7, 32)
    assert not second.key(2)[1, :, 1:].any()


def test_taps_have_the_names_of_the_contract(session):
    result = session.forward(np.array([tokens(4), tokens(4, 1)]), [4, 2], session.new_state(2), taps=True)
    assert set(result.taps) == {tap(layer) for layer in range(4) for tap in (hidden_tap, router_tap)}
    assert result.taps[hidden_tap(0)].shape == (2, 4, 64)
    assert not result.taps[router_tap(3)][1, 2:].any()
    assert result.logits.shape == (2, 1, 96)


def test_a_layer_with_its_own_routing_is_itself(session):
    ids = tokens(12)
    taps = session.forward(np.array([ids]), [12], session.new_state(1), taps=True).taps
    again = session.hidden_if_routed(1, ids, taps[router_tap(1)][0])
    np.testing.assert_array_equal(again, taps[hidden_tap(1)][0])
    other = session.hidden_if_routed(1, ids, -taps[router_tap(1)][0])
    assert np.abs(other - again).max() > 0.1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.prefill([tokens(601)], s.new_state(1)), "exceeds"),
        (lambda s: s.prefill([[96]], s.new_state(1)), "outside the vocabulary"),
        (lambda s: s.prefill([[1], [2]], s.new_state(1)), "2 prompts for a state of 1 rows"),
        (lambda s: s.prefill([[1]], s.new_state(1), 0), "at least 1 token"),
        (lambda s: s.decode([1, 2], s.new_state(1)), "one token for each"),
        (lambda s: s.forward(np.zeros((1, 2), int), [3], s.new_state(1)), "do not lie within"),
        (lambda s: s.forward(np.zeros((1, 2)), [2], s.new_state(1)), "must be integers"),
        (lambda s: s.forward(np.zeros((1, 2), int), [2], s.new_state(1), positions=np.array([[2]])), "within 0 and 1"),
        (lambda s: s.new_state(4), "max_batch_size 3"),
        (lambda s: s.new_state(1).read_row(1), "does not exist"),
        (lambda s: s.new_state(1).recurrent(2), "has no recurrent_state"),
    ],
)
def test_wrong_use_is_one_clear_error(session, act, message):
    with pytest.raises(EngineError, match=message):
        act(session)


def test_an_unknown_dtype_is_refused(tmp_path):
    plain_checkpoint(tmp_path / "c")
    with pytest.raises(EngineError, match="float32, float64"):
        PyTorchSession.load(tmp_path / "c", "int8")
    short = PyTorchSession.load(tmp_path / "c", layers=1)
    assert short.config.num_layers == 1
    assert len(PLAIN.layer_kinds) == 4
