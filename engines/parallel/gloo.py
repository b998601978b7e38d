"""How ranks that torchrun started exchange arrays: torch.distributed's gloo, over the loopback. A collective takes about a millisecond."""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.errors import ENVIRONMENT, EngineError

MEET_S = 60.0  # until all ranks have found each other


class GlooExchanger:
    """All processes of the run; see `engines.parallel.exchange.Exchanger`."""

    def __init__(self) -> None:
        try:
            import torch.distributed as distributed
        except ImportError as error:
            raise EngineError(
                f"ranks that torchrun started need torch ({error}); use mpirun instead", exit_code=ENVIRONMENT
            ) from error
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=MEET_S))
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"the ranks cannot meet at {place}: {str(error).splitlines()[0]}; if another program uses the port, choose one "
                "with torchrun --master-port",
                exit_code=ENVIRONMENT,
            ) from error
        self._distributed: Any = distributed
        self._group: Any = None
        self.rank: int = distributed.get_rank()
        self.ranks: int = distributed.get_world_size()

    def of(self, group: Sequence[int]) -> GlooExchanger:
        if not group:
            return self
        mine = copy.copy(self)
        mine._group = self._distributed.new_group(list(group), use_local_synchronization=True)
        mine.rank, mine.ranks = list(group).index(self.rank), len(group)
        return mine

    def all_reduce(self, array: np.ndarray) -> None:
        self._distributed.all_reduce(_tensor(array), group=self._group)

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        parts = list(_tensor(out).reshape(self.ranks, -1).unbind())
        self._distributed.all_gather(parts, _tensor(array).reshape(-1), group=self._group)

    def share(self, content: bytes) -> bytes:
        """Rank 0's bytes, on every rank; all give as many."""
        shared = np.frombuffer(content, np.uint8).copy()
        self._distributed.broadcast(_tensor(shared), 0)
        return shared.tobytes()

    def close(self) -> None:
        """Leave in good order; all ranks do."""
        self._distributed.destroy_process_group()


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)
