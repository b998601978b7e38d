"""A contestant's process: opens one side, then answers one task per line of JSON until its input ends.

Started by `contestants.Contestant` as `python -m mxcompile.bench.worker`. What libraries print goes to stderr, never between the answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mxcompile.bench import memory

Task = dict[str, Any]


def open_session(setup: Task) -> Any:
    """The side that `setup` names: an engine directory, or the checkpoint under another runtime."""
    backend, threads = setup["backend"], setup["threads"]
    if backend == "engine":
        from engines import load

        options = {"checkpoint": setup["checkpoint"]} if setup["moved"] else {}
        return load(setup["engine"], threads=threads, **options)
    if backend == "pytorch":
        from mxcompile.backends.pytorch import PyTorchSession

        return PyTorchSession.load(setup["checkpoint"], setup["dtype"], setup["layers"], threads=threads)
    from mxcompile.backends.transformers import TransformersSession

    return TransformersSession.load(setup["checkpoint"], setup["dtype"], threads=threads)


def measure(session: Any, task: Task) -> Task:
    """One round of one cell: fresh sequences, the whole prompt, then `new_tokens` steps. Choosing the token is timed, but every
    contestant is fed the same tokens, so that all send them to the same experts.
    """
    batch, length, new_tokens = task["batch_size"], task["prompt_length"], task["new_tokens"]
    random = np.random.default_rng([task["seed"], length, batch])
    prompts = random.integers(0, session.vocab_size, (batch, length)).tolist()
    tokens = random.integers(0, session.vocab_size, (new_tokens, batch))
    memory.reset_peak()
    device = DeviceMemory(session)
    state = session.new_state(batch)
    steps = []
    start = time.perf_counter()
    session.prefill(prompts, state).argmax(-1)
    first = before = time.perf_counter()
    for step in range(new_tokens):
        session.decode(tokens[step], state).argmax(-1)
        now = time.perf_counter()
        steps.append(round(now - before, 7))
        before = now
    return {
        "ttft_s": round(first - start, 7),
        "steps_s": steps,
        "peak_bytes": memory.peak_bytes(),
        "state_bytes": int(state.nbytes),
    } | device.peaks()


class DeviceMemory:
    """Memory of the device that a session computes on while a cell runs; nothing where that is the CPU."""

    def __init__(self, session: Any) -> None:
        self._ask = getattr(session, "device_memory", None)
        if self._ask is not None:
            self._ask(reset=True)

    def peaks(self) -> Task:
        """device_peak_bytes: in use on the device, by all processes, at the cell's end, when everything it needs is still allocated (None
        where the device cannot tell); device_own_bytes: the most that the session itself held. Both None on the CPU."""
        found = {} if self._ask is None else self._ask()
        return {"device_peak_bytes": found.get("used"), "device_own_bytes": found.get("own_peak")}


def serve(setup: Task, answer: Callable[[Task], None], tasks: Any) -> None:
    """Open, say so, and answer every task; an error is an answer."""
    if setup["backend"] in _WITHOUT_SESSION:
        work = _WITHOUT_SESSION[setup["backend"]]
        answer({"ready": True})
        for line in tasks:
            answer(_try(work, setup, json.loads(line)))
        return
    start = time.perf_counter()
    session = open_session(setup)
    loaded = time.perf_counter() - start
    answer(
        {
            "ready": True,
            "load_s": loaded,
            "loaded_bytes": memory.resident_bytes(),
            "max_seq_len": session.max_seq_len,
            "max_batch_size": session.max_batch_size,
            "notes": list(getattr(session, "notes", ())),
        }
    )
    for line in tasks:
        answer(_try(measure, session, json.loads(line)))


def _rates(setup: Task, task: Task) -> Task:
    from mxcompile.bench import rates

    return rates.measure(setup["threads"], **task.get("sizes", {}))


def _layers(setup: Task, task: Task) -> Task:
    from mxcompile.bench.layer_times import profile

    checkpoint = setup["checkpoint"] if setup["moved"] else None
    return profile(Path(setup["engine"]), checkpoint, task["prompt_length"], task["steps"], setup["threads"])


_WITHOUT_SESSION = {"rates": _rates, "layers": _layers}


def _try(work: Callable[[Any, Task], Task], side: Any, task: Task) -> Task:
    try:
        return work(side, task)
    except Exception as error:  # the parent retries once and reports it
        return {"error": describe(error)}


def describe(error: BaseException) -> str:
    """One line."""
    if isinstance(error, MemoryError):
        return "out of memory"
    text = " ".join(str(error).split())[:400]
    return text if hasattr(error, "exit_code") else f"{type(error).__name__}: {text}"


def main() -> None:
    """Read the setup from the first line, then serve."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(values: Task) -> None:
        print(json.dumps(values), file=answers, flush=True)

    setup = json.loads(sys.stdin.readline())
    try:
        serve(setup, answer, sys.stdin)
    except Exception as error:  # opening failed: the parent leaves this contestant out and says why
        answer({"error": describe(error)})


if __name__ == "__main__":
    main()
