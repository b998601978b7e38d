"""One rank as a process: `python -m engines.parallel.worker FOLDER OPTIONS`, started by MPI's launcher.

It connects to the session that started it (two local sockets in a private folder), says who it is, loads its part of the engine,
and then does what it is told, one message at a time. The second socket only tells that the session is still there: when it
closes, the process ends at once, even in the middle of a collective.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.parallel.message import Message, decode, encode

if TYPE_CHECKING:
    from engines.onnxruntime.state import OrtState
    from engines.parallel.rank_session import RankSession

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
SOCKET, TICKS = "socket", "ticks"


def log_name(rank: int) -> str:
    """File for what a rank writes on stdout and stderr, in the folder that it shares with the session."""
    return f"rank{rank}.log"


def main() -> None:
    """Serve until told to stop, or until the session is gone."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the session's to handle
    log = os.open(folder / log_name(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    commands: Connection = Client(str(folder / SOCKET))
    commands.send_bytes(encode({"rank": rank, "pid": os.getpid()}))
    lifeline: Connection = Client(str(folder / SOCKET))
    lifeline.send_bytes(encode({"lifeline": rank}))
    threading.Thread(target=_watch, args=(lifeline, folder), daemon=True).start()
    try:
        server = _Server(_load(rank, folder, options), rank)
        commands.send_bytes(encode({"ready": True}))
        while server.answer(commands):
            pass
    except EOFError:  # the session is gone
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        _say(commands, error)
        os._exit(1)
    os._exit(0)  # without MPI's finalize, which would wait for the others


def _watch(lifeline: Connection, folder: Path) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        shutil.rmtree(folder, ignore_errors=True)  # a session that was killed could not
        os._exit(1)


def _say(commands: Connection, error: BaseException) -> None:
    text = str(error) if hasattr(error, "exit_code") else f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        commands.send_bytes(encode({"fatal": text, "exit_code": getattr(error, "exit_code", 3)}))


def _load(rank: int, folder: Path, options: dict[str, Any]) -> RankSession:
    from engines.directory import read_config
    from engines.errors import EngineError
    from engines.parallel.exchange import MpiExchanger
    from engines.parallel.rank_session import RankSession, share_threads
    from engines.parallel.segment_session import SegmentSession
    from engines.weights import map_weights

    engine = Path(options["engine"])
    config = read_config(engine)
    if config.options.get("parallel_build") != options["build"]:
        raise EngineError(f"{engine}: rank {rank} finds another engine there than the session that started it")
    exchanger = MpiExchanger()
    if (exchanger.rank, exchanger.ranks) != (rank, config.mapping.ranks):
        raise EngineError(
            f"MPI says rank {exchanger.rank} of {exchanger.ranks}, expected {rank} of {config.mapping.ranks}"
        )
    share_threads(options["threads"])
    files = next(files for files in config.ranks if files.rank == rank)
    assert files.weights is not None
    moved = None if options["checkpoint"] is None else Path(options["checkpoint"])
    weights = map_weights(engine, config, files.weights, moved)
    kind = RankSession if config.mapping.cp_size == 1 else SegmentSession
    return kind(
        config,
        engine,
        weights,
        exchanger,
        threads=options["threads"],
        prepack=options["prepack"],
        tick=_ticker(folder / TICKS, rank),
    )


def _ticker(path: Path, rank: int) -> Callable[[], None]:
    """Counts a number up in a file that the session watches: a rank whose number stands still hangs."""
    with path.open("r+b") as file:
        counts = np.frombuffer(mmap.mmap(file.fileno(), 0), np.int64)

    def tick() -> None:
        counts[rank] += 1

    return tick


class _Server:
    """Keeps the rank's states and answers messages."""

    def __init__(self, session: RankSession, rank: int) -> None:
        self._session, self._rank = session, rank
        self._states: dict[int, OrtState] = {}

    def answer(self, commands: Connection) -> bool:
        """One message; False when it was the last."""
        message = decode(commands.recv_bytes())
        name = message.pop("do")
        if name == "stop":
            return False
        for state in message.pop("forget"):
            self._states.pop(state, None)
        try:
            reply = getattr(self, f"_{name}")(**message)
        except Exception as error:
            # Misuse, found by every rank alike before anything is exchanged. Everything else ends the process.
            if getattr(error, "exit_code", None) != 2:
                raise
            reply = {"error": str(error)}
        commands.send_bytes(encode(reply))
        return True

    def _new_state(self, state: int, batch_size: int) -> Message:
        self._states[state] = self._session.new_state(batch_size)
        return self._about(state)

    def _prefill(self, state: int, ids: np.ndarray, counts: np.ndarray, chunk: int | None) -> Message:
        prompts = np.split(ids, np.cumsum(counts)[:-1])
        logits = self._session.prefill(prompts, self._states[state], chunk)  # type: ignore[arg-type]
        return self._result(state, logits=logits)

    def _decode(self, state: int, tokens: np.ndarray) -> Message:
        return self._result(state, logits=self._session.decode(tokens, self._states[state]))

    def _forward(self, state: int, ids: np.ndarray, new: np.ndarray, positions: Any, taps: bool) -> Message:
        result = self._session.forward(ids, new, self._states[state], positions, taps)
        return self._result(state, logits=result.logits, taps=result.taps)

    def _result(self, state: int, **results: Any) -> Message:
        """Every rank has the logits; one sends them."""
        return self._about(state) | (results if self._rank == 0 else {})

    def _about(self, state: int) -> Message:
        held = self._states[state]
        return {"lengths": np.array(held.lengths), "capacity": held.capacity, "nbytes": held.nbytes}

    def _part(self, state: int, what: str, layer: int) -> Message:
        return {"part": getattr(self._states[state], what)(layer)}

    def _read_row(self, state: int, row: int, start: int) -> Message:
        found = self._states[state].read_row(row, start)
        return {"length": found.length, "recurrent": found.recurrent, "key": found.key, "value": found.value}

    def _write_row(self, state: int, row: int, length: int, recurrent: dict, key: dict, value: dict) -> Message:
        from engines.interface import RowSnapshot

        self._states[state].write_row(row, RowSnapshot(length, recurrent, key, value))
        return self._about(state)

    def _clear_row(self, state: int, row: int) -> Message:
        self._states[state].clear_row(row)
        return self._about(state)


if __name__ == "__main__":
    main()
