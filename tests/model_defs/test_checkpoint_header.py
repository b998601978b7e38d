"""The safetensors header is read as the library reads it, and nothing that breaks the format gets through or crashes."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import raw_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_defs.checkpoint.safetensors_header import DTYPES, read_header
from model_defs.errors import CheckpointError

untimed = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=200
)


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_reads_what_the_library_writes(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.standard_normal((3, 4)).astype(np.float32),
        "f16": rng.standard_normal((5,)).astype(np.float16),
        "scalar": np.array(3.5, np.float64),
        "empty": np.empty((0, 7), np.float32),
        "bools": np.array([True, False, True]),
        "i8": np.arange(-3, 4, dtype=np.int8),
        "bf16": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
    }
    save_file(arrays, tmp_path / "a.safetensors", metadata={"note": "ä"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"note": "ä"}
    assert header.file_bytes == header.declared_bytes
    content = (tmp_path / "a.safetensors").read_bytes()
    assert set(header.entries) == set(arrays)
    for name, expected in arrays.items():
        entry = header.entries[name]
        assert entry.file.is_absolute()
        assert entry.shape == expected.shape
        found = np.frombuffer(content[entry.offset : entry.offset + entry.nbytes], DTYPES[entry.dtype])
        np.testing.assert_array_equal(found.reshape(entry.shape), expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (b"\x01\x00\x00", "too short"),
        ((1 << 62).to_bytes(8, "little"), "not a safetensors file"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((50).to_bytes(8, "little") + b"{}", "truncated inside its header"),
        (raw_header(b""), "begin with"),
        (raw_header(b"[]"), "begin with"),
        (raw_header(b" {}"), "begin with"),
        (raw_header(b"{"), "not JSON"),
        (raw_header(b'{"\xff": 1}'), "UTF-8"),
        (raw_header(b'{"a": ' * 50_000), "nested too deeply|not JSON"),
        (raw_header(b'{"a": ' + b"9" * 5000 + b"}"), "damaged"),
        (raw_header(b'{"a": NaN}'), "NaN"),
        (raw_header({"__metadata__": {"a": 1}}), "__metadata__"),
        (raw_header({"__metadata__": []}), "__metadata__"),
        (raw_header({"a": 3}), "dtype, shape and data_offsets"),
        (raw_header({"a": {"dtype": "F32", "shape": [2]}}), "dtype, shape and data_offsets"),
        (raw_header({"a": tensor() | {"extra": 1}}, bytes(8)), "dtype, shape and data_offsets"),
        (raw_header({"a": tensor("F31")}, bytes(8)), "unknown dtype"),
        (raw_header({"a": tensor("F4")}, bytes(8)), "unknown dtype"),
        (raw_header({"a": tensor(shape=2)}, bytes(8)), "shape"),
        (raw_header({"a": tensor(shape=[-2])}, bytes(8)), "shape"),
        (raw_header({"a": tensor(shape=[True, 2])}, bytes(8)), "shape"),
        (raw_header({"a": tensor(shape=[2.0])}, bytes(8)), "shape"),
        (raw_header({"a": tensor(shape=[1] * 65 + [2])}, bytes(8)), "shape"),
        (raw_header({"a": tensor(shape=[2**62, 4])}, bytes(8)), "needs"),  # 2**66 bytes: wraps to 0 in 64 bits
        (raw_header({"a": tensor(shape=[2**64])}, bytes(8)), "shape"),
        (raw_header({"a": tensor(offsets=[0])}, bytes(8)), "data_offsets"),
        (raw_header({"a": tensor(offsets=[8, 0])}, bytes(8)), "needs"),
        (raw_header({"a": tensor(offsets=[-8, 0])}, bytes(8)), "data_offsets"),
        (raw_header({"a": tensor(offsets=[0, 12])}, bytes(12)), "needs"),
        (raw_header({"a": tensor(offsets=[4, 12])}, bytes(12)), "gap"),
        (raw_header({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)), "overlaps"),
        (raw_header({"a": tensor(), "b": tensor()}, bytes(8)), "overlaps"),
        (raw_header({"a": tensor(), "b": tensor(offsets=[12, 20])}, bytes(20)), "gap"),
        (raw_header({"a": tensor()}, bytes(9)), "belong to no tensor"),
        (raw_header({}, b"x"), "belong to no tensor"),
    ],
)
def test_what_breaks_the_format_is_refused(tmp_path, data: bytes, message: str):
    path = write(tmp_path / "x.safetensors", data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_repeated_names_are_refused(tmp_path):
    one = json.dumps(tensor())
    path = write(tmp_path / "x.safetensors", raw_header(f'{{"a": {one}, "a": {one}}}'.encode(), bytes(8)))
    with pytest.raises(CheckpointError, match="'a' twice"):
        read_header(path)


def test_a_cut_file_is_told_by_its_sizes(tmp_path):
    path = write(tmp_path / "x.safetensors", raw_header({"a": tensor()}, bytes(5)))
    header = read_header(path)
    assert header.declared_bytes - header.file_bytes == 3


def test_only_regular_files_are_opened(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="regular file"):
        read_header(tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening one would wait for ever
    with pytest.raises(CheckpointError, match="regular file"):
        read_header(tmp_path / "pipe.safetensors")


VALID = raw_header(
    {
        "__metadata__": {"format": "pt"},
        "a": tensor(shape=[2], offsets=[0, 8]),
        "b": tensor("BF16", [2, 3], [8, 20]),
        "c": tensor("U8", [], [20, 21]),
    },
    bytes(range(21)),
)


@untimed
@given(st.data())
def test_corruption_is_refused_or_harmless(tmp_path, data: st.DataObject):
    """Bytes overwritten, cut, inserted: either the header still makes sense, or there is a CheckpointError; never
    anything else.
    """
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        action = data.draw(st.sampled_from(["overwrite", "cut", "insert", "delete"]))
        pieces = [b"{", b"}", b"[", b'"', b",", b"9999999999", b"null", b"-"]
        piece = data.draw(st.binary(max_size=6) | st.sampled_from(pieces))
        if action == "overwrite":
            content[at : at + len(piece)] = piece
        elif action == "cut":
            del content[at:]
        elif action == "insert":
            content[at:at] = piece
        else:
            del content[at : at + len(piece)]
    path = write(tmp_path / "x.safetensors", bytes(content))
    try:
        header = read_header(path)
    except CheckpointError:
        return
    # What is accepted is consistent: the tensors fill the declared space exactly, one behind the other.
    position = len(header.raw)
    for entry in sorted(header.entries.values(), key=lambda e: (e.offset, e.nbytes)):
        assert entry.offset == position
        assert entry.nbytes == int(np.prod(entry.shape, dtype=object)) * DTYPES[entry.dtype].itemsize
        position += entry.nbytes
    assert position == header.declared_bytes >= header.file_bytes


@untimed
@given(
    st.dictionaries(
        st.text("abc_", max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "BF16", "X"]),
                "shape": st.lists(st.integers(-1, 4) | st.just(2**62), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 40) | st.just(2**63), min_size=1, max_size=3),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 64),
)
def test_the_library_accepts_what_is_accepted(tmp_path, header: dict, size: int):
    """The library is the second judge: a file that this reader takes whole, the library takes too."""
    from safetensors import safe_open

    path = write(tmp_path / "x.safetensors", raw_header(header, bytes(size)))
    try:
        found = read_header(path)
    except CheckpointError:
        return
    if found.file_bytes == found.declared_bytes:
        with safe_open(path, "np") as file:
            assert set(file.keys()) == set(found.entries)
