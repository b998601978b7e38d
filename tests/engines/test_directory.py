"""Engine directories: complete or absent, and checked when read."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import digest
from engines.config import EngineConfig, Limits, Port, RankFiles, StateTensor
from engines.directory import EngineDirWriter, read_config, verify_files
from engines.errors import EngineError


def a_config() -> EngineConfig:
    return EngineConfig(
        mxcompile_version="1",
        target="onnxruntime",
        model={"anything": [1, {"deep": None}]},
        dtype="float32",
        limits=Limits(2, 100, 10),
        inputs=[Port("input_ids", "int64", ["batch", "tokens"]), Port("past", "float32", ["batch", 2, 3, 3])],
        outputs=[Port("logits", "float32", ["batch", "positions", 7]), Port("present", "float32", ["batch", 2, 3, 3])],
        states=[StateTensor(0, "lightning", "recurrent_state", "past", "present", "float32", ["batch", 2, 3, 3])],
        ranks=[RankFiles(0, "rank0.onnx", None)],
    )


def write(path: Path, force: bool = False, graph: bytes = b"graph") -> None:
    with EngineDirWriter(path, force=force) as writer:
        writer.write("rank0.onnx", graph)
        writer.write("tokenizer/vocab.json", "{}")
        writer.commit(a_config())


def write_and_raise(path: Path, error: type[BaseException]) -> None:
    with EngineDirWriter(path, force=True) as writer:
        writer.write("rank0.onnx", b"new")
        raise error


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "engine")
    config = read_config(tmp_path / "engine")
    verify_files(tmp_path / "engine", config, whole=True)
    assert config.files.keys() == {"rank0.onnx", "tokenizer/vocab.json"}
    assert config.vocab_size == 7
    assert config.layers("lightning") == [0]
    assert EngineConfig.from_json(config.to_json(), "x") == config
    assert leftovers(tmp_path) == ["engine"]


def set_state_dims(raw: dict, dims: list) -> None:
    """Of the state, and of the graph's input and output that it is."""
    for port in (raw["states"][0], raw["inputs"][1], raw["outputs"][1]):
        port["dims"] = dims


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(schema_version=99), "schema version 99"),
        (lambda raw: raw.pop("schema_version"), "no schema_version"),
        (lambda raw: raw.update(surprise=1), "unknown key 'surprise'"),
        (lambda raw: raw.pop("limits"), "missing key 'limits'"),
        (lambda raw: raw["limits"].pop("max_seq_len"), "missing key 'limits.max_seq_len'"),
        (lambda raw: raw["limits"].update(max_seq_len="100"), "'limits.max_seq_len' has an unexpected value '100'"),
        (lambda raw: raw["limits"].update(max_seq_len=True), "unexpected value 'True'"),
        (lambda raw: raw["states"][0].update(kind="other"), "'states.0.kind' has an unexpected value 'other'"),
        (lambda raw: raw["states"][0].update(dtype=""), "'states.0.dtype' has an unexpected value ''"),
        (lambda raw: raw["states"][0].update(dims=[]), "'states.0.dims' has 0 dimensions"),
        (
            lambda raw: raw["states"][0].update(dims=["batch", 2, 4, 3]),
            "'states.0' is not what the graph's past 'past' is",
        ),
        (lambda raw: raw["states"][0].update(dims=["batch", 2, 3, 4]), "'states.0' is not what"),
        (lambda raw: raw["states"][0].update(dtype="int8"), "'states.0' is not what"),
        (lambda raw: raw["states"][0].update(past="other"), "'states.0' is not what"),
        (lambda raw: raw["states"][0].update(present="past"), "'states.0' is not what the graph's present 'past' is"),
        (lambda raw: raw["states"][0].update(dims=["batch", 2, 3, "x"]), "'states.0.dims' has an unexpected value"),
        (lambda raw: raw["states"][0].update(role="key"), "'states.0.dims' has an unexpected value"),
        (lambda raw: set_state_dims(raw, ["batch", 2, 3, "capacity"]), "'states.0.dims' has an unexpected value"),
        (lambda raw: set_state_dims(raw, ["batch", 2, -1, 3]), "'states.0.dims' has an unexpected value"),
        (lambda raw: set_state_dims(raw, ["batch", 2, 10**9, 3]), "'states.0.dims' has an unexpected value"),
        (lambda raw: set_state_dims(raw, [2, "batch", 3, 3]), "'states.0.dims' has an unexpected value"),
        (lambda raw: set_state_dims(raw, ["batch", "batch", 3, 3]), "'states.0.dims' has an unexpected value"),
        (lambda raw: raw["outputs"][0].update(dims=[]), "'outputs.0.dims' has 0 dimensions"),
        (lambda raw: raw["mapping"].update(tp_size=10**30), "'mapping.tp_size' has an unexpected value 1000"),
        (lambda raw: raw["mapping"].update(cp_size=0), "'mapping.cp_size' has an unexpected value 0"),
        (lambda raw: raw.update(states={}), "'states' has an unexpected value"),
        (lambda raw: raw["files"]["rank0.onnx"].update(size=None), "unexpected value 'None'"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(tmp_path: Path, edit: Callable, message: str) -> None:
    write(tmp_path / "engine")
    file = tmp_path / "engine" / "config.json"
    raw = json.loads(file.read_text())
    edit(raw)
    file.write_text(json.dumps(raw))
    with pytest.raises(EngineError, match=message) as caught:
        read_config(tmp_path / "engine")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "nonsense \x00", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(EngineError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_that_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such engine directory"):
        read_config(tmp_path / "absent")
    with pytest.raises(EngineError, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: (e / "rank0.onnx").unlink(), "rank0.onnx: missing"),
        (lambda e: (e / "rank0.onnx").write_bytes(b"grap"), "rank0.onnx: 4 bytes, the engine expects 5"),
        (lambda e: (e / "rank0.onnx").write_bytes(b"groph"), "rank0.onnx: content differs"),
        (lambda e: (e / "extra.bin").write_bytes(b""), "extra.bin: not part of the engine"),
        (lambda e: (e / "tokenizer" / "vocab.json").write_text("[]"), "vocab.json: content differs"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "engine")
    config = read_config(tmp_path / "engine")
    damage(tmp_path / "engine")
    with pytest.raises(EngineError, match=message):
        verify_files(tmp_path / "engine", config)


def test_reports_may_be_added_later(tmp_path: Path) -> None:
    write(tmp_path / "engine")
    (tmp_path / "engine" / "report").mkdir()
    (tmp_path / "engine" / "report" / "index.html").write_text("x")
    verify_files(tmp_path / "engine", read_config(tmp_path / "engine"))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_names_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path / "engine")
    file = tmp_path / "engine" / "config.json"
    raw = json.loads(file.read_text())
    raw["files"][name] = raw["files"]["rank0.onnx"]
    file.write_text(json.dumps(raw))
    with pytest.raises(EngineError, match="not a name inside"):
        verify_files(tmp_path / "engine", read_config(tmp_path / "engine"))


def test_big_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "WHOLE_LIMIT", 1000)
    size = digest.BLOCK * digest.BLOCKS * 2
    write(tmp_path / "engine", graph=bytes(size))
    config = read_config(tmp_path / "engine")
    file = tmp_path / "engine" / "rank0.onnx"
    assert digest.sampled(file) != digest.sha256(file)

    def change(offset: int) -> None:
        with file.open("r+b") as out:
            out.seek(offset)
            out.write(b"x")

    change(digest.BLOCK + 1)  # between two samples: only the whole digest sees it
    verify_files(tmp_path / "engine", config)
    with pytest.raises(EngineError, match="content differs"):
        verify_files(tmp_path / "engine", config, whole=True)
    change(size - 1)
    with pytest.raises(EngineError, match="content differs"):
        verify_files(tmp_path / "engine", config)


def test_an_error_or_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write_and_raise(tmp_path / "engine", error)
    assert leftovers(tmp_path) == []


def test_a_block_left_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with EngineDirWriter(tmp_path / "engine") as writer:
        writer.write("rank0.onnx", b"graph")
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match=r"engine.*no space left on the disk") as caught:
        write(tmp_path / "engine")
    assert caught.value.exit_code == 3
    assert leftovers(tmp_path) == []


def test_an_existing_engine_is_replaced_only_when_forced(tmp_path: Path) -> None:
    write(tmp_path / "engine")
    with pytest.raises(EngineError, match="--force"):
        write(tmp_path / "engine", graph=b"new")
    assert (tmp_path / "engine" / "rank0.onnx").read_bytes() == b"graph"
    with pytest.raises(RuntimeError):
        write_and_raise(tmp_path / "engine", RuntimeError)
    assert (tmp_path / "engine" / "rank0.onnx").read_bytes() == b"graph"  # a failed rebuild keeps the old one
    write(tmp_path / "engine", force=True, graph=b"new")
    assert (tmp_path / "engine" / "rank0.onnx").read_bytes() == b"new"
    assert leftovers(tmp_path) == ["engine"]


def test_other_people_s_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        with pytest.raises(EngineError, match="not an engine directory"):
            write(tmp_path / name, force=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")


def test_an_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EngineError, match="creating") as caught:
        write(tmp_path / "file" / "engine")
    assert caught.value.exit_code == 3


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom engines.directory import EngineDirWriter\n"
        f"with EngineDirWriter({str(tmp_path / 'engine')!r}) as writer:\n"
        "    writer.write('rank0.onnx', b'graph')\n    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    for how, remains in ((signal.SIGINT, False), (signal.SIGKILL, True)):
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(how)
            process.wait(timeout=300)
        assert not (tmp_path / "engine").exists()
        assert bool(leftovers(tmp_path)) == remains
    write(tmp_path / "engine")  # the next build clears up after the killed one
    assert leftovers(tmp_path) == ["engine"]


def test_two_builds_of_one_engine_do_not_disturb_each_other(tmp_path: Path) -> None:
    with EngineDirWriter(tmp_path / "engine") as first:
        first.write("rank0.onnx", b"first")
        write(tmp_path / "engine", graph=b"second")
        with pytest.raises(EngineError, match="--force"):
            first.commit(a_config())
    assert (tmp_path / "engine" / "rank0.onnx").read_bytes() == b"second"
    assert leftovers(tmp_path) == ["engine"]
