"""A benchmark in parts, each in processes of its own that may crash or hang; used by the *_bench.py programs.

The program calls itself with --part, --keys and --progress; that child calls `work`, which goes through the keys.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from supervise import Progress, supervise

ABOUT = "about"  # the key of what a part measures first: the machine and its ceilings
CONTEXT_LOST = 86
STALL_SECONDS = 90.0  # longer than the longest case
RIVAL_STALL_SECONDS = 180.0  # longer than a rival's tuning


def add_options(parser: argparse.ArgumentParser, out: str, rounds: int) -> None:
    """The options that every benchmark has, and those it gives its own children."""
    parser.add_argument("--out", type=Path, default=Path(out), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="(%(default)s)")
    parser.add_argument("--library-dir", type=Path, help="folder of libmxcompile_kernels.so")
    parser.add_argument("--seconds", type=float, default=500.0, help="time for everything (%(default).0f)")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="where the parts' output goes")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--keys", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)


def supervise_parts(
    script: Path,
    parts: Mapping[str, Sequence[str]],
    options: argparse.Namespace,
    assemble: Callable[[dict[str, dict[str, Any]]], dict[str, Any]],
    rival: str | None = None,
) -> dict[str, Any]:
    """Runs every part's keys; options.out holds `assemble` of all results so far after each part.

    Parts share the time equally, what one leaves going to the next; `rival` is a last part that has what all leave.

    A part's result: {"about": row, "rows": {key: row}, "lost": {key: why}, "problem": text, "seconds": number}.
    """
    results: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder, options.log.open("ab") as log:
        progress = Path(folder) / "progress.jsonl"
        for index, (part, keys) in enumerate(parts.items()):
            left = deadline - time.monotonic()
            sharing = len(parts) - index - (rival in parts)
            share = left / sharing if sharing > 1 else left

            def command_for(done: set[str], part: str = part, keys: Sequence[str] = keys) -> list[str] | None:
                rest = [key for key in keys if key not in done]
                if not rest:
                    return None
                command = [sys.executable, str(script), "--part", part, "--progress", str(progress)]
                command += ["--keys", json.dumps(rest), "--rounds", str(options.rounds)]
                return command + (["--library-dir", str(options.library_dir)] if options.library_dir else [])

            seconds = max(share, 1.0)
            stall = min(RIVAL_STALL_SECONDS if part == rival else STALL_SECONDS, seconds)
            ended = supervise(command_for, progress, seconds=seconds, stall=stall, log=log)
            rows = {key: record["row"] for key, record in ended.records.items() if "row" in record}
            lost = {key: record["outcome"] for key, record in ended.records.items() if "row" not in record}
            why = lost.get(ABOUT) or f"not run: {ended.problem or 'its process ended early'}"
            lost |= {key: why for key in keys if key not in ended.records}
            results[part] = {
                ABOUT: rows.pop(ABOUT, None),
                "rows": rows,
                "lost": lost,
                "problem": ended.problem,
                "seconds": ended.seconds,
            }
            report = assemble(results)
            partial = options.out.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(options.out)
    return report


def work(
    options: argparse.Namespace, about: Callable[[], dict[str, Any]], run: Callable[[str, dict[str, Any]], Any]
) -> int:
    """The child: `about()`, then `run(key, about)` for each key; what raises costs its key."""
    progress = Progress(options.progress)
    facts: dict[str, Any] = {}
    for key in (ABOUT, *options.keys):
        progress.start(key)
        try:
            row = about() if key == ABOUT else run(key, facts)
            if key == ABOUT:
                facts = row
            progress.end(key, {"row": row})
        except Exception as error:
            progress.end(key, {"outcome": f"failed: {type(error).__name__}: {error}"[:600]})
            if key == ABOUT:
                return 0  # no GPU, no library: nothing else can be run
            if not _gpu_answers():
                os._exit(CONTEXT_LOST)
    return 0


def _gpu_answers() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False
