"""Ranks of one engine built at a time: in processes of their own, with the same result, and nothing left when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from cli_process import environment

from engines.config import Mapping
from engines.directory import EngineDirWriter
from engines.errors import EngineError
from engines.onnxruntime.build import BuildRequest
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from model_defs.presets import preset
from mxcompile import building, rank_building
from mxcompile.errors import MxcompileError
from mxcompile.exporting import graph, open_checkpoint
from mxcompile.progress import SilentProgress

JOB = "mxcompile.rank_job"


@pytest.fixture(scope="module")
def build(tiny_checkpoint, tmp_path_factory):
    """Builds two ranks of one layer, each time from the same trace: build(folder, jobs, progress)."""
    opened, config = open_checkpoint(tiny_checkpoint, 1)
    model, plan = graph(config, "float32"), ShardingPlan(config, ParallelMapping(2, 1, 2))
    request = BuildRequest(config.to_dict(), 1, 16, mapping=Mapping(2, 1, 2))

    def run(folder: Path, jobs: int, progress=None, checkpoint: Path = opened.folder) -> Path:
        with EngineDirWriter(folder) as writer:
            found = rank_building.build_ranks(
                model, plan, checkpoint, writer, request, progress or SilentProgress(), jobs
            )
            writer.commit(found[0])
        return folder

    return run


class Bars:
    """A Progress that keeps how far every stage came."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}

    @contextlib.contextmanager
    def stage(self, name, total=None):
        assert total == 100
        bars = self.done
        bars[name] = 0

        class Stage:
            def advance(self, amount: int = 1) -> None:
                assert amount >= 0
                bars[name] += amount

        yield Stage()


def test_processes_build_what_one_process_builds(build, tmp_path):
    bars = Bars()
    alone, together = build(tmp_path / "one", 1), build(tmp_path / "two", 2, bars)
    names = sorted(path.name for path in alone.iterdir())
    assert len([name for name in names if name.startswith("rank1.")]) == 6
    assert names == sorted(path.name for path in together.iterdir())
    for name in names:
        assert (alone / name).read_bytes() == (together / name).read_bytes(), name
    assert bars.done == {"rank 0": 100, "rank 1": 100}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_rank_that_fails_is_named_and_stops_the_others(build, tmp_path):
    with pytest.raises(EngineError, match=r"rank [01]: .*nowhere") as caught:
        build(tmp_path / "engine", 2, checkpoint=tmp_path / "nowhere")
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
    assert jobs_of(psutil.Process()) == []


def test_a_rank_whose_process_is_killed_stops_the_others(build, tmp_path):
    me, killed = psutil.Process(), []

    def kill_one() -> None:
        until = time.monotonic() + 300
        while not killed and time.monotonic() < until:
            for job in jobs_of(me):
                job.kill()
                killed.append(job.pid)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.raises(
        EngineError, match=r"rank [01]: the process that built it was killed by SIGKILL.*--build-jobs"
    ) as caught:
        build(tmp_path / "engine", 2)
    thread.join()
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    assert jobs_of(me) == []


def test_a_process_that_dies_within_a_line_is_told(build, tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nprintf \'{"stage": "lo\'\nkill -9 $$\n')
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(EngineError, match=r"rank [01]: the process that built it was killed by SIGKILL"):
        build(tmp_path / "engine", 2)
    assert list(tmp_path.iterdir()) == [program]


def test_an_interrupt_while_a_process_starts_ends_that_one_too(build, tmp_path, monkeypatch):
    pickled, real = [], rank_building.pickle.dumps

    def interrupted(task):
        pickled.append(task)
        if len(pickled) == 2:
            raise KeyboardInterrupt
        return real(task)

    monkeypatch.setattr(rank_building.pickle, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "engine", 2)
    assert len(pickled) == 2
    assert list(tmp_path.iterdir()) == []
    assert jobs_of(psutil.Process()) == []


def jobs_of(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children():
        with contextlib.suppress(psutil.Error):
            if JOB in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def test_an_interrupted_build_of_ranks_leaves_nothing(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "mxcompile", "build", tiny_checkpoint, "-o", tmp_path / "e", "-v", "--layers", "1"]
    command += ["--tp-size", "2", "--build-jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("trace:"):
            break
    until, jobs = time.monotonic() + 300, []
    while len(jobs) < 2 and process.poll() is None and time.monotonic() < until:
        jobs = jobs_of(psutil.Process(process.pid))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert len(jobs) == 2
    assert process.returncode == 130
    assert err.endswith("error: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    psutil.wait_procs(jobs, timeout=300)
    assert not any(job.is_running() for job in jobs)


def test_memory_and_cores_say_how_many_ranks_at_a_time(monkeypatch):
    plan = ShardingPlan(preset("text-01"), ParallelMapping.of(8, moe_ep_size=8))
    largest = 4 * 18432 * 6144 * 2  # the gate and up matrices of four experts in bfloat16
    need = rank_building.PROCESS_BYTES + rank_building.COPIES * largest
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    for memory, jobs in ((None, 1), (need - 1, 1), (2 * need, 2), (5 * need + 1, 5), (100 * need, 6)):
        monkeypatch.setattr(rank_building, "available_memory", lambda memory=memory: memory)
        assert rank_building.possible_jobs(plan, BuildRequest({}, 1, 16, dtype="bfloat16")) == jobs
    small = dataclasses.replace(preset("tiny"), vocab_size=480)  # too little work for a process to pay
    assert rank_building.possible_jobs(ShardingPlan(small, ParallelMapping.of(4)), BuildRequest({}, 1, 16)) == 1


def test_jobs_are_at_least_one(tiny_checkpoint, tmp_path):
    with pytest.raises(MxcompileError, match="--build-jobs") as caught:
        building.build(tiny_checkpoint, tmp_path / "e", tp_size=2, build_jobs=0)
    assert caught.value.exit_code == 2
