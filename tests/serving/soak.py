"""Everything at once, for as long as asked, on the real server: no wrong token, no leak, no hang, a reason for every refusal.

    python tests/serving/soak.py --minutes 10 --json benchmarks/results/serve_soak.json

Starts `mxcompile serve` on an engine of preset tiny, and lets clients of all protocols loose on it: streamed and plain, greedy and
drawn, sessions, shared prefixes, bursts beyond the queue; some break their connections off, some send what cannot be answered. Every
answer is compared with the engine's own, token for token. Then the same on an engine of two ranks, of which one is killed every few
seconds. Ends with 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from served import Served, launch
from soak_actions import MAX_QUEUE, Clients, Tally
from soak_clients import MAX_WAIT_S, GrpcClients, triton_http
from soak_questions import Questions, ask
from soak_watch import LEAK_BYTES, Killer, Memory, ready

CACHE_MIB = 16  # so small that prefixes and sessions leave it all the time
LIMITS = {"max_batch_size": 8, "max_seq_len": 320, "prefill_chunk": 32, "threads": 2}
RANKS = {"max_batch_size": 4, "tp_size": 2}
VICTIMS_EVERY_S = 20.0


def soak(
    engine: Path,
    venv: Path,
    folder: Path,
    questions: Questions,
    seconds: float,
    clients: int,
    *,
    kill_every_s: float = 0,
) -> dict[str, Any]:
    """One phase. `folder`: for logs and states. `kill_every_s`: above 0, ranks are killed about this often.

    Returns what happened; its "wrong" is empty when all went well.
    """
    options = ("--max-queue", MAX_QUEUE, "--cache-mib", CACHE_MIB, "--state-dir", folder / "states")
    options += ("--max-wait", MAX_WAIT_S)
    server = launch(engine, folder / "server.log", venv, *options)
    tally = Tally()
    try:
        grpc = GrpcClients(venv / "bin" / "python", server.grpc)
        values = _run(server, venv, grpc, questions, tally, seconds, clients, kill_every_s)
        grpc.close()
        _at_rest(server, questions, tally)
        if (memory := values.pop("watched")) is not None:
            tally.wrong += memory.faults()
    finally:
        status = server.stop()
    if status != 0:
        tally.fault(f"the server ended with {status}; its log: {server.log.read_text()[-2000:]}")
    left = [line for line in server.log.read_text().splitlines() if "Traceback" in line or "FATAL" in line]
    tally.wrong += [f"in the server's log: {line}" for line in left]
    counts = dict(sorted(tally.counts.items()))
    right = sum(count for what, count in counts.items() if what.startswith("right"))
    return {
        "right_answers": right,
        "happened": counts,
        **values,
        "slowest_s": round(tally.slowest_s, 2),
        "wrong": tally.wrong,
    }


def _run(
    server: Served,
    venv: Path,
    grpc: GrpcClients,
    questions: Questions,
    tally: Tally,
    seconds: float,
    clients: int,
    kill_every_s: float,
) -> dict[str, Any]:
    end = time.monotonic() + seconds
    many = Clients(server, grpc, questions, tally, may_fail=kill_every_s > 0)
    threads = [threading.Thread(target=many.run, args=(seed, end)) for seed in range(clients)]
    threads.append(threading.Thread(target=_victims, args=(server, venv, end)))
    killer = Killer(server, tally.wrong)
    if kill_every_s:
        threads.append(threading.Thread(target=killer.run, args=(0, end, kill_every_s)))
    threads.append(threading.Thread(target=_tell, args=(tally, end)))
    memory = Memory(server, lambda: sum(tally.counts.values())) if not kill_every_s else None
    if kill_every_s:
        _survive(server, killer, questions, tally)
    for thread in threads:
        thread.start()
    if memory is not None:
        with memory:
            _join(threads, tally)
        return {"memory": memory.report(), "watched": memory}
    _join(threads, tally)
    return {"killed": killer.killed, "not_ready_s": killer.outages_s, "watched": None}


def _join(threads: list[threading.Thread], tally: Tally) -> None:
    for thread in threads:
        thread.join()


def _survive(server: Served, killer: Killer, questions: Questions, tally: Tally) -> None:
    """A rank is killed while nobody asks anything: it must be noticed all the same, and a session at rest must go on."""
    first, second, *_ = questions.conversations[0]
    session = {"session_id": "survivor"}
    begun = triton_http(server, first.body | session | {"session_start": True}, stream=False)
    killer.kill("rank", random.Random(0))
    went_on = triton_http(server, second.body | session, stream=False)
    for reply, turn in ((begun, first), (went_on, second)):
        if reply.tokens != turn.answer.tokens:
            tally.fault(f"a session beside a killed rank: {reply} instead of {turn.answer.tokens}")


def _victims(server: Served, venv: Path, end: float) -> None:
    """Every now and then, a process with several gRPC streams is killed in the middle of them."""
    body = {"input_ids": [7], "max_tokens": 300, "end_id": -1, "stream": True}
    while time.monotonic() < end:
        victim = GrpcClients(venv / "bin" / "python", server.grpc)
        asking = [threading.Thread(target=_ignore, args=(victim, body)) for _ in range(3)]
        for thread in asking:
            thread.start()
        time.sleep(3)  # until it has begun
        victim.kill()
        for thread in asking:
            thread.join()
        time.sleep(max(0.0, min(VICTIMS_EVERY_S, end - time.monotonic())))


def _ignore(victim: GrpcClients, body: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):  # it is killed
        victim.ask(body)


def _at_rest(server: Served, questions: Questions, tally: Tally) -> None:
    """Once the clients are gone: nothing runs or waits, and the next answer is right."""
    try:
        server.wait_idle()
    except AssertionError:
        tally.fault("slots or queue are not empty a minute after the last client left")
    question = questions.single[0]
    reply = triton_http(server, question.body, stream=True)
    if reply.error is not None or reply.tokens != question.answer.tokens:
        tally.fault(f"at rest: {reply} instead of {question.answer.tokens}")
    if not ready(server):
        tally.fault("not ready at rest")


def _tell(tally: Tally, end: float) -> None:
    """Progress, every half minute."""
    told = time.monotonic()
    while (now := time.monotonic()) < end:
        time.sleep(min(1.0, max(0.01, end - now)))
        if time.monotonic() - told > 30:
            told = time.monotonic()
            print(
                f"{end - told:.0f} s to go: {sum(tally.counts.values())} done, {len(tally.wrong)} wrong",
                file=sys.stderr,
            )


def engines(folder: Path) -> tuple[Path, Path]:
    """Engines of preset tiny in `folder`: of one rank, and of two."""
    from mxcompile.building import build
    from mxcompile.checkpoints import create_checkpoint

    create_checkpoint("tiny", folder / "checkpoint", seed=1)
    build(folder / "checkpoint", folder / "one", **LIMITS)
    build(folder / "checkpoint", folder / "two", **(LIMITS | RANKS))
    return folder / "one", folder / "two"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of the first phase; the second takes a fifth of it"
    )
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--kill-every", type=float, default=12.0, help="seconds between two kills in the second phase")
    parser.add_argument("--triton-venv", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from mxcompile.loading import load
    from mxcompile.serving.triton.environment import default_folder, install

    venv = arguments.triton_venv or default_folder()
    install(venv)
    with tempfile.TemporaryDirectory(prefix="mxcompile-soak-") as name:
        folder = Path(name)
        one, two = engines(folder)
        questions = ask(load(one, threads=1), arguments.questions, arguments.questions // 4, seed=0)
        first, second = folder / "first", folder / "second"
        first.mkdir()
        second.mkdir()
        seconds = arguments.minutes * 60
        phases = {
            "one_rank": soak(one, venv, first, questions, seconds, arguments.clients),
            "two_ranks": soak(
                two,
                venv,
                second,
                questions,
                seconds / 5,
                max(2, arguments.clients // 3),
                kill_every_s=arguments.kill_every,
            ),
        }
    values = {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")} | {"triton": "2.51.0"},
        "settings": {
            "minutes": arguments.minutes,
            "clients": arguments.clients,
            "max_queue": MAX_QUEUE,
            "cache_mib": CACHE_MIB,
            "questions": len(questions.single),
            "conversations": len(questions.conversations),
            "left_out_as_ties": questions.unsteady,
            "leak_limit_bytes_per_request": LEAK_BYTES,
        },
        **phases,
    }
    text = json.dumps(values, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 1 if any(phase["wrong"] for phase in phases.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
