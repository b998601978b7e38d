"""A checkpoint of MiniMax-Text-01's real size through the product's own commands; needs no GPU and 1 GB of disk.

    python -m benchmarks.full_size_build --json benchmarks/results/full_size_build.json

The checkpoint has the published names, shapes and configuration, 912 GB in 422 shards (the published one has 413, whose limits are not
known here), and every weight in it is a hole: it reads as zeros and takes no disk where the file system knows holes. On it run, each as a
process of its own: `checkpoint verify`, `inspect`, `plan`, `build --target tensorrt-rtx --strip-weights` on 8 ranks, `inspect` of the
engine, the same build again (which finds nothing to do), and a build with int8 experts, which must be refused for want of disk. With
`--load`, rank 0's weights are then put together as a session does it, on a device that forgets them.

Per command: seconds, the most resident memory of its largest process (mapped files included) and of all its processes together, sampled,
and the bytes it wrote. What fails, fails the benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from model_defs.checkpoint.create import create_checkpoint
from model_defs.presets import preset

SHARD_BYTES = 2_260_000_000  # makes 422 shards; no limit makes 413, and the next smaller number is 406
SAMPLE_SECONDS = 0.2
REPOSITORY = Path(__file__).parents[1]


def run(arguments: Sequence[str], folder: Path, status: int = 0) -> tuple[dict[str, Any], str]:
    """One command of the product: what it took, and what it printed. RuntimeError where it does not exit with `status`."""
    before, started = disk_bytes(folder), time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "mxcompile", *arguments], stdout=out, stderr=err, cwd=REPOSITORY
        )
        largest = together = 0
        while process.poll() is None:
            sizes = resident(process.pid)
            largest, together = max(largest, *sizes, 0), max(together, sum(sizes))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        printed, said = out.read(), err.read()
    shown = " ".join(arguments).replace(str(folder), "FOLDER")
    if process.returncode != status:
        raise RuntimeError(f"mxcompile {shown} exited with {process.returncode}, not {status}: {said or printed}")
    print(f"{seconds:8.1f} s  {shown}", file=sys.stderr)
    found = {
        "command": f"mxcompile {shown}",
        "seconds": round(seconds, 1),
        "largest_process_bytes": largest,
        "all_processes_bytes": together,
        "written_bytes": disk_bytes(folder) - before,
    }
    return found | ({"said": said.strip().replace(str(folder), "FOLDER")} if status else {}), printed


def resident(pid: int) -> list[int]:
    """Resident bytes of a process and of all that it started."""
    sizes = [0]
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [found := psutil.Process(pid), *found.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss)
    return sizes


def disk_bytes(folder: Path) -> int:
    """Bytes that a folder's files take on the disk; holes take none."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*"))


def make(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The hollow checkpoint."""
    started = time.perf_counter()
    made = create_checkpoint(preset(options.preset), folder, hollow=True, max_shard_bytes=SHARD_BYTES)
    return {
        "preset": options.preset,
        "tensors": len(made.entries),
        "shards": len(made.files),
        "weight_bytes": made.total_bytes,
        "on_disk_bytes": disk_bytes(folder),
        "seconds": round(time.perf_counter() - started, 1),
    }


def load(engine: Path) -> dict[str, Any]:
    """Put rank 0's weights together as a session does."""
    from engines.directory import read_config
    from engines.tensorrt.loading import load_weights
    from engines.weights import open_weights

    class Forgetful:
        given = longest = 0

        def allocate(self, nbytes: int) -> int:
            return 0

        def upload(self, address: int, array: Any) -> None:
            self.given += array.nbytes
            self.longest = max(self.longest, array.nbytes)

    device, started = Forgetful(), time.perf_counter()
    config = read_config(engine)
    manifest, weights = open_weights(engine, config, config.ranks[0].weights or "")
    load_weights(device, weights)
    return {
        "weights": len(weights),
        "bytes": device.given,
        "from_the_checkpoint": sum(w.nbytes for w in weights if not manifest.is_written(w.record)),
        "largest_copy_bytes": device.longest,
        "seconds": round(time.perf_counter() - started, 1),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All commands, in order."""
    checkpoint, engine = folder / "checkpoint", folder / "engine"
    result: dict[str, Any] = {"checkpoint": make(options, checkpoint), "commands": {}}
    commands = result["commands"]
    ranks = ["--tp-size", str(options.ranks), "--moe-ep-size", str(options.ranks)]
    build = [
        "build",
        str(checkpoint),
        "--target",
        "tensorrt-rtx",
        "--gpu",
        options.gpu,
        *ranks,
        "--strip-weights",
        "--json",
    ]
    build += ["--max-seq-len", str(options.max_seq_len), "--max-batch-size", str(options.max_batch_size)]
    build += [] if options.layers is None else ["--layers", str(options.layers)]
    build += [] if options.build_jobs is None else ["--build-jobs", str(options.build_jobs)]
    commands["verify"], _ = run(["checkpoint", "verify", str(checkpoint)], folder)
    commands["inspect_checkpoint"], _ = run(["inspect", str(checkpoint), "--json"], folder)
    commands["plan"], _ = run(["plan", str(checkpoint), *ranks, "--json"], folder)
    commands["build"], printed = run([*build, "-o", str(engine), "--dtype", "bfloat16"], folder)
    built = json.loads(printed)
    result["engine"] = {key: built[key] for key in ("layers", "parameters", "sizes", "referenced_bytes", "seconds")}
    commands["inspect_engine"], printed = run(["inspect", str(engine), "--json"], folder)
    result["engine"]["memory_of_rank_0"] = json.loads(printed)["memory"][0]
    result["engine"]["plugins"] = json.loads(printed)["plugins"]
    commands["build_again"], printed = run([*build, "-o", str(engine), "--dtype", "bfloat16"], folder)
    if not json.loads(printed)["skipped"]:
        raise RuntimeError("an unchanged build was done again")
    # Half a byte per parameter is well below what int8 experts take: with that much room the build would really begin.
    if shutil.disk_usage(folder).free < built["parameters"] // 2:
        int8 = [*build, "-o", str(folder / "int8"), "--quantize-experts", "int8"]
        commands["build_int8_refused"], _ = run(int8, folder, status=3)
    if options.load:
        result["load_rank_0"] = load(engine)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="text-01")
    parser.add_argument("--folder", type=Path, help="for the checkpoint and the engine; kept. Default: a temporary one")
    parser.add_argument("--layers", type=int, help="build the first ones only")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--gpu", default="rtx-4090")
    parser.add_argument("--build-jobs", type=int)
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=4096)
    parser.add_argument("--load", action="store_true", help="read all of rank 0's weights too")
    parser.add_argument("--note", help="kept beside the numbers, such as what else the machine did")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scratch = None if options.folder else Path(tempfile.mkdtemp(prefix="mxcompile-full-size-"))
    folder = scratch or options.folder.absolute()
    try:
        result = measure(options, folder)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    write(
        options,
        ("tensorrt-rtx-cu13", "torch", "onnx", "onnx-ir", "numpy"),
        {
            "benchmark": "full_size_build",
            "gpu": options.gpu,
            "ranks": options.ranks,
            "max_seq_len": options.max_seq_len,
            "max_batch_size": options.max_batch_size,
        }
        | result,
    )


def write(options: argparse.Namespace, libraries: Sequence[str], result: dict[str, Any]) -> None:
    """Print a result, with date, note, machine and versions, and write it where `--json` says."""
    about = {
        "benchmark": result["benchmark"],
        "date": date.today().isoformat(),
        "note": options.note,
        "machine": {"cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {name: version(name) for name in libraries},
    }
    text = json.dumps(about | result, indent=1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
