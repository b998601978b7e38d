"""Ranks of a TensorRT engine built at a time: in processes of their own, with the same result, and nothing left when one is killed."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from engines.config import Mapping
from engines.directory import CONFIG, EngineDirWriter, read_config
from engines.errors import EngineError
from engines.tensorrt.build import BuildRequest
from engines.tensorrt.gpus import find_gpu
from engines.tensorrt.ranks import BuiltRank, together
from export.contract import hidden_tap, router_tap
from export.parallel.mapping import ParallelMapping
from export.parallel.plan import ShardingPlan
from model_defs.presets import preset
from mxcompile import rank_building
from mxcompile.exporting import graph, open_checkpoint
from mxcompile.progress import Progress, SilentProgress

Build = Callable[..., Path]


def _request(**changes: object) -> BuildRequest:
    fixed = {"model": {}, "target": "tensorrt-rtx", "gpu": find_gpu(None, "tensorrt-rtx")}
    return BuildRequest(**(fixed | {"max_batch_size": 2, "max_seq_len": 64, "prefill_chunk": 16} | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def build(tiny: Path, plugins_at_hand: Path) -> Build:
    """Builds two ranks of one layer with int8 experts and taps, each time from the same trace: build(folder, jobs, progress)."""
    opened, config = open_checkpoint(tiny, 1)
    model, plan = graph(config, "bfloat16"), ShardingPlan(config, ParallelMapping(2, 1, 2))
    options = {"strip_weights": True, "quantization": {"experts": "int8"}, "taps": [hidden_tap(0), router_tap(0)]}
    request = _request(model=config.to_dict(), mapping=Mapping(2, 1, 2), **options)

    def run(folder: Path, jobs: int, progress: Progress | None = None) -> Path:
        with EngineDirWriter(folder) as writer:
            shown = progress or SilentProgress()
            found, _ = rank_building.build_ranks(model, plan, opened.folder, writer, request, shown, jobs)
            writer.commit(found)
        return folder

    return run


class Bars:
    """A Progress that keeps how far every stage came."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[object]:
        assert total == 100
        bars = self.done
        bars[name] = 0

        class Stage:
            def advance(self, amount: int = 1) -> None:
                assert amount >= 0
                bars[name] += amount

        yield Stage()


def test_processes_build_what_one_process_builds(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    bars = Bars()
    alone, processes = build(tmp_path / "one", 1), build(tmp_path / "two", 2, bars)
    assert bars.done == {"rank 0": 100, "rank 1": 100}
    assert list(scratch.iterdir()) == []
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in processes.iterdir())
    for name in names:
        # TensorRT makes other bytes of the same length each time, in one process as well
        if name.endswith(".engine"):
            assert (alone / name).stat().st_size == (processes / name).stat().st_size
        elif name != CONFIG:
            assert (alone / name).read_bytes() == (processes / name).read_bytes(), name
    one, two = (json.loads((folder / CONFIG).read_text()) for folder in (alone, processes))
    assert set(one.pop("files")) == set(two.pop("files"))
    assert one == two
    assert 0 < one["quantization"]["relative_weight_error"] < 0.01
    assert {port["name"]: port["dtype"] for port in one["outputs"]}.items() >= {hidden_tap(0): "bfloat16"}.items()
    assert [files.graph for files in read_config(processes).ranks] == ["rank0.engine", "rank1.engine"]


def test_a_rank_whose_process_is_killed_stops_the_others(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    me, killed = psutil.Process(), threading.Event()

    class Killer(Bars):
        """Kills the youngest process as soon as one has begun, which the first report shows."""

        @contextlib.contextmanager
        def stage(self, name: str, total: int | None = None) -> Iterator[object]:
            class Stage:
                def advance(self, amount: int = 1) -> None:
                    for job in [] if killed.is_set() else _jobs(me)[-1:]:
                        killed.set()
                        job.kill()

            yield Stage()

    with pytest.raises(EngineError, match=r"rank [01]: .* killed by SIGKILL.*--build-jobs") as caught:
        build(tmp_path / "engine", 2, Killer())
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert list(scratch.iterdir()) == []
    assert _jobs(me) == []


def _jobs(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children():
        with contextlib.suppress(psutil.Error):
            if "mxcompile.rank_job" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def test_memory_and_the_target_say_how_many_ranks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ShardingPlan(preset("text-01"), ParallelMapping.of(8, moe_ep_size=8))
    largest = 4 * 18432 * 6144 * 2  # the gate and up matrices of four experts in bfloat16
    whole = 57_025_835_008 * 2
    stripped = rank_building.TENSORRT_BYTES + rank_building.COPIES * largest
    inside = stripped + rank_building.INSIDE * whole
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    for request, memory, jobs in (
        (_request(strip_weights=True), 3 * stripped, 3),
        (_request(strip_weights=True), stripped - 1, 1),
        (_request(), 3 * stripped, 1),
        (_request(), 2 * inside, 2),
        (_request(target="tensorrt", gpu=find_gpu("h20", "tensorrt"), strip_weights=True), 100 * inside, 1),
    ):
        monkeypatch.setattr(rank_building, "available_memory", lambda memory=memory: memory)
        assert rank_building.possible_jobs(plan, request) == jobs


def test_ranks_that_exchange_different_things_are_no_engine() -> None:
    config = None  # looked at only when the exchanges are the same
    ranks = [BuiltRank(config, [["sum", "[2, 8]"]]), BuiltRank(config, [["sum", "[2, 4]"]])]  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="rank 1 exchanges other values"):
        together(ranks)
