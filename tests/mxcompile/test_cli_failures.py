"""Bad input and bad luck: exit codes, one line of error, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from cli_process import environment

from engines.directory import os_errors
from engines.errors import EngineError
from mxcompile.cli.main import main


def refused(done, code, *words):
    """One line of error with these words, and the exit code."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_a_prompt_longer_than_the_capacity(mxcompile, tiny_engine):
    tokens = ",".join(["1"] * 97)
    refused(mxcompile("run", tiny_engine, "--tokens", tokens), 2, "has 97 tokens", "at most 96", "--max-seq-len")


def test_a_token_outside_the_vocabulary(mxcompile, tiny_engine):
    refused(mxcompile("run", tiny_engine, "--tokens", "1,512"), 2, "token 512", "0 to 511")


def test_an_empty_prompt(mxcompile, tiny_engine):
    refused(mxcompile("run", tiny_engine, "--prompt", ""), 2, "is empty")


@pytest.mark.parametrize("layers", [0, -1, 9])
def test_layers_out_of_range(mxcompile, tiny_checkpoint, tmp_path, layers):
    done = mxcompile("build", tiny_checkpoint, "-o", tmp_path / "e", "--layers", layers)
    refused(done, 2, "--layers must be between 1 and 8", str(layers))
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_the_model_has_positions(mxcompile, tiny_checkpoint, tmp_path):
    done = mxcompile("build", tiny_checkpoint, "-o", tmp_path / "e", "--max-seq-len", 65537)
    refused(done, 2, "65537", "65536 positions")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_something_else(mxcompile, tiny_checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    refused(mxcompile("build", tiny_checkpoint, "-o", tmp_path / "mine", "--force"), 2, "is not an engine directory")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', "model_type"),
    ],
)
def test_a_checkpoint_of_another_architecture(mxcompile, tiny_checkpoint, tmp_path, name, content, words):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "c")
    (broken / name).write_bytes(content)
    for command in (["build", broken, "-o", tmp_path / "e"], ["inspect", broken], ["checkpoint", "verify", broken]):
        done = mxcompile(*command)
        refused(done, 2, "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.onnx", b"\xff\xff\xff not a graph", "is not an ONNX file"),
        ("x.txt", b"", "is neither a folder nor an .onnx file"),
        ("absent", None, "does not exist"),
    ],
)
def test_inspecting_something_else(mxcompile, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(mxcompile("inspect", tmp_path / name), 2, words)


def tamper_with_graph(folder):
    data = bytearray((folder / "rank0.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "rank0.onnx").write_bytes(data)


def tamper_with_weights(folder):
    with (folder / "rank0.weights.bin").open("r+b") as file:
        file.seek(100_000)
        file.write(b"\xff\xff")


def tamper_with_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def tamper_by_adding(folder):
    (folder / "extra.bin").write_bytes(b"x")


def tamper_by_removing(folder):
    (folder / "rank0.weights.bin").unlink()


def tamper_with_paths(folder):
    config = json.loads((folder / "config.json").read_text())
    config["ranks"][0]["graph"] = "../../other.onnx"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (tamper_with_graph, "rank0.onnx: content differs"),
        (tamper_with_weights, "rank0.weights.bin: content differs"),
        (tamper_with_tokenizer, "tokenizer.json"),
        (tamper_by_adding, "extra.bin: not part of the engine"),
        (tamper_by_removing, "rank0.weights.bin: missing"),
        (tamper_with_paths, "../../other.onnx"),
    ],
)
def test_an_engine_directory_that_was_tampered_with(mxcompile, tiny_engine, tmp_path, tamper, words):
    folder = shutil.copytree(tiny_engine, tmp_path / "e")
    tamper(folder)
    refused(mxcompile("run", folder, "--tokens", "1"), 2, words)
    refused(mxcompile("inspect", folder), 2, words)


class FullDisk:
    """Lets so many bytes through to the engine's files, then behaves as a full disk does."""

    def __init__(self, monkeypatch, room):
        from engines.directory import HashingFile

        self.left = room
        real = HashingFile.write

        def write(file, data):
            self.left -= memoryview(data).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(file, data)

        monkeypatch.setattr(HashingFile, "write", write)


@pytest.mark.parametrize("room", [0, 3_000_000, 17_400_000 // 8])
def test_a_disk_that_fills_up_during_the_build(tiny_checkpoint, tmp_path, monkeypatch, capsys, room):
    """At the first byte, within the weights; and an engine that was there before stays whole."""
    arguments = ["build", str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--layers", "2", "--force"]
    FullDisk(monkeypatch, room)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no space left on the disk" in error
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_files_that_an_export_meets(tiny_checkpoint, tmp_path, capsys):
    """A real one, within the derived weights; the reason is the system's, not that of a library between."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main(["export", str(tiny_checkpoint), "-o", str(tmp_path / "x.onnx"), "--layers", "1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 3
    assert "larger than this file system or a limit (ulimit -f) allows" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_copied_folder_that_does_not_fit():
    """`shutil.copytree` goes on after an error and raises all of them as one list."""
    said = [("a", "b", f"[Errno {errno.ENOSPC}] No space left on device: 'a' -> 'b'"), ("c", "d", "odd")]
    for listed, words in ((said, "writing x: no space left on the disk"), (said[1:], "writing x: odd")):
        with pytest.raises(EngineError, match=words) as caught, os_errors("writing x"):
            raise shutil.Error(listed)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("option", [["validate", "e", "--against", "c", "--json"], ["report", "e", "--markdown"]])
def test_where_a_result_cannot_be_written_is_told_before_it_is_measured(mxcompile, tmp_path, option):
    (tmp_path / "file").touch()
    for place, words in (("file/x", "nothing can be written to"), (".", "is a folder; name a file")):
        refused(mxcompile(*option, place, cwd=tmp_path), 2, words)


def test_a_failed_rebuild_keeps_the_engine_that_was_there(tiny_checkpoint, tiny_engine, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny_engine, tmp_path / "e")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    FullDisk(monkeypatch, 1_000_000)
    with pytest.raises(SystemExit) as ended:
        main(["build", str(tiny_checkpoint), "-o", str(folder), "--force", "--layers", "2"])
    assert ended.value.code == 3
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_rebuild_that_fails_its_verification_keeps_the_engine_that_was_there(
    mxcompile, tiny_checkpoint, tiny_engine, tmp_path
):
    """A checkpoint that went bad: everything is written, and the finished engine computes what is not finite."""
    folder, bad = shutil.copytree(tiny_engine, tmp_path / "e"), shutil.copytree(tiny_checkpoint, tmp_path / "bad")
    for file in bad.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[:8], "little")
        place = json.loads(data[8 : 8 + length]).get("model.norm.weight", {}).get("data_offsets")
        if place is not None:
            start, end = (8 + length + offset for offset in place)
            data[start:end] = b"\xff" * (end - start)
            file.write_bytes(data)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refused(mxcompile("build", bad, "-o", folder, "--force", "--layers", "1"), 1, "not finite")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "e"]


@pytest.mark.machine
def test_a_file_system_without_room(tiny_checkpoint, tmp_path):
    """A real one of 6 MB, where namespaces may be made."""
    room = tmp_path / "room"
    room.mkdir()
    script = (
        f"mount -t tmpfs -o size=6m tmpfs {room} || exit 77; "
        f"{sys.executable} -m mxcompile build {tiny_checkpoint} -o {room}/e --layers 4; code=$?; ls -A {room}; exit $code"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    if done.returncode in (1, 77) and "error:" not in done.stderr:
        pytest.skip(f"no small file system may be mounted here: {done.stderr.strip()}")
    refused(done, 3, "free some")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "")]
)
@pytest.mark.parametrize("stage", ["read", "trace"])
def test_an_interrupted_build_leaves_nothing(tiny_checkpoint, tmp_path, number, code, words, stage):
    """A real signal to a real process, within tracing and within what follows it."""
    command = [sys.executable, "-m", "mxcompile", "build", tiny_checkpoint, "-o", tmp_path / "e", "-v", "--layers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    for line in process.stderr:
        if line.startswith(f"{stage}:"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    if process.returncode == 0:  # the signal came when all was done
        assert stage == "trace"
        return
    assert process.returncode == code
    assert out == ""
    assert err.endswith(words)
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [("SIGINT", 130, "error: interrupted\n"), ("SIGTERM", 143, ""), ("ZeroDivisionError", 0, "zero")],
)
def test_a_signal_that_arrives_in_a_destructor_is_not_lost(number, code, words):
    """Where Python drops whatever is raised. Other mistakes there are told as ever, and end nothing."""
    raising = f"os.kill(os.getpid(), signal.{number})" if number.startswith("SIG") else "1 / 0"
    script = f"""
import os, signal, sys, time
from mxcompile.cli import main
class Dropping:
    def __del__(self):
        {raising}
        for _ in range(1000):
            pass
def run(arguments):
    Dropping()
    time.sleep({600 if code else 0})
    return 0
main._run = run
main.main([])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == code
    assert words in done.stderr
    assert ("Traceback" in done.stderr) == (code == 0)


def test_a_second_signal_does_not_end_the_tidying_up_after_the_first():
    """`timeout` sends SIGTERM to the command and then to its group."""
    script = """
import os, signal
from mxcompile.cli import main
def ask():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        pass
def run(arguments):
    try:
        ask()
    finally:
        ask()
        print("tidy")
main._run = run
main.main([])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (143, "tidy\n", "")
