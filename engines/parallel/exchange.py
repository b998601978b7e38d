"""How ranks exchange arrays: MPI, through mpi4py."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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

    def of(self, group: Sequence[int]) -> Exchanger:
        """The same among the ranks of `group` only, to which this rank belongs; all of them make the call. Empty: all ranks."""

    def close(self) -> None:
        """Leave in good order; all ranks do."""


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
        self._groups: dict[tuple[int, ...], MpiExchanger] = {}
        self.rank: int = self._comm.Get_rank()
        self.ranks: int = self._comm.Get_size()

    def of(self, group: Sequence[int]) -> MpiExchanger:
        ranks = tuple(group)
        if not ranks:
            return self
        if self.rank not in ranks:
            raise EngineError(f"rank {self.rank} does not belong to the group {list(ranks)}; rebuild the engine")
        if ranks not in self._groups:
            mine = copy.copy(self)
            mine._comm = self._comm.Create_group(self._comm.Get_group().Incl(ranks))
            mine.rank, mine.ranks = mine._comm.Get_rank(), mine._comm.Get_size()
            self._groups[ranks] = mine
        return self._groups[ranks]

    def all_reduce(self, array: np.ndarray) -> None:
        self._comm.Allreduce(self._in_place, array)

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        self._comm.Allgather(array, out)

    def close(self) -> None:
        """Leave in good order; all ranks do."""
        from mpi4py import MPI

        MPI.Finalize()

    def share(self, content: bytes) -> bytes:
        """Rank 0's bytes, on every rank; all give as many."""
        shared = np.frombuffer(content, np.uint8).copy()
        self._comm.Bcast(shared, 0)
        return shared.tobytes()
