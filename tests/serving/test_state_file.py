"""State files: whole, of this engine and this session, or not read at all."""

from __future__ import annotations

import resource

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import ask, run
from toy_session import ToySession

from engines.interface import RowSnapshot
from mxcompile.errors import MxcompileError
from mxcompile.serving.cache import MemoryBudget, SessionStore
from mxcompile.serving.requests import Finished, RequestError
from mxcompile.serving.scheduler import Scheduler
from mxcompile.serving.state_file import StateFileError, encode_state, read_state, state_bytes, write_state
from mxcompile.serving.state_folder import StateFolder


def snapshot(dtype=np.float32):
    random = np.random.default_rng(0)

    def array(*shape, kind=np.float32):
        return random.normal(size=shape).astype(kind)

    return RowSnapshot(5, {0: array(2, 3, 4)}, {1: array(1, 5, 3, kind=dtype)}, {1: array(1, 5, 3, kind=dtype)})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read(tmp_path, dtype):
    written = snapshot(dtype)
    write_state(tmp_path / "a", "engine", "name", written, [4, 2])
    read, unfed = read_state(tmp_path / "a", "engine", "name")
    assert (read.length, unfed) == (5, [4, 2])
    for part in ("recurrent", "key", "value"):
        for layer, array in getattr(written, part).items():
            found = getattr(read, part)[layer]
            assert found.dtype == array.dtype
            assert found.tobytes() == array.tobytes()
    assert (tmp_path / "a").stat().st_mode & 0o077 == 0, "a conversation is its owner's"


def test_another_engine_or_session_is_refused(tmp_path):
    write_state(tmp_path / "a", "engine", "name", snapshot(), [])
    with pytest.raises(StateFileError, match="another engine"):
        read_state(tmp_path / "a", "other", "name")
    with pytest.raises(StateFileError, match="another session"):
        read_state(tmp_path / "a", "engine", "other")


def test_every_damaged_byte_is_found(tmp_path):
    write_state(tmp_path / "a", "engine", "name", snapshot(), [1])
    data = (tmp_path / "a").read_bytes()
    for position in [*range(0, len(data), 37), len(data) - 1]:
        (tmp_path / "a").write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(StateFileError):
            read_state(tmp_path / "a", "engine", "name")
    for length in (0, 7, 20, len(data) - 1):
        (tmp_path / "a").write_bytes(data[:length])
        with pytest.raises(StateFileError):
            read_state(tmp_path / "a", "engine", "name")


def test_sessions_survive_a_restart_of_the_same_engine_only(tmp_path, caplog):
    store = SessionStore(MemoryBudget(10**6), "engine", tmp_path)
    store.save("talk", snapshot(), [7])
    assert store.flush() == 1
    store.close()
    store = SessionStore(MemoryBudget(10**6), "engine", tmp_path)
    again = store.load("talk")
    assert again is not None
    assert (again.length, again.unfed) == (5, (7,))
    store.close()
    store = SessionStore(MemoryBudget(10**6), "another engine", tmp_path)
    assert store.load("talk") is None
    assert "was written by another engine" in caplog.text
    store.close()
    assert sorted(file.suffix for file in tmp_path.iterdir()) == ["", ".state"], "the lock and the session"


def test_a_folder_is_one_servers(tmp_path):
    first = StateFolder(tmp_path, "engine")
    with pytest.raises(MxcompileError, match="another server keeps its states there"):
        StateFolder(tmp_path, "engine")
    first.close()
    StateFolder(tmp_path, "engine").close()


NAMES = st.sampled_from("abcdef")
SIZES = st.integers(1, 40)  # tokens


def of_tokens(count):
    return RowSnapshot(count, {0: np.ones((1, 2, 2), np.float32)}, {1: np.ones((1, count, 4), np.float32)}, {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.none() | SIZES), max_size=30), st.integers(1000, 4000))
def test_files_stay_within_the_limit_and_the_longest_unused_leave(tmp_path_factory, actions, limit):
    """Against a model: a dictionary in order of last use. None reads, a number writes."""
    path = tmp_path_factory.mktemp("states")
    folder = StateFolder(path, "engine", limit)
    model: dict[str, tuple[int, int]] = {}  # name -> tokens, bytes
    for name, tokens in actions:
        if tokens is None:
            read = folder.read(name)
            assert (read[0].length if read else None) == (model[name][0] if name in model else None)
            if name in model:
                model[name] = model.pop(name)
        else:
            size = state_bytes(encode_state("engine", name, of_tokens(tokens), []))
            model.pop(name, None) if size <= limit else None
            while size <= limit and sum(b for _, b in model.values()) + size > limit:
                model.pop(next(iter(model)))
            assert folder.write(name, of_tokens(tokens), []) == (size <= limit)
            if size <= limit:
                model[name] = (tokens, size)
        assert folder.nbytes == sum(b for _, b in model.values()) <= limit
    folder.close()
    smaller = StateFolder(path, "engine", limit // 2)
    assert smaller.nbytes <= limit // 2, "a limit holds for what an earlier server left"
    smaller.close()


def test_what_a_killed_server_left_half_written_is_removed_and_never_read(tmp_path):
    folder = StateFolder(tmp_path, "engine")
    folder.write("talk", snapshot(), [1])
    whole = folder._file("talk").read_bytes()
    folder.close()
    (tmp_path / ".partial-abc").write_bytes(whole)
    folder = StateFolder(tmp_path, "engine")
    assert not list(tmp_path.glob(".partial-*"))
    assert folder.read("talk") is not None
    folder._file("talk").write_bytes(whole[: len(whole) // 2])
    assert folder.read("talk") is None
    assert folder.counts["refused"] == 1
    folder.close()


def test_a_full_disk_is_logged_and_serving_goes_on(tmp_path, caplog):
    """Writes fail for real, in the middle of a file: the process may write files of 100 bytes only."""
    scheduler = Scheduler(ToySession(), sessions=SessionStore(MemoryBudget(60), "engine", tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        for name in ("one", "two"):  # each is larger than half of the memory
            client, _ = ask(scheduler, [1, 2, 3], session=name, session_start=True)
            run(scheduler)
            assert isinstance(client.end, Finished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert '"event": "state_not_written", "session": "one"' in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == [".lock"], "nothing half-written is left"
    with pytest.raises(RequestError, match="session 'one' is not known"):
        ask(scheduler, [4], session="one")
    client, _ = ask(scheduler, [4], session="two")
    run(scheduler)
    assert isinstance(client.end, Finished)
