"""The session of an engine of several ranks: `engines.interface.Session` over one process per rank."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from engines import checks
from engines.config import EngineConfig
from engines.directory import read_config, verify_files
from engines.errors import EngineError
from engines.interface import Positions, RowSnapshot, State, StepResult
from engines.parallel import worker
from engines.parallel.heads import head_range, join
from engines.parallel.join import launched
from engines.parallel.launch import RankProcesses

START_LIMIT_S = 120.0  # until every rank has connected
STALL_LIMIT_S = 60.0  # without any progress of any rank


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    prepack: bool = True,
    verify: str = "quick",
    checkpoint: str | os.PathLike[str] | None = None,
    start_limit: float = START_LIMIT_S,
    stall_limit: float = STALL_LIMIT_S,
    launcher: Sequence[str] | None = None,
) -> ParallelSession:
    """Start the ranks of an engine directory, all on this machine.

    Args:
        threads: of all ranks together; default: the CPUs this process may use. Each rank has at least one.
        prepack, verify, checkpoint: as `engines.onnxruntime.load`.
        start_limit: seconds until a rank that has not started counts as lost.
        stall_limit: seconds without progress in a call until the ranks count as hanging.
        launcher: command that starts `-n RANKS PROGRAM`; default: mpirun.

    In a process that `mpirun` or `torchrun` has started with others (`engines.parallel.join`), rank 0 gets a session of all of
    them; on other ranks this does not return: they compute until the session ends, and end with it.

    Raises EngineError: not an engine, damaged, another number of ranks was started, or MPI is missing (exit code 3).
    """
    folder = Path(path).resolve()
    config = read_config(folder)
    ranks = config.mapping.ranks
    if [files.rank for files in config.ranks] != list(range(ranks)):
        raise EngineError(f"{folder}: does not have the files of all {ranks} ranks; rebuild the engine")
    joined = launched() if launcher is None else None
    if joined is not None:
        joined.check(ranks)
        if joined.rank > 0:
            worker.join(joined, folder, start_limit)
    verify_files(folder, config, whole=verify == "full")
    each = max(1, (threads or len(os.sched_getaffinity(0))) // ranks)
    options = {
        "engine": str(folder),
        "build": config.options.get("parallel_build"),
        "threads": each,
        "prepack": prepack,
        "checkpoint": None if checkpoint is None else str(Path(checkpoint).resolve()),
    }
    processes = RankProcesses(
        ranks,
        options,
        threads=each,
        start_limit=start_limit,
        stall_limit=stall_limit,
        launcher=launcher,
        joined=joined,
    )
    return ParallelSession(config, processes)


class ParallelSession:
    """See `engines.interface.Session`. The ranks end with `close`, at the end of a with block, or with this process."""

    def __init__(self, config: EngineConfig, processes: RankProcesses) -> None:
        self._config, self._processes = config, processes
        self._numbers = itertools.count()
        self._end = weakref.finalize(self, processes.close)

    def __enter__(self) -> ParallelSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check_alive(self) -> None:
        """Raise EngineError when a rank was lost since the last call. Costs next to nothing: for whoever waits."""
        self._processes.check_alive()

    def close(self) -> None:
        """End the ranks."""
        self._end()

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def max_seq_len(self) -> int:
        return self._config.limits.max_seq_len

    @property
    def max_batch_size(self) -> int:
        return self._config.limits.max_batch_size

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    def new_state(self, batch_size: int) -> ParallelState:
        number = next(self._numbers)
        answers = self._processes.ask({"do": "new_state", "state": number, "batch_size": int(batch_size)})
        return ParallelState(self, number, answers)

    def prefill(self, prompts: Sequence[Sequence[int]], state: State, chunk: int | None = None) -> np.ndarray:
        rows = checks.prompt_rows(prompts, state.batch_size)
        ids = np.concatenate(rows)
        counts = np.array([len(row) for row in rows], np.int64)
        return self._step(state, {"do": "prefill", "ids": ids, "counts": counts, "chunk": chunk})["logits"]

    def decode(self, tokens_B: np.ndarray | Sequence[int], state: State) -> np.ndarray:
        tokens = checks.one_token_per_row(tokens_B, state.batch_size)
        return self._step(state, {"do": "decode", "tokens": tokens})["logits"]

    def forward(
        self,
        ids_BT: np.ndarray,
        new_lengths_B: np.ndarray | Sequence[int],
        state: State,
        positions: Positions = "last",
        taps: bool = False,
    ) -> StepResult:
        ids, new = checks.integers(ids_BT), checks.integers(new_lengths_B)
        message = {"do": "forward", "ids": ids, "new": new, "positions": positions, "taps": taps}
        found = self._step(state, message)
        return StepResult(found["logits"], found["taps"])

    def _step(self, state: State, message: dict[str, Any]) -> dict[str, Any]:
        checks.own(isinstance(state, ParallelState) and state._session is self)
        return cast(ParallelState, state)._ask(message)[0]


class ParallelState:
    """See `engines.interface.State`. Every rank holds its heads of it."""

    def __init__(self, session: ParallelSession, number: int, answers: list[dict[str, Any]]) -> None:
        self._session, self._number = session, number
        self._note(answers)
        processes = session._processes
        self._dropped = weakref.finalize(self, _drop, weakref.ref(processes), number)
        self._dropped.atexit = False

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        view = self._lengths.view()
        view.flags.writeable = False
        return view

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def recurrent(self, layer: int) -> np.ndarray:
        return self._whole("recurrent", layer)

    def key(self, layer: int) -> np.ndarray:
        return self._whole("key", layer)

    def value(self, layer: int) -> np.ndarray:
        return self._whole("value", layer)

    def read_row(self, row: int, start: int = 0) -> RowSnapshot:
        answers = self._ask({"do": "read_row", "row": int(row), "start": int(start)})
        one_set = answers[: self._session.config.mapping.tp_size]

        def whole(what: str) -> dict[int, np.ndarray]:
            heads = self._heads(what)
            return {layer: join([a[what][layer] for a in one_set], heads, 0) for layer in answers[0][what]}

        return RowSnapshot(answers[0]["length"], whole("recurrent"), whole("key"), whole("value"))

    def write_row(self, row: int, snapshot: RowSnapshot) -> None:
        mapping = self._session.config.mapping
        checks.fitting(snapshot, self._session.config)
        parts = {"recurrent": snapshot.recurrent, "key": snapshot.key, "value": snapshot.value}

        def message(rank: int) -> dict[str, Any]:
            mine = {
                what: {
                    layer: array[head_range(self._heads(what), mapping.tp_size, rank % mapping.tp_size)]
                    for layer, array in layers.items()
                }
                for what, layers in parts.items()
            }
            return {"do": "write_row", "row": int(row), "length": int(snapshot.length), **mine}

        self._ask([message(rank) for rank in range(mapping.ranks)])

    def clear_row(self, row: int) -> None:
        self._ask({"do": "clear_row", "row": int(row)})

    def _whole(self, what: str, layer: int) -> np.ndarray:
        answers = self._ask({"do": "part", "what": what, "layer": int(layer)})
        one_set = answers[: self._session.config.mapping.tp_size]  # the others hold the same
        return join([answer["part"] for answer in one_set], self._heads(what), 1)

    def _heads(self, what: str) -> int:
        """Heads of the whole model in this kind of state."""
        role = "recurrent_state" if what == "recurrent" else what
        heads = next((spec.dims[1] for spec in self._session.config.states if spec.role == role), 1)
        assert isinstance(heads, int)
        return heads

    def _ask(self, message: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
        def of_state(one: dict[str, Any]) -> dict[str, Any]:
            return one | {"state": self._number}

        whole = of_state(message) if isinstance(message, dict) else [of_state(one) for one in message]
        answers = self._session._processes.ask(whole)
        if "lengths" in answers[0]:
            self._note(answers)
        return answers

    def _note(self, answers: list[dict[str, Any]]) -> None:
        self._lengths: np.ndarray = answers[0]["lengths"]
        self._capacity: int = answers[0]["capacity"]
        self._nbytes: int = sum(answer["nbytes"] for answer in answers)


def _drop(processes: Callable[[], RankProcesses | None], number: int) -> None:
    """Let the ranks forget a state that nobody holds any more."""
    alive = processes()
    if alive is not None:
        alive.forget(number)
