"""How ranks exchange arrays: MPI, through mpi4py."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from engines.errors import ENVIRONMENT, EngineError


class Exchanger(Protocol):
    """One rank's side of the collectives; every rank calls the same ones in the same order."""

    rank: int
    ranks: int

    def all_reduce(self, array: np.ndarray) -> None:
        """Replace `array` (float32, contiguous) by the sum over all ranks."""

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` with the arrays of all ranks, one behind the other."""


class MpiExchanger:
    """All processes that the MPI launcher started. Importing mpi4py here initialises MPI."""

    def __init__(self) -> None:
        try:
            import mpi4py

            mpi4py.rc.thread_level = "funneled"  # one thread calls MPI
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise EngineError(
                f"running on several ranks needs MPI ({error}); install it with: pip install 'mxcompile[mpi]'",
                exit_code=ENVIRONMENT,
            ) from error
        self._comm: Any = MPI.COMM_WORLD
        self._in_place: Any = MPI.IN_PLACE
        self.rank: int = self._comm.Get_rank()
        self.ranks: int = self._comm.Get_size()

    def all_reduce(self, array: np.ndarray) -> None:
        self._comm.Allreduce(self._in_place, array)

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        self._comm.Allgather(array, out)
