"""State files: whole, of this engine and this session, or not read at all."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from engines.interface import RowSnapshot
from mxcompile.serving.cache import MemoryBudget, SessionStore
from mxcompile.serving.state_file import StateFileError, read_state, write_state


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


def test_sessions_survive_a_restart_of_the_same_engine_only(tmp_path):
    store = SessionStore(MemoryBudget(10**6), "engine", tmp_path)
    store.save("talk", snapshot(), [7])
    assert store.flush() == 1
    again = SessionStore(MemoryBudget(10**6), "engine", tmp_path).load("talk")
    assert again is not None
    assert (again.length, again.unfed) == (5, (7,))
    assert SessionStore(MemoryBudget(10**6), "another engine", tmp_path).load("talk") is None
    assert [file.suffix for file in tmp_path.iterdir()] == [".state"]
