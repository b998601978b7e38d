"""The ranks of one engine: one after the other, or several at a time in processes of their own where cores and memory allow.

Each rank is made from the same file of the traced graph by the same function in either case, so the engines are the same byte for byte.
Processes are started anew rather than forked (torch has threads by now) and do not import torch. A rank that fails ends the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.config import EngineConfig, FileRecord
from engines.directory import EngineDirWriter, EngineFiles
from engines.errors import ENVIRONMENT, EngineError
from engines.tensorrt.build import BuildRequest as TensorRTRequest
from mxcompile.building import referenced_bytes
from mxcompile.machine import available_memory
from mxcompile.progress import Progress, Stage
from mxcompile.quantized import described, quantize

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.onnxruntime.build import BuildRequest
    from export.parallel.plan import ShardingPlan

PARALLEL_FROM = (
    512 << 20
)  # bytes of weights from which processes gain more than the two seconds that they take to start
PROCESS_BYTES = 400 << 20  # of a process before it has touched a weight
COPIES = 3  # of its largest weight that a rank holds for a moment: as stacked, in the engine's type, and as pages of the checkpoint
TENSORRT_BYTES = (
    1 << 30
)  # the same of a process that compiles a plan: TensorRT's libraries, and what its compiler takes
INSIDE = 2  # of all its weights where they go into the plan: pages of what they are read from, and TensorRT's own copy
# Of a rank's bar in percent: start and length.
STAGES = {"lower": (0, 10), "bind weights": (10, 70), "cut": (80, 20)}
TENSORRT_STAGES = {"lower": (0, 10), "bind weights": (10, 50), "build": (60, 40)}

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RankTask:
    """What making one rank takes; `request.rank` says which one."""

    graph: str  # file of the whole model's canonical graph, without weights
    checkpoint: str
    plan: ShardingPlan
    request: BuildRequest | TensorRTRequest
    folder: str  # to write into
    target: str  # name of the engine in errors


@dataclass(frozen=True)
class BuiltRank:
    """What making one rank gave. Plain values, to go from one process to the other."""

    config: str  # JSON of the EngineConfig
    records: dict[str, dict[str, Any]]  # of the files written
    referenced: int  # bytes that stay in the checkpoint
    exchanges: list[list[str]]  # of a TensorRT plan: name and shape of each, which all ranks must have alike
    quantization: tuple[float, float] | None  # the sums of a QuantizationError, where weights were quantized


def build_ranks(
    model: ir.Model,
    plan: ShardingPlan,
    checkpoint: Path,
    writer: EngineDirWriter,
    request: BuildRequest | TensorRTRequest,
    progress: Progress,
    jobs: int | None = None,
) -> tuple[EngineConfig, int]:
    """Write the files of the first `tp_size` ranks with `writer`; also the bytes that stay in the checkpoint, of all together.

    Args:
        model: the traced canonical graph.
        jobs: ranks at a time; default: what `possible_jobs` says. 1 builds in this process.

    Raises EngineError (or what a rank's own failure is) after all other ranks have been stopped.
    """
    from export.save import save_graph

    assert writer.path is not None
    ranks = range(plan.mapping.tp_size)
    jobs = min(jobs or possible_jobs(plan, request), len(ranks))
    with tempfile.TemporaryDirectory(prefix="mxcompile-build-") as scratch:
        graph = Path(scratch) / "model.onnx"
        save_graph(model, graph)
        tasks = [
            RankTask(
                str(graph), str(checkpoint), plan, replace(request, rank=rank), str(writer.path), str(writer.target)
            )
            for rank in ranks
        ]
        with contextlib.ExitStack() as bars:
            stages = TENSORRT_STAGES if isinstance(request, TensorRTRequest) else STAGES
            reports = [_bar(bars.enter_context(progress.stage(f"rank {rank}", 100)), stages) for rank in ranks]
            if jobs == 1:
                built = [build_one(task, report) for task, report in zip(tasks, reports, strict=True)]
            else:
                built = _in_processes(tasks, reports, jobs, Path(scratch))
    for one in built:  # in the order of ranks, whichever was ready first
        writer.records |= {name: FileRecord(**record) for name, record in one.records.items()}
    return _together(built, request), sum(one.referenced for one in built)


def build_one(task: RankTask, report: Report) -> BuiltRank:
    """One rank's files, in this process."""
    import onnx_ir as ir

    from engines.parallel.build import build_rank
    from engines.tensorrt import ranks as tensorrt
    from export.parallel.shard import shard
    from export.parallel.weights import bind_rank_weights
    from model_defs.checkpoint.reader import Checkpoint

    request, files = task.request, EngineFiles(Path(task.folder), Path(task.target))
    mine = shard(ir.load(task.graph), task.plan, request.rank)
    bind_rank_weights(mine, task.plan, request.rank, Checkpoint.open(task.checkpoint))
    error = None if request.quantization is None else quantize(mine, request.quantization)
    referenced, exchanges = referenced_bytes(mine, assembled=isinstance(request, TensorRTRequest)), []
    if isinstance(request, TensorRTRequest):
        referenced *= request.strip_weights
        made = tensorrt.build_rank(mine, files, request, report)
        config, exchanges = made.config, made.exchanges
    else:
        config = build_rank(mine, files, request, report)
    records = {name: asdict(record) for name, record in files.records.items()}
    sums = None if error is None else (error.squared_error, error.squared_weight)
    return BuiltRank(config.to_json(), records, referenced, exchanges, sums)


def _together(built: list[BuiltRank], request: BuildRequest | TensorRTRequest) -> EngineConfig:
    """The configuration of the whole engine."""
    from engines.parallel import build as onnxruntime
    from engines.tensorrt import ranks as tensorrt
    from export.quantize import QuantizationError

    configs = [EngineConfig.from_json(one.config, "a rank's configuration") for one in built]
    if isinstance(request, TensorRTRequest):
        ranks = zip(configs, built, strict=True)
        whole = tensorrt.together([tensorrt.BuiltRank(config, one.exchanges) for config, one in ranks])
    else:
        whole = onnxruntime.together(configs)
    errors = [QuantizationError(*one.quantization) for one in built if one.quantization is not None]
    if request.quantization is None:
        return whole
    return replace(whole, quantization=described(request.quantization, sum(errors, QuantizationError())))


def possible_jobs(plan: ShardingPlan, request: BuildRequest | TensorRTRequest) -> int:
    """How many ranks may be built at a time on this machine as it is now.

    One for TensorRT proper: it chooses kernels by their time on the GPU, and ranks that are built at once would disturb each other.
    """
    import numpy as np

    itemsize = np.dtype("float16" if request.dtype == "bfloat16" else request.dtype).itemsize
    sizes = [plan.part(name, 0).size * itemsize for name in plan.shapes]
    memory, need = available_memory(), PROCESS_BYTES + COPIES * max(sizes)
    if isinstance(request, TensorRTRequest):
        if request.target == "tensorrt":
            return 1
        need += TENSORRT_BYTES - PROCESS_BYTES + (0 if request.strip_weights else INSIDE * sum(sizes))
    if memory is None or sum(sizes) * plan.mapping.tp_size < PARALLEL_FROM:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), memory // need))


def _bar(stage: Stage, stages: Mapping[str, tuple[int, int]]) -> Report:
    """Turns a rank's stages into the percent of its bar."""
    shown = 0

    def report(name: str, done: int, total: int) -> None:
        nonlocal shown
        start, length = stages.get(name, (shown, 0))
        percent = max(shown, start + length * done // max(total, 1))  # TensorRT compiles in several rounds
        stage.advance(percent - shown)
        shown = percent

    return report


def _in_processes(tasks: list[RankTask], reports: list[Report], jobs: int, scratch: Path) -> list[BuiltRank]:
    events: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
    waiting, built = list(range(len(tasks))), dict[int, BuiltRank]()
    running: dict[int, subprocess.Popen[bytes]] = {}
    with _stopped(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                rank = waiting.pop(0)
                _start(rank, tasks[rank], scratch, events, running)
            rank, event = events.get()
            if "stage" in event:
                reports[rank](event["stage"], event["done"], event["total"])
            elif "built" in event:
                built[rank] = BuiltRank(**event["built"])
            elif "error" in event:
                _fail(rank, event)
            else:
                _close(running.pop(rank))
                if rank not in built:
                    _fail(rank, _unexpected(event["ended"], scratch / f"rank{rank}.log"))
    return [built[rank] for rank in range(len(tasks))]


@contextlib.contextmanager
def _stopped(running: dict[int, subprocess.Popen[bytes]]) -> Iterator[None]:
    """No process lives on when the block ends, however it ends."""
    try:
        yield
    finally:
        for process in running.values():
            process.kill()
        for process in running.values():
            process.wait()
            _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe to an ended process, which may have left some of its task unread."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _start(
    rank: int,
    task: RankTask,
    scratch: Path,
    events: queue.Queue[tuple[int, dict[str, Any]]],
    running: dict[int, subprocess.Popen[bytes]],
) -> None:
    """Start a rank's process, which is in `running` as soon as it is there: Ctrl-C may come at any moment."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with (scratch / f"rank{rank}.log").open("wb") as log:
        process = running[rank] = subprocess.Popen(
            [sys.executable, "-m", "mxcompile.rank_job"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ
            | {"PYTHONPATH": path, "TMPDIR": str(scratch)},  # what it leaves there goes with the scratch folder
            start_new_session=True,  # Ctrl-C is this process's to handle
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # its end will tell
        process.stdin.write(pickle.dumps(task))
        process.stdin.flush()  # and left open: when this process dies, the pipe closes and the rank's process ends

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # half a line of a killed process: its end will tell
                events.put((rank, json.loads(line)))
        events.put((rank, {"ended": process.wait()}))

    threading.Thread(target=listen, daemon=True).start()


def _fail(rank: int, event: dict[str, Any]) -> None:
    if event["exit_code"] is None:  # not a failure that anybody foresaw
        raise RuntimeError(f"rank {rank}: {event['error']}")
    raise EngineError(f"rank {rank}: {event['error']}", exit_code=event["exit_code"])


def _unexpected(status: int, log: Path) -> dict[str, Any]:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = log.read_text(errors="replace").splitlines()[-1:]
    words = f" ({lines[0][:300]})" if lines else ""
    hint = "; if memory was short, build fewer ranks at a time with --build-jobs" if status == -signal.SIGKILL else ""
    return {"error": f"the process that built it {how}{words}{hint}", "exit_code": ENVIRONMENT}
