"""The supervision of ranks, with toy ranks that do as they are told: who is named, and what is told, whatever is noticed first."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from engines.errors import EngineError
from engines.parallel import launch
from engines.parallel.join import Launch
from engines.parallel.launch import RankProcesses
from engines.parallel.worker import OPTIONS, SOCKET

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0

# Starts two toy ranks, and ends both when one has ended, in Open MPI's words and with its delay. A call's "who" does what "how" says.
LAUNCHER = """
import os, signal, subprocess, sys, time
command = [sys.executable, {ranks!r}, sys.argv[-2]]
ranks = [subprocess.Popen(command, env=os.environ | {{"PMI_RANK": str(rank)}}) for rank in range(2)]
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.01)
status = [rank.returncode for rank in ranks]
for rank in ranks:
    rank.kill()
    rank.wait()
time.sleep(0.3)  # what it says comes long after the ranks' sockets have closed
bad = next((rank for rank in range(2) if status[rank]), None)
if {words} and bad is not None:
    if status[bad] < 0:
        print(f"prterun noticed that process rank {{bad}} with PID 1 on node n exited on\\nsignal {{-status[bad]}} (Killed).")
    else:
        print(f"The first process to do so was:\\n\\n   Process name: [prterun-n-1@1,{{bad}}]\\n   Exit code:    {{status[bad]}}")
"""
RANK = """
import os, signal, sys, time
from multiprocessing.connection import Client
from pathlib import Path
from engines.parallel.message import decode, encode
rank, socket = int(os.environ["PMI_RANK"]), str(Path(sys.argv[1]) / "socket")
commands = Client(socket)
time.sleep(float(os.environ.get("SLOW", 0)) * rank)
commands.send_bytes(encode({"rank": rank, "pid": os.getpid()}))
lifeline = Client(socket)
lifeline.send_bytes(encode({"lifeline": rank}))
commands.send_bytes(encode({"ready": True}))
while True:
    message = decode(commands.recv_bytes())
    if message["do"] == "stop":
        break
    how = message["how"] if message.get("who") in (rank, "all") else message.get("else", "answer")
    if how == "fatal":
        commands.send_bytes(encode({"fatal": "the disk is full", "exit_code": 2}))
        sys.exit(1)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wait":
        time.sleep(600)
    if how == "late":
        time.sleep(2.5)
    commands.send_bytes(encode({"error": "too long"} if how in ("refuse", "late") else {"rank": rank}))
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """start(words=..., variable=...): two toy ranks, under a launcher that says which one was the first to end, or does not."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started: list[RankProcesses] = []

    def make(words: bool = True, stall_limit: float = LIMIT_S, **variables: object) -> RankProcesses:
        (tmp_path / "rank.py").write_text(RANK)
        (tmp_path / "launcher.py").write_text(LAUNCHER.format(ranks=str(tmp_path / "rank.py"), words=words))
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        command = [sys.executable, str(tmp_path / "launcher.py")]
        found = RankProcesses(2, {}, threads=1, start_limit=LIMIT_S, stall_limit=stall_limit, launcher=command)
        started.append(found)
        return found

    yield make
    for one in started:
        one.close()


def all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is so late that everything has happened when it looks: all sockets are ready, rank 0's first."""

    def late(connections, timeout=None):  # type: ignore[no-untyped-def]
        end = time.monotonic() + LIMIT_S
        while len(wait(connections, 0)) < len(connections):
            assert time.monotonic() < end
            time.sleep(0.01)
        return connections

    monkeypatch.setattr(launch, "wait", late)


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_what_a_rank_said_is_told_and_not_that_the_others_ended_with_it(start, monkeypatch, words, late) -> None:  # type: ignore[no-untyped-def]
    ranks = start(words)
    if late:
        all_at_once(monkeypatch)
    with pytest.raises(EngineError, match=r"^rank 1 the disk is full$") as caught:
        ranks.ask({"do": "it", "who": 1, "how": "fatal", "else": "wait"})
    assert caught.value.exit_code == 2
    with pytest.raises(EngineError, match="the disk is full"):  # and it stays lost
        ranks.ask({"do": "it"})


@pytest.mark.parametrize("late", [True, False])
def test_the_rank_that_was_killed_is_named_and_not_those_that_ended_with_it(start, monkeypatch, late) -> None:  # type: ignore[no-untyped-def]
    ranks = start()
    if late:
        all_at_once(monkeypatch)
    with pytest.raises(EngineError, match=r"^rank 1 ended unexpectedly; last words: signal 9 \(Killed\)") as caught:
        ranks.ask({"do": "it", "who": 1, "how": "kill", "else": "wait"})
    assert caught.value.exit_code == 3


def test_a_rank_killed_at_rest_is_named(start) -> None:  # type: ignore[no-untyped-def]
    ranks = start()
    os.kill(ranks._pids[1], 9)

    def look() -> None:
        for _ in itertools.count():
            ranks.check_alive()

    with pytest.raises(EngineError, match=r"^rank 1 ended unexpectedly; last words: signal 9"):
        look()


@pytest.mark.parametrize("how", ["answer", "refuse"])
def test_ranks_that_answer_alike_live_on(start, how) -> None:  # type: ignore[no-untyped-def]
    ranks = start()
    with pytest.raises(EngineError, match=r"^too long$") if how == "refuse" else contextlib.nullcontext():
        assert ranks.ask({"do": "it", "who": "all", "how": how}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.ask({"do": "it"}) == [{"rank": 0}, {"rank": 1}]


def test_a_rank_that_is_kept_waiting_by_the_machine_is_not_lost(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """It says hello late, and refuses seconds after the others: a busy machine, not a fault."""
    ranks = start(SLOW=2.5)
    with pytest.raises(EngineError, match=r"^too long$"):
        ranks.ask({"do": "it", "who": 1, "how": "late", "else": "refuse"})
    assert ranks.ask({"do": "it"}) == [{"rank": 0}, {"rank": 1}]


def test_ranks_that_disagree_are_ended(start, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(launch, "PATIENCE_S", 0.5)
    with pytest.raises(EngineError, match=r"^the ranks disagree about a call: too long"):
        start().ask({"do": "it", "who": 1, "how": "refuse"})
    with pytest.raises(EngineError, match=r"^rank 1 does not answer where others refused a call"):
        start().ask({"do": "it", "who": 0, "how": "refuse", "else": "wait"})


def test_a_rank_that_starts_when_the_session_is_gone_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / OPTIONS).write_text("{}")
    with socket.socket(socket.AF_UNIX) as left:  # a killed session does not remove it
        left.bind(str(folder / SOCKET))
        left.listen()
    command = [sys.executable, "-m", "engines.parallel.worker", str(folder), "{}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False)
    assert done.returncode == 1
    assert done.stderr == "the session that started this rank is gone\n"
    assert not folder.exists()


def test_ranks_of_another_launcher_end_only_when_the_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a launcher ends this process, too, as soon as a rank ends."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "rank.py").write_text(RANK)
    joined = Launch("mpirun", "mpi", 0, 2, 2, "job")
    others: list[subprocess.Popen[bytes]] = []

    def started(rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(tmp_path / "rank.py"), str(joined.folder)]
        return subprocess.Popen(command, env=os.environ | {"PMI_RANK": str(rank)})

    def start(ranks: RankProcesses, *settings: object) -> None:
        ranks._process = started(0)
        others.append(started(1))

    monkeypatch.setattr(RankProcesses, "_start", start)
    ranks = RankProcesses(2, {}, threads=1, start_limit=LIMIT_S, stall_limit=LIMIT_S, joined=joined)
    with pytest.raises(EngineError, match="the disk is full"):
        ranks.ask({"do": "it", "who": 0, "how": "fatal", "else": "wait"})
    assert others[0].poll() is None
    with pytest.raises(EngineError, match="the disk is full"):  # and it stays lost
        ranks.ask({"do": "it"})
    ranks.close(orderly=False)  # as at the end of this process
    assert others[0].wait(LIMIT_S) == -9
    assert not joined.folder.exists()
