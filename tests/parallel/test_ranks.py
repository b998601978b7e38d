"""Engines of several ranks, run for real: processes under MPI, against the engine of one rank."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from engines_on_ranks import LIMIT, Workshop

from engines import load
from engines.config import EngineConfig
from engines.directory import read_config
from engines.errors import EngineError
from engines.parallel.session import ParallelSession
from model_defs.presets import preset

mpi4py = pytest.importorskip("mpi4py", reason="running several ranks needs mpi4py and an MPI launcher")

# As the requirement says: fp32, logits of scale 6, eight layers, sums in another order.
TOLERANCE = 2e-4
GREEDY_TOKENS = 200


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def pair(workshop: Workshop) -> Iterator[ParallelSession]:
    """Two ranks that share attention heads and experts."""
    with load(workshop.engine(2, 1, 2), threads=1) as session:  # type: ignore[attr-defined]
        yield session


def walk(session) -> tuple[list[np.ndarray], list[list[int]], object]:  # type: ignore[no-untyped-def]
    """Ragged chunked prefill, greedy decoding, then a ragged step with an idle row; all logits, the tokens, the state."""
    random = np.random.default_rng(0)
    state = session.new_state(3)
    prompts = [random.integers(0, session.vocab_size, length).tolist() for length in (37, 5, 60)]
    logits, tokens = [session.prefill(prompts, state, chunk=16)], []
    for _ in range(GREEDY_TOKENS):
        tokens.append(logits[-1].argmax(-1).tolist())
        logits.append(session.decode(tokens[-1], state))
    ids = random.integers(0, session.vocab_size, (3, 4))
    result = session.forward(ids, [4, 0, 2], state, positions="all", taps=True)
    return [*logits, result.logits, *result.taps.values()], tokens, state


@pytest.fixture(scope="module")
def expected(workshop: Workshop) -> tuple[list[np.ndarray], list[list[int]], object]:
    return walk(load(workshop.engine(1, 1, 1), threads=1))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1), (2, 1, 2), (4, 4, 1), (4, 1, 4), (4, 2, 2)])
def test_ranks_equal_one_rank(workshop: Workshop, expected, sizes: tuple[int, int, int]) -> None:  # type: ignore[no-untyped-def]
    with load(workshop.engine(*sizes), threads=1) as session:  # type: ignore[attr-defined]
        logits, tokens, state = walk(session)
        assert tokens == expected[1]
        assert max(np.abs(a - b).max() for a, b in zip(logits, expected[0], strict=True)) < TOLERANCE
        one = expected[2]
        assert np.array_equal(state.lengths, one.lengths)
        for layer in range(7):
            assert (
                np.abs(state.recurrent(layer) - one.recurrent(layer)).max()
                < TOLERANCE * np.abs(one.recurrent(layer)).max()
            )
        assert np.abs(state.key(7) - one.key(7)).max() < TOLERANCE
        assert np.abs(state.value(7) - one.value(7)).max() < TOLERANCE


@pytest.mark.slow
def test_ranks_of_small_equal_one_rank(tmp_path: Path) -> None:
    """One layer of each kind in the widths of `small`; `benchmarks/parallel_matrix.py` runs all of it in all mappings."""
    config = dataclasses.replace(preset("small"), layer_kinds=("lightning", "softmax"), slope_layers=2)
    shop = Workshop(tmp_path, config)
    one = load(shop.engine(1, 1, 1), threads=1)
    prompt = np.random.default_rng(0).integers(0, one.vocab_size, 200).tolist()
    with load(shop.engine(4, 2, 2), threads=1) as session:  # type: ignore[attr-defined]
        ours, theirs, pieces = session.new_state(1), one.new_state(1), session.new_state(1)
        expected = one.prefill([prompt], theirs)
        assert np.abs(session.prefill([prompt], ours) - expected).max() < TOLERANCE
        assert np.abs(session.prefill([prompt], pieces, chunk=64) - expected).max() < TOLERANCE
        for _ in range(20):
            token = expected.argmax(-1)
            expected = one.decode(token, theirs)
            assert np.abs(session.decode(token, ours) - expected).max() < TOLERANCE
        scale = np.abs(theirs.recurrent(0)).max()
        assert np.abs(ours.recurrent(0) - theirs.recurrent(0)).max() < TOLERANCE * scale
        assert np.abs(ours.key(1) - theirs.key(1)).max() < TOLERANCE


def test_a_vocabulary_that_does_not_divide(tmp_path: Path) -> None:
    config = dataclasses.replace(preset("tiny"), vocab_size=511, layer_kinds=("lightning",), slope_layers=1)
    odd = Workshop(tmp_path, config)
    one = load(odd.engine(1, 1, 1), threads=1)
    prompt = [[0, 255, 256, 510]]
    with load(odd.engine(2, 2, 1), threads=1) as session:  # type: ignore[attr-defined]
        assert session.vocab_size == 511
        ours, theirs = session.new_state(1), one.new_state(1)
        assert np.abs(session.prefill(prompt, ours) - one.prefill(prompt, theirs)).max() < TOLERANCE
        assert np.abs(session.decode([510], ours) - one.decode([510], theirs)).max() < TOLERANCE


def test_rows_move_between_engines(workshop: Workshop, pair: ParallelSession) -> None:
    one = load(workshop.engine(1, 1, 1), threads=1)
    ours, theirs = pair.new_state(2), one.new_state(2)
    pair.prefill([[5, 6, 7, 8], [9]], ours)
    snapshot = ours.read_row(0)
    assert snapshot.length == 4
    part = ours.read_row(0, 3)
    assert np.array_equal(part.value[7], snapshot.value[7][:, 3:])
    assert np.array_equal(part.recurrent[0], snapshot.recurrent[0])
    theirs.write_row(1, snapshot)
    pair.prefill([[], [1, 2]], ours)
    back = theirs.read_row(1)
    ours.clear_row(1)
    assert ours.lengths.tolist() == [4, 0]
    ours.write_row(1, back)
    tokens = [3, 3]
    logits = pair.decode(tokens, ours)
    assert np.array_equal(logits[0], logits[1])
    assert np.abs(one.decode([0, 3], theirs)[1] - logits[0]).max() < TOLERANCE


def test_the_configuration_tells_the_whole_model(workshop: Workshop, pair: ParallelSession) -> None:
    whole = read_config(workshop.engine(1, 1, 1))
    assert pair.config.states == whole.states
    assert pair.config.inputs == whole.inputs
    assert pair.config.outputs == whole.outputs
    assert pair.config.mapping == dataclasses.replace(whole.mapping, tp_size=2, moe_ep_size=2)
    assert [files.prefill_graph for files in pair.config.ranks] == ["rank0.prefill.onnx", "rank1.prefill.onnx"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, state: s.new_state(99), "max_batch_size"),
        (lambda s, state: s.decode([1, 512], state), "512 lies outside the vocabulary"),
        (lambda s, state: s.decode([1], state), "one token for each of the 2 rows"),
        (lambda s, state: s.decode([0.5, 1.0], state), "must be integers"),
        (lambda s, state: s.prefill([[1]], state), "1 prompts for a state of 2 rows"),
        (lambda s, state: s.prefill([[0.5], [1]], state), "must be integers"),
        (lambda s, state: s.prefill([[1] * (LIMIT + 1), []], state), "max_seq_len"),
        (lambda s, state: s.forward(np.zeros((2, 3), int), [4, 0], state), "new lengths"),
        (lambda s, state: state.key(0), "layer 0"),
        (lambda s, state: state.read_row(2), "row 2 does not exist"),
        (lambda s, state: state.read_row(0, 1), "cannot be read from token 1 on"),
    ],
)
def test_misuse_is_refused_and_the_ranks_live_on(pair: ParallelSession, call, words: str) -> None:  # type: ignore[no-untyped-def]
    state = pair.new_state(2)
    with pytest.raises(EngineError, match=words) as caught:
        call(pair, state)
    assert caught.value.exit_code == 2
    assert state.lengths.tolist() == [0, 0]
    assert np.isfinite(pair.decode([1, 2], state)).all()


def test_a_state_of_another_session_is_refused(workshop: Workshop, pair: ParallelSession) -> None:
    state = load(workshop.engine(1, 1, 1), threads=1).new_state(1)
    with pytest.raises(EngineError, match="another session"):
        pair.decode([1], state)


def rank_pids(session: ParallelSession) -> dict[int, int]:
    return dict(session._processes._pids)


def gone(pid: int, within: float = 120.0) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:  # no such file, or no such process any more
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_rank_killed_between_steps_ends_the_run(workshop: Workshop) -> None:
    session = load(workshop.engine(2, 1, 2), threads=1)
    state, pids = session.new_state(1), rank_pids(session)  # type: ignore[arg-type]
    session.prefill([[1, 2, 3]], state)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(EngineError, match="rank") as caught:
        session.decode([1], state)
    assert caught.value.exit_code == 3
    assert all(gone(pid) for pid in pids.values())
    with pytest.raises(EngineError, match="rank"):  # and it stays lost
        session.decode([1], state)


def test_a_rank_killed_at_rest_is_noticed(workshop: Workshop) -> None:
    session = load(workshop.engine(2, 1, 2), threads=1)
    state, pids = session.new_state(1), rank_pids(session)  # type: ignore[arg-type]
    session.check_alive()
    os.kill(pids[1], signal.SIGKILL)
    end = time.monotonic() + 120

    def wait() -> None:
        while time.monotonic() < end:
            session.check_alive()
            time.sleep(0.05)

    with pytest.raises(EngineError, match="rank") as caught:
        wait()
    assert caught.value.exit_code == 3
    with pytest.raises(EngineError, match="rank"):
        session.decode([1], state)


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_rank_killed_in_a_step_ends_the_run(workshop: Workshop, step: str) -> None:
    session = load(workshop.engine(2, 1, 2), threads=1)
    state, pids = session.new_state(1), rank_pids(session)  # type: ignore[arg-type]
    threading.Timer(0.5, os.kill, (pids[1], signal.SIGKILL)).start()

    def forever() -> None:
        while True:
            session.prefill([list(range(50)) if step == "prefill" else [1]], state)
            for token in range(100 if step == "decode" else 0):
                session.decode([token], state)
            state.clear_row(0)

    with pytest.raises(EngineError, match="rank") as caught:
        forever()
    assert caught.value.exit_code == 3
    assert all(gone(pid) for pid in pids.values())


def test_a_rank_that_hangs_ends_the_run_and_is_named(workshop: Workshop) -> None:
    session = load(workshop.engine(2, 1, 2), threads=1)
    state, pids = session.new_state(1), rank_pids(session)  # type: ignore[arg-type]
    processes = session._processes  # type: ignore[attr-defined]
    os.kill(pids[1], signal.SIGSTOP)
    before, done = processes._ticks.copy(), threading.Event()

    def lower_the_limit() -> None:
        """Once rank 0 waits for rank 1: before that, a busy machine may hold it up for as long."""
        while processes._ticks[0] == before[0] and not done.wait(0.05):
            pass
        processes._stall_limit = 3

    thread = threading.Thread(target=lower_the_limit)
    thread.start()
    with pytest.raises(EngineError, match="rank 1 hangs: no progress for 3 s") as caught:
        session.prefill([[1, 2, 3]], state)
    done.set()
    thread.join()
    assert caught.value.exit_code == 3
    assert all(gone(pid) for pid in pids.values())


def fake_launcher(folder: Path, body: str) -> list[str]:
    script = folder / "launcher.py"
    script.write_text(body)
    return [sys.executable, str(script)]


def test_ranks_that_never_start(workshop: Workshop, tmp_path: Path) -> None:
    launcher = fake_launcher(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(EngineError, match="rank 0 did not start within 1 s") as caught:
        load(workshop.engine(2, 1, 2), start_limit=1, launcher=launcher)
    assert caught.value.exit_code == 3


def test_a_launcher_that_fails_is_quoted(workshop: Workshop, tmp_path: Path) -> None:
    launcher = fake_launcher(tmp_path, "raise SystemExit('error: no slots on this machine')")
    with pytest.raises(EngineError, match="ended before it was ready; last words: error: no slots"):
        load(workshop.engine(2, 1, 2), launcher=launcher)


def test_a_missing_launcher_is_an_environment_problem(workshop: Workshop) -> None:
    with pytest.raises(EngineError, match="cannot be started") as caught:
        load(workshop.engine(2, 1, 2), launcher=["/nowhere/mpirun"])
    assert caught.value.exit_code == 3


def test_too_few_ranks_are_noticed(workshop: Workshop, tmp_path: Path) -> None:
    body = "import os, sys; os.environ['PMI_RANK'] = '0'; os.execv(sys.argv[3], sys.argv[3:])"
    with pytest.raises(EngineError, match=r"rank 1 did not start within|the launcher says rank 0 of 1"):
        load(workshop.engine(2, 1, 2), start_limit=30, launcher=fake_launcher(tmp_path, body))


def copy_engine(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_file_of_another_build_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    mixed = copy_engine(workshop.engine(2, 1, 2), tmp_path / "mixed")
    other = workshop.engine(2, 2, 1)
    (mixed / "rank1.pieces").write_bytes((other / "rank1.pieces").read_bytes())
    with pytest.raises(EngineError, match=r"rank1.pieces"):  # its digest
        load(mixed)
    # Even when the list of files was made to agree.
    config, theirs = json.loads((mixed / "config.json").read_text()), json.loads((other / "config.json").read_text())
    config["files"]["rank1.pieces"] = theirs["files"]["rank1.pieces"]
    (mixed / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"rank 1 .*belongs to rank 1 of 2 of another build") as caught:
        load(mixed)
    assert caught.value.exit_code == 2


def test_an_engine_without_all_ranks_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    partial = copy_engine(workshop.engine(2, 1, 2), tmp_path / "partial")
    config = EngineConfig.from_json((partial / "config.json").read_text(), "config.json")
    (partial / "config.json").write_text(dataclasses.replace(config, ranks=config.ranks[:1]).to_json())
    with pytest.raises(EngineError, match="files of all 2 ranks"):
        load(partial)


def test_ctrl_c_leaves_the_session_usable(workshop: Workshop, pair: ParallelSession) -> None:
    state = pair.new_state(1)

    def forever() -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            pair.prefill([list(range(50))], state)
            state.clear_row(0)

    with pytest.raises(KeyboardInterrupt):
        forever()
    state.clear_row(0)
    fresh = pair.new_state(1)
    assert np.array_equal(pair.prefill([[1, 2]], state), pair.prefill([[1, 2]], fresh))


def test_closing_ends_the_ranks(workshop: Workshop) -> None:
    session = load(workshop.engine(2, 1, 2), threads=1)
    pids = rank_pids(session)  # type: ignore[arg-type]
    session.close()  # type: ignore[attr-defined]
    assert all(gone(pid) for pid in pids.values())
    with pytest.raises(EngineError, match="closed"):
        session.new_state(1)


def test_a_session_whose_process_is_killed_leaves_no_ranks(workshop: Workshop) -> None:
    code = (
        f"from engines import load; s = load({str(workshop.engine(2, 1, 2))!r}, threads=1); "
        "print(s._processes._folder, *s._processes._pids.values(), flush=True); import time; time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder, *rest = process.stdout.readline().split()
    pids = [int(text) for text in rest]
    assert Path(folder).is_dir()
    assert len(pids) == 2
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in pids)
    assert not Path(folder).exists()


def test_without_mpi_the_error_says_what_to_install(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'mxcompile\[mpi\]'") as caught:
        load(workshop.engine(2, 1, 2))
    assert caught.value.exit_code == 3
