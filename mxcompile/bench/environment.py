"""Where and when a benchmark ran."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path
from typing import Any


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def environment(threads: int | None) -> dict[str, Any]:
    """Machine, versions, threads, commit and how busy the machine was."""
    from mxcompile.machine import examine

    machine = examine()
    return {
        "mxcompile": machine.mxcompile,
        "commit": _commit(),
        "python": machine.python,
        "system": machine.system,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_total": machine.memory_total,
        "gpus": [gpu.name for gpu in machine.gpus],
        "libraries": {name: version for name, version in machine.libraries.items() if version},
        "threads": threads,
        "load_average_before": list(os.getloadavg()),
    }


def _commit() -> str | None:
    """Commit of this source tree, with + when it has changes; None when it is not one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
