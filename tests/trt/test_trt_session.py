"""The session's logic on a device of host memory, beside the PyTorch definition. What a GPU would add is not tested here."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from host_device import HostDevice, HostEngine, in_memory
from lowered_graph import canonical, numpy_of, random_model, small_config

from engines.config import EngineConfig, Limits, RankFiles
from engines.contract import port, states
from engines.errors import EngineError
from engines.interface import Session, State
from engines.tensorrt.build import give_out, weights_to_inputs
from engines.tensorrt.lengths import capacity_for
from engines.tensorrt.lowering import lower
from engines.tensorrt.session import TrtSession
from export.contract import hidden_tap, router_tap
from model_defs.text_model import TextModel
from mxcompile.backends.pytorch import PyTorchSession

# fp32 beside fp32 over 8 layers, as tests/export/test_canonical_graph.py.
LIMIT = 5e-5
BATCH, CHUNK, MAX_SEQ_LEN = 3, 8, 40


class Made:
    def __init__(self, max_positions: int = CHUNK, strip: bool = False, taps: bool = False) -> None:
        config = small_config()
        self.model: TextModel = random_model(config, "float32")
        graph = canonical(config, "float32", self.model)
        names = [tap(layer) for layer in range(config.num_layers) for tap in (hidden_tap, router_tap)] if taps else []
        give_out(graph, names)
        lower(graph, capacity_for(MAX_SEQ_LEN), "plugin")
        weights = []
        described = [port(value) for value in graph.graph.inputs]
        if strip:
            outside = list(graph.graph.initializers)
            weights_to_inputs(graph, outside)
            weights = [in_memory(n, numpy_of(p)) for n, p in self.model.named_parameters() if n in outside]
        self.config = EngineConfig(
            mxcompile_version="test",
            target="tensorrt-rtx",
            model=config.to_dict(),
            dtype="float32",
            limits=Limits(BATCH, MAX_SEQ_LEN, CHUNK),
            inputs=described,
            outputs=[port(value) for value in graph.graph.outputs],
            states=list(states(graph.graph)),
            ranks=[RankFiles(0, "rank0.engine")],
            taps=names,
            options={"capacity": capacity_for(MAX_SEQ_LEN), "max_positions": max_positions},
        )
        self.device = HostDevice()
        engine = HostEngine(self.device, graph, BATCH, CHUNK, max_positions)
        self.session = TrtSession(self.config, self.device, engine, weights)


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@pytest.fixture(scope="module")
def reference(made: Made) -> PyTorchSession:
    return PyTorchSession(made.model, max_seq_len=MAX_SEQ_LEN)


def test_it_is_a_session(made: Made) -> None:
    assert isinstance(made.session, Session)
    assert isinstance(made.session.new_state(1), State)


def test_ragged_prefill_in_chunks_then_decode_by_graph(made: Made, reference: PyTorchSession) -> None:
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [20, 21], []]
    ours, theirs = made.session.new_state(3), reference.new_state(3)
    found, wanted = made.session.prefill(prompts, ours), reference.prefill(prompts, theirs)
    assert np.abs(found - wanted).max() < LIMIT
    launched = made.device.launches
    for token in range(6):
        tokens = [token, token + 7, token + 30]
        assert np.abs(made.session.decode(tokens, ours) - reference.decode(tokens, theirs)).max() < LIMIT
    assert made.device.launches - launched == 4  # two plain steps, then replays
    assert ours.lengths.tolist() == [17, 8, 6]
    for layer in range(8):
        if layer == 7:
            assert np.abs(ours.key(layer) - theirs.key(layer)).max() < LIMIT
            assert np.abs(ours.value(layer) - theirs.value(layer)).max() < LIMIT
        else:
            assert np.abs(ours.recurrent(layer) - theirs.recurrent(layer)).max() < LIMIT


def test_two_states_in_turn_never_share_a_graph(made: Made, reference: PyTorchSession) -> None:
    pairs = [(made.session.new_state(1), reference.new_state(1)) for _ in range(2)]
    for step in range(3):
        for number, (ours, theirs) in enumerate(pairs):
            for repeat in range(3):
                token = [step + 10 * number + repeat]
                assert np.abs(made.session.decode(token, ours) - reference.decode(token, theirs)).max() < LIMIT


def test_all_positions_and_idle_rows(made: Made, reference: PyTorchSession) -> None:
    ours, theirs = made.session.new_state(3), reference.new_state(3)
    ids = np.arange(15).reshape(3, 5)
    found = made.session.forward(ids, [5, 0, 3], ours, positions="all").logits
    wanted = reference.forward(ids, np.array([5, 0, 3]), theirs, positions="all").logits
    assert np.abs(found - wanted).max() < LIMIT
    before = ours.recurrent(0)[1]
    made.session.forward(ids[:, :1], [1, 0, 1], ours)
    assert np.array_equal(ours.recurrent(0)[1], before)


def test_a_row_is_copied_and_cleared(made: Made) -> None:
    state = made.session.new_state(2)
    made.session.prefill([[5, 6, 7], [8]], state)
    snapshot = state.read_row(0)
    part = state.read_row(0, 2)
    for layer, array in snapshot.key.items():
        assert np.array_equal(part.key[layer], array[:, 2:])
        assert np.array_equal(part.value[layer], snapshot.value[layer][:, 2:])
    state.write_row(1, snapshot)
    logits = made.session.decode([9, 9], state)
    assert np.array_equal(logits[0], logits[1])
    state.clear_row(0)
    fresh = made.session.new_state(1)
    alone = made.session.prefill([[3, 4]], fresh)
    assert np.array_equal(made.session.prefill([[3, 4], []], state)[0], alone[0])


def test_weights_from_outside_give_the_same(made: Made) -> None:
    other = Made(strip=True).session
    prompts = [[1, 2, 3]]
    found = other.prefill(prompts, other.new_state(1))
    assert np.array_equal(found, made.session.prefill(prompts, made.session.new_state(1)))


def test_taps_are_what_is_behind_each_layer(reference: PyTorchSession) -> None:
    """Of a step longer than a chunk, of ragged rows; and an engine without them says how to get them."""
    session = Made(taps=True).session
    ids, new = np.random.default_rng(7).integers(0, 64, (3, 19)), np.array([19, 0, 12])
    ours, theirs = session.new_state(3), reference.new_state(3)
    found = session.forward(ids, new, ours, taps=True)
    wanted = reference.forward(ids, new, theirs, taps=True)
    assert set(found.taps) == set(wanted.taps)
    assert len(found.taps) == 16
    for name, tap in wanted.taps.items():
        assert found.taps[name].shape == tap.shape
        assert np.abs(found.taps[name] - tap).max() < LIMIT * max(1, np.abs(tap).max() / 4)  # LIMIT is for values of 4
    assert np.abs(found.logits - wanted.logits).max() < LIMIT
    assert session.forward(ids[:, :1], [1, 1, 1], ours).taps == {}


def test_memory_goes_back_with_the_state(made: Made) -> None:
    before = len(made.device.blocks)
    state = made.session.new_state(2)
    assert len(made.device.blocks) > before
    del state
    gc.collect()
    assert len(made.device.blocks) == before


def test_what_passes_a_limit_is_refused_and_changes_nothing(made: Made) -> None:
    session, state = made.session, made.session.new_state(1)
    session.prefill([list(range(MAX_SEQ_LEN))], state)
    with pytest.raises(EngineError, match=r"41 exceeds the engine's max_seq_len 40"):
        session.decode([1], state)
    with pytest.raises(EngineError, match="max_batch_size 3"):
        session.new_state(4)
    with pytest.raises(EngineError, match="token id 64"):
        session.decode([64], state)
    with pytest.raises(EngineError, match="made by another session"):
        session.decode([1], Made(max_positions=1).session.new_state(1))
    with pytest.raises(EngineError, match="no inner values; build it with --taps"):
        session.forward(np.zeros((1, 1), np.int64), [1], session.new_state(1), taps=True)
    assert state.lengths.tolist() == [MAX_SEQ_LEN]


@pytest.mark.parametrize("max_positions", [1, 3, CHUNK])
def test_a_long_step_is_cut_to_the_engines_limits(max_positions: int, reference: PyTorchSession) -> None:
    session = Made(max_positions).session
    ids = np.random.default_rng(0).integers(0, 64, (3, 19))
    new = np.array([19, 0, 12])
    for positions in ("all", "last", np.array([[0, 17, 17, 18], [0, 0, 0, 0], [11, 4, 3, 15]])):
        ours, theirs = session.new_state(3), reference.new_state(3)
        found = session.forward(ids, new, ours, positions=positions).logits
        wanted = reference.forward(ids, new, theirs, positions=positions).logits
        assert np.abs(found - wanted).max() < LIMIT
        state = theirs.recurrent(6)
        assert np.abs(ours.recurrent(6) - state).max() < LIMIT / 4 * max(
            4, np.abs(state).max()
        )  # LIMIT is for values of 4


def test_an_idle_row_at_the_limit_may_stay_in_the_batch(made: Made, reference: PyTorchSession) -> None:
    ours, theirs = made.session.new_state(2), reference.new_state(2)
    prompts = [list(range(MAX_SEQ_LEN)), [3]]
    made.session.prefill(prompts, ours)
    reference.prefill(prompts, theirs)
    ids, new = np.array([[0], [4]]), np.array([0, 1])
    found, wanted = made.session.forward(ids, new, ours).logits, reference.forward(ids, new, theirs).logits
    assert np.abs(found - wanted).max() < LIMIT
