"""What benchmarks/gpu/run.py does with kernels that fail, crash or hang, on made-up tests and cases that need no GPU."""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))

import lightning_bench  # noqa: E402
import parts  # noqa: E402
import run  # noqa: E402
import slim_wheel  # noqa: E402
import supervise  # noqa: E402

from plugins.build import BuildResult, BuiltLibrary, _store_result, sources_digest  # noqa: E402
from plugins.errors import PluginsError  # noqa: E402

TESTS = """
import os, time
def test_good(): pass
def test_crashes(): os._exit(9)
def test_fails(): assert False, "wrong number"
def test_hangs(): time.sleep(600)
def test_last(): pass
"""

CASES = """
import argparse, os, sys, time
sys.path.insert(0, {folder!r})
from parts import add_options, work
parser = argparse.ArgumentParser()
add_options(parser, "x.json", 1)
def about():
    if {broken!r}: raise RuntimeError("no library")
    return {{"gpu": "made up"}}
def case(key, facts):
    if key == "crash": os._exit(11)
    if key == "raise": raise ValueError("refused")
    return {{"us": 1.0, "gpu": facts["gpu"]}}
raise SystemExit(work(parser.parse_args(), about, case))
"""


def test_a_crash_and_a_hang_cost_one_test_each(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(TESTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks" / "gpu")}
    arguments = [str(tmp_path / "test_made_up.py"), f"--rootdir={tmp_path}", "-c", os.devnull]
    found = run.run_group("made up", arguments, tmp_path / "log", 500, 20, env)  # seconds: for all, for one step
    wrong = {name.rpartition("::")[2]: record["outcome"] for name, record in found["wrong"].items()}
    assert wrong.pop("test_hangs").startswith("hung")
    assert wrong == {"test_crashes": "crashed: exit code 9", "test_fails": "failed"}
    assert (found["passed"], found["skipped"], found["problem"]) == (2, 0, "")
    assert any("wrong number" in record.get("text", "") for record in found["wrong"].values())


@pytest.mark.parametrize("broken", [False, True])
def test_a_benchmark_keeps_what_the_others_measured(tmp_path: Path, broken: bool) -> None:
    script = tmp_path / "made_up_bench.py"
    script.write_text(CASES.format(folder=str(ROOT / "benchmarks" / "gpu"), broken=broken))
    parser = argparse.ArgumentParser()
    parts.add_options(parser, "x.json", 1)
    options = parser.parse_args(["--out", str(tmp_path / "out.json"), "--seconds", "120"])
    parts.supervise_parts(script, {"one": ["first", "crash", "raise", "last"]}, options, lambda results: results)
    part = json.loads((tmp_path / "out.json").read_text())["one"]
    if broken:
        assert part["rows"] == {}
        assert all("no library" in part["lost"][key] for key in ("about", "first", "last"))
        return
    assert set(part["rows"]) == {"first", "last"}
    assert part["rows"]["last"]["gpu"] == "made up"
    assert part["lost"] == {"crash": "crashed: exit code 11", "raise": "failed: ValueError: refused"}


def test_a_rival_takes_no_time_from_our_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It compiles for long before its first number: ours share the time as if it were not there."""
    given: dict[str, tuple[float, float]] = {}

    def made_up(command_for, progress, *, seconds: float, stall: float, log) -> supervise.Supervised:
        given[command_for(set())[3]] = (seconds, stall)
        return supervise.Supervised({}, "", 0.0)

    monkeypatch.setattr(parts, "supervise", made_up)
    parser = argparse.ArgumentParser()
    parts.add_options(parser, "x.json", 1)
    options = parser.parse_args(["--out", str(tmp_path / "out.json"), "--seconds", "230"])
    keys = {part: lightning_bench.keys_of(part) for part in lightning_bench.PARTS}
    parts.supervise_parts(tmp_path / "x", keys, options, lightning_bench.assemble, lightning_bench.RIVAL)
    assert list(given) == ["portable", "sm90", "apart", "fla"]
    assert given["portable"] == (pytest.approx(230 / 3, abs=1), pytest.approx(230 / 3, abs=1))
    assert given["apart"][1] == parts.STALL_SECONDS
    assert given["fla"] == (pytest.approx(230, abs=1), parts.RIVAL_STALL_SECONDS)


def test_a_rivals_time_is_compared_with_all_kernels() -> None:
    def part(**us: float) -> dict:
        return {
            "rows": {"k": {"case": "prefill (1, 8192) 64 heads", "contestants": {n: {"us": t} for n, t in us.items()}}}
        }

    found = lightning_bench.assemble({"sm90": part(sm90=100.0), "fla": part(portable=200.0, fla=300.0)})
    entries = [row["contestants"] for p in found["parts"].values() for row in p["rows"].values()]
    assert entries[0]["sm90"]["speedup_over_fla"] == 3.0
    assert entries[1]["portable"]["speedup_over_fla"] == 1.5
    assert "speedup_over_fla" not in entries[1]["fla"]
    assert found["goals"]["prefill (1, 8192) 64 heads, times FLA"]["reached"] == 3.0


def test_a_child_that_never_comes_to_a_key_is_given_up(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as log:
        ended = supervise.supervise(
            lambda done: [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "p", seconds=60, stall=30, log=log
        )
    assert ended.records == {}
    assert "exit code 3" in ended.problem


def carried(folder: Path, **changes: object) -> None:
    """A finished build in `folder`, as a machine with a compiler leaves it."""
    folder.mkdir()
    library = folder / "libmxcompile_kernels.so"
    library.write_bytes(b"made up")
    facts: dict = dict(tensorrt=None, architectures=("90a",), digest="", sources=sources_digest(("90a",)))
    facts |= dict(nvcc_version="13.0.0", tensorrt_headers=None, seconds=1.0, skipped=False, usage=())
    _store_result(folder, BuildResult(kernels=BuiltLibrary(library, 7), **(facts | changes)))


def test_a_carried_library_must_be_of_these_sources_and_this_gpu(tmp_path: Path) -> None:
    facts = {"name": "made up", "compute_cap": "9.0"}
    carried(tmp_path / "good")
    assert run.find_library(facts, tmp_path / "good")[1] == tmp_path / "good"
    carried(tmp_path / "old", sources="0")
    carried(tmp_path / "other", architectures=("80",), sources=sources_digest(("80",)))
    for folder, said in (("old", "other sources"), ("other", "is for 80"), ("absent", "no finished build")):
        with pytest.raises(PluginsError, match=said):
            run.find_library(facts, tmp_path / folder)


@pytest.mark.parametrize("answer", ["", "not json", "{}", None])
def test_versions_that_nobody_tells_end_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str | None
) -> None:
    carried(tmp_path / "good")
    result, _ = run.find_library({"name": "made up", "compute_cap": "9.0"}, tmp_path / "good")

    def made_up(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if command[0] != sys.executable:
            return subprocess.CompletedProcess(command, 0, "abc\n", "")
        if answer is None:
            raise subprocess.TimeoutExpired(command, 60)
        return subprocess.CompletedProcess(command, 0, answer, "")

    monkeypatch.setattr(run.subprocess, "run", made_up)
    assert run.versions(result)["commit"] == "abc"


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["run.py", "bench"])
    assert run.main() == 3
    assert capsys.readouterr().err.startswith("error: no NVIDIA GPU found")


def fat_binary(*entries: tuple[int, int, bytes]) -> bytes:
    """Entries: kind, architecture, content."""
    body = b""
    for kind, arch, content in entries:
        head = struct.pack("<HHIQ", kind, 1, 64, len(content)).ljust(28, b"\1") + struct.pack("<I", arch)
        body += head.ljust(64, b"\2") + content
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_a_slim_wheel_keeps_the_code_of_one_architecture_alone(tmp_path: Path) -> None:
    ptx, old, new = b"p" * 80, b"o" * 72, b"n" * 96
    stray = struct.pack("<I", 0xBA55ED50) + b"not one"
    before = stray + fat_binary((2, 80, old), (2, 90, new), (1, 90, ptx)) + b"between" + fat_binary((2, 90, new))
    source = tmp_path / "onnxruntime_gpu-1-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as wheel:
        wheel.writestr(f"onnxruntime/capi/{slim_wheel.CUDA_PROVIDER}", before)
        wheel.writestr(f"onnxruntime/capi/{slim_wheel.TENSORRT_PROVIDER}", b"large")
        wheel.writestr("onnxruntime/__init__.py", b"o" * 72)
    with zipfile.ZipFile(slim_wheel.slim(source, tmp_path / "slim", 90)) as copy:
        assert copy.namelist() == [f"onnxruntime/capi/{slim_wheel.CUDA_PROVIDER}", "onnxruntime/__init__.py"]
        after = copy.read(copy.namelist()[0])
        assert copy.read("onnxruntime/__init__.py") == b"o" * 72
    assert after == before.replace(old, bytes(72)).replace(ptx, bytes(80))
    with pytest.raises(ValueError, match="no machine code for sm_120"):
        slim_wheel.slim(source, tmp_path / "slim", 120)
    with pytest.raises(ValueError, match="name another folder"):
        slim_wheel.slim(source, tmp_path, 90)
