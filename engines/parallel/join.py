"""Joining ranks that somebody else has started: `mpirun -n 4 mxcompile run ...`, `torchrun --nproc-per-node 4 -m mxcompile run ...`.

Every process runs the same command up to the point where it loads the engine. There rank 0 goes on as the session, with a process
of its own beside it that computes rank 0's part; the others become ranks and end with it. They find rank 0's socket in a private folder
whose name all work out from the name of the job. Ranks started by mpirun exchange over MPI; those of torchrun over gloo, which is slower.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path

from engines.errors import ENVIRONMENT, USAGE, EngineError

POLL_S = 0.05
LAST_WORDS_S = 30.0  # or until the launcher ends this rank, because rank 0 has told and ended


@dataclass(frozen=True)
class Launch:
    """What the launcher of this process says. `exchange`: mpi or gloo. `local`: ranks on this machine, where it is known."""

    launcher: str
    exchange: str
    rank: int
    ranks: int
    local: int | None
    job: str  # the same for all ranks of one start, and no other

    @property
    def folder(self) -> Path:
        """Where the ranks of this start meet; only its owner may enter."""
        name = hashlib.sha256(self.job.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"mxcompile-{os.getuid()}-{name}"

    def check(self, ranks: int) -> None:
        """The engine has as many ranks as were started, all here. Rank 0 raises EngineError for all; the others end in silence."""
        problem = ""
        if self.ranks != ranks:
            problem = (
                f"{self.launcher} started {self.ranks} ranks, the engine has {ranks}; start {ranks}, or run it without"
            )
            problem += f" {self.launcher}: mxcompile starts the ranks itself"
        elif self.local not in (None, self.ranks):
            problem = f"{self.local} of the {self.ranks} ranks run on this machine; engines run on one machine"
        if problem and self.rank:
            time.sleep(LAST_WORDS_S)  # a launcher ends all ranks when one has ended: rank 0 must have told by then
            raise SystemExit(USAGE)
        if problem:
            raise EngineError(problem)

    def make_folder(self) -> Path:
        """For rank 0. Removes what a killed run of the same name left."""
        folder = self.folder
        try:
            if folder.exists() and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise EngineError(f"{folder}: cannot be made ({error.strerror})", exit_code=ENVIRONMENT) from error
        return folder

    def connect(self, socket: str, limit: float) -> Connection:
        """For the other ranks: a connection to rank 0's session as soon as it listens. EngineError after `limit` seconds."""
        until = time.monotonic() + limit
        while True:
            try:
                found = self.folder.stat()
                if found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077:
                    return Client(str(self.folder / socket))
            except (FileNotFoundError, ConnectionRefusedError):
                pass
            if time.monotonic() > until:
                raise EngineError(
                    f"rank {self.rank}: rank 0 did not load the engine within {limit:.0f} s", exit_code=ENVIRONMENT
                )
            time.sleep(POLL_S)


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """How this process was started as one of several ranks; None when it was not."""

    def number(*names: str) -> int | None:
        found = next((environment[name] for name in names if name in environment), "")
        return int(found) if found.isdigit() else None

    for launcher, exchange, rank, ranks, local, job in (
        (
            "mpirun",
            "mpi",
            number("OMPI_COMM_WORLD_RANK", "PMI_RANK"),
            number("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
            number("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
            environment.get("PMIX_NAMESPACE"),
        ),
        (
            "torchrun",
            "gloo",
            number("RANK") if "MASTER_PORT" in environment else None,
            number("WORLD_SIZE"),
            number("LOCAL_WORLD_SIZE"),
            " ".join(environment.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")),
        ),
    ):
        if rank is not None and ranks is not None and ranks > 1:
            return Launch(launcher, exchange, rank, ranks, local, f"{launcher} {job or os.getppid()}")
    return None
