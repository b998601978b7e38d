"""One rank as a process: `python -m engines.parallel.worker FOLDER OPTIONS`, started by MPI's launcher; or one that joins (`join`).

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
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from engines.parallel.message import Message, decode, encode

if TYPE_CHECKING:
    from engines.onnxruntime.state import OrtState
    from engines.parallel.exchange import MpiExchanger
    from engines.parallel.gloo import GlooExchanger
    from engines.parallel.join import Launch
    from engines.parallel.rank_session import RankSession
    from engines.tensorrt.session import TrtSession
    from engines.tensorrt.state import TrtState

LAST_WORDS_S = 30.0
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
SOCKET, TICKS, OPTIONS = "socket", "ticks", "options.json"


def log_name(rank: int) -> str:
    """File for what a rank writes on stdout and stderr, in the folder that it shares with the session."""
    return f"rank{rank}.log"


def main() -> None:
    """Serve until told to stop, or until the session is gone."""
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)
    try:
        commands = Client(str(folder / SOCKET))
    except (ConnectionRefusedError, FileNotFoundError):  # the session was killed before this process had started
        shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit("the session that started this rank is gone") from None
    _serve(rank, folder, options, commands)


def join(launch: Launch, engine: Path, limit: float) -> NoReturn:
    """Become a rank of the session that rank 0 of `launch` makes of the engine directory `engine`, and end with it."""
    os.environ |= {"OMPI_MCA_mpi_yield_when_idle": "1"}  # before MPI is initialised; see `engines.parallel.launch`
    commands = launch.connect(SOCKET, limit)
    options = json.loads((launch.folder / OPTIONS).read_text())
    _serve(launch.rank, launch.folder, options | {"mine": str(engine)}, commands)


def _serve(rank: int, folder: Path, options: dict[str, Any], commands: Connection) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the session's to handle
    log = os.open(folder / log_name(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    commands.send_bytes(encode({"rank": rank, "pid": os.getpid()}))
    lifeline: Connection = Client(str(folder / SOCKET))
    lifeline.send_bytes(encode({"lifeline": rank}))
    threading.Thread(target=_watch, args=(lifeline, folder), daemon=True).start()
    try:
        exchanger = _exchanger(options)
        server = _Server(_load(rank, folder, options, exchanger), rank)
        commands.send_bytes(encode({"ready": True}))
        while server.answer(commands):
            pass
        if options["joined"] is not None:
            exchanger.close()  # a launcher takes a rank that ends without for one that died
    except EOFError:  # the session is gone
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        _say(commands, error)
        if options["joined"] is not None:
            time.sleep(LAST_WORDS_S)  # or until the session ends: a launcher would end it before it could tell
        os._exit(1)
    os._exit(0)  # where the ranks are the session's own, without MPI's finalize, which would wait for the others


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


def _exchanger(options: dict[str, Any]) -> MpiExchanger | GlooExchanger:
    if options["joined"] == "gloo":
        from engines.parallel.gloo import GlooExchanger

        return GlooExchanger()
    from engines.parallel.exchange import MpiExchanger

    return MpiExchanger()


def _load(
    rank: int, folder: Path, options: dict[str, Any], exchanger: MpiExchanger | GlooExchanger
) -> RankSession | TrtSession:
    from engines.directory import read_config
    from engines.errors import EngineError

    engine = Path(options["engine"])
    if options.get("mine", options["engine"]) != options["engine"]:
        raise EngineError(
            f"was started with the engine {options['mine']}, rank 0 with {engine}; give all ranks the same"
        )
    config = read_config(engine)
    if config.options.get("parallel_build") != options["build"]:
        raise EngineError(f"{engine}: rank {rank} finds another engine there than the session that started it")
    if (exchanger.rank, exchanger.ranks) != (rank, config.mapping.ranks):
        raise EngineError(
            f"the launcher says rank {exchanger.rank} of {exchanger.ranks}, expected {rank} of {config.mapping.ranks}"
        )
    moved = None if options["checkpoint"] is None else Path(options["checkpoint"])
    if config.target != "onnxruntime":
        from engines.tensorrt.runtime import open_rank

        return open_rank(engine, config, exchanger=exchanger, moved=moved, tick=_ticker(folder / TICKS, rank))
    from engines.parallel.rank_session import RankSession, share_threads
    from engines.parallel.segment_session import SegmentSession
    from engines.weights import map_weights

    share_threads(options["threads"])
    files = next(files for files in config.ranks if files.rank == rank)
    assert files.weights is not None
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

    def __init__(self, session: RankSession | TrtSession, rank: int) -> None:
        self._session, self._rank = session, rank
        self._states: dict[int, OrtState | TrtState] = {}

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
