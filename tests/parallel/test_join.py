"""Ranks that `mpirun` or `torchrun` has started join one session: real launchers, real processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from engines_on_ranks import Workshop

from engines.errors import EngineError
from engines.parallel.join import Launch, launched
from engines.parallel.launch import _environment, find_launcher

mpi4py = pytest.importorskip("mpi4py", reason="running several ranks needs mpi4py and an MPI launcher")

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300
RUN = ("-m", "mxcompile", "run")
PROMPT = ("--tokens", "1,2,3", "--max-new-tokens", "12", "--threads", "1")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("joined"))


@pytest.fixture(scope="module")
def answer(workshop: Workshop) -> str:
    """What the engine of one rank prints."""
    done = run([sys.executable, *RUN, str(workshop.engine(1, 1, 1)), *PROMPT])
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    return os.environ | _environment(1) | {"PYTHONPATH": str(ROOT)} | more


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=environment(**more), check=False
    )


def mpirun(ranks: int, *arguments: str) -> list[str]:
    return [*find_launcher(), "-n", str(ranks), sys.executable, *RUN, *arguments]


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_mpirun_starts_the_ranks(workshop: Workshop, answer: str) -> None:
    done = run(mpirun(2, str(workshop.engine(2, 1, 2)), *PROMPT))
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer  # once, by rank 0
    assert done.stderr.count("12 tokens at") == 1


@pytest.mark.slow
def test_torchrun_starts_the_ranks(workshop: Workshop, answer: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*command, *RUN, str(workshop.engine(2, 1, 2)), *PROMPT])
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer


@pytest.mark.parametrize(("started", "sizes"), [(3, (2, 1, 2)), (2, (1, 1, 1))])
def test_another_number_of_ranks_is_refused(workshop: Workshop, started: int, sizes: tuple[int, int, int]) -> None:
    done = run(mpirun(started, str(workshop.engine(*sizes)), *PROMPT))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = errors(done)
    assert f"mpirun started {started} ranks, the engine has {sizes[0]}" in line


def test_ranks_with_another_engine_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    engine = workshop.engine(2, 1, 2)
    other = shutil.copytree(engine, tmp_path / "other")
    command = mpirun(1, str(engine), *PROMPT)
    done = run([*command, ":", "-n", "1", sys.executable, *RUN, str(other), *PROMPT])
    assert done.returncode != 0
    (line,) = errors(done)
    assert "rank 1 was started with the engine" in line
    assert str(other) in line


def test_a_rank_killed_while_tokens_come_ends_the_run(workshop: Workshop) -> None:
    arguments = ("--tokens", "1,2,3", "--max-new-tokens", "300", "--threads", "1")
    process = subprocess.Popen(
        mpirun(2, str(workshop.engine(2, 1, 2)), *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    # The rank itself, not rank 0's session nor the process that computes rank 0's part.
    while not (found := [p for p in family(process) if is_rank(p, "1")]):
        assert process.poll() is None
        time.sleep(0.05)
    assert process.stdout.read(2)  # the first token
    found[0].kill()
    started = family(process) + found
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert "rank 1" in err
    _, alive = psutil.wait_procs(started, timeout=LIMIT_S)
    assert alive == []


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes under this one, none if it has ended."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def is_rank(process: psutil.Process, rank: str) -> bool:
    """Whether it is this rank of a command that mpirun has started."""
    with contextlib.suppress(psutil.Error):  # just ended, or just begun
        return RUN[1] in process.cmdline() and process.environ().get("OMPI_COMM_WORLD_RANK") == rank
    return False


def test_ctrl_c_ends_the_command_and_its_ranks(workshop: Workshop) -> None:
    """Without a launcher: the command has started the ranks itself."""
    arguments = ("--tokens", "1,2,3", "--max-new-tokens", "300", "--threads", "1")
    process = subprocess.Popen(
        [sys.executable, *RUN, str(workshop.engine(2, 1, 2)), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stdout.read(1)  # the first token
    process.send_signal(signal.SIGSTOP)  # tokens are not to come to their end now
    ranks = family(process)
    assert len(ranks) >= 2
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert err == "error: interrupted\n"
    _, alive = psutil.wait_procs(ranks, timeout=LIMIT_S)
    assert alive == []


def test_a_port_in_use_is_named() -> None:
    """Ranks started by hand with torchrun's variables; the port belongs to somebody else."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = "from engines.parallel.gloo import GlooExchanger; GlooExchanger()"
        facts = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = run([sys.executable, "-c", code], **facts)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"the ranks cannot meet at 127.0.0.1:{port}" in last
    assert "torchrun --master-port" in last


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
                "PMIX_NAMESPACE": "a@1",
            },
            Launch("mpirun", "mpi", 3, 4, 4, "mpirun a@1"),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch("mpirun", "mpi", 1, 2, None, f"mpirun {os.getppid()}")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "5"},
            Launch("torchrun", "gloo", 1, 2, 1, "torchrun  h 5"),
        ),
    ],
)
def test_what_launchers_say(variables: dict[str, str], expected: Launch | None) -> None:
    assert launched(variables) == expected


def test_several_machines_are_refused() -> None:
    with pytest.raises(EngineError, match="1 of the 2 ranks run on this machine"):
        Launch("torchrun", "gloo", 0, 2, 1, "job").check(2)


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return Launch("mpirun", "mpi", 1, 2, 2, "job")


def test_a_rank_waits_only_so_long_for_rank_0(launch: Launch) -> None:
    with pytest.raises(EngineError, match="rank 0 did not load the engine within 1 s") as caught:
        launch.connect("socket", 1)
    assert caught.value.exit_code == 3


def test_what_a_killed_run_left_is_removed(launch: Launch) -> None:
    (launch.make_folder() / "socket").touch()
    with pytest.raises(EngineError, match="did not load"):  # nobody listens there
        launch.connect("socket", 0)
    folder = launch.make_folder()
    assert list(folder.iterdir()) == []
    assert folder.stat().st_mode & 0o777 == 0o700
