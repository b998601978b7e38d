"""One rank's build as a process: `python -m mxcompile.rank_job`, started by `mxcompile.rank_building`.

The task comes pickled on stdin, from the process that started this one and nobody else; lines of JSON go to stdout. When stdin closes, that
process is gone, and this one ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import sys
import threading
import traceback
from typing import Any

from engines.errors import ENVIRONMENT
from mxcompile.rank_building import build_one


def main() -> None:
    """Build the rank and say what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not stand between the answers

    def say(**message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(message) + "\n")

    task = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        built = build_one(task, lambda stage, done, total: say(stage=stage, done=done, total=total))
    except BaseException as error:
        code = ENVIRONMENT if isinstance(error, (MemoryError, OSError)) else getattr(error, "exit_code", None)
        text = str(error) if code is not None else f"{type(error).__name__}: {error}"
        traceback.print_exc()
        say(error=text or "out of memory; build fewer ranks at a time with --build-jobs", exit_code=code)
        answers.flush()
        os._exit(1)
    say(built=dataclasses.asdict(built))
    answers.flush()
    os._exit(0)


def _end_with_parent() -> None:
    sys.stdin.buffer.read(1)
    os._exit(1)


if __name__ == "__main__":
    main()
