"""One rank's session where ranks share the tokens of a prefill chunk.

Several tokens at once are padded to a multiple of the ranks that share them; every rank is given all of them, computes its segment, and
ends with the states of all. Single tokens are computed by every rank alike, without an exchange (or with those of a shared model
only), and leave the same states everywhere, bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from engines.interface import StepResult
from engines.onnxruntime.state import OrtState
from engines.parallel.rank_session import RankSession
from engines.plan import Run


class SegmentSession(RankSession):
    """What one rank computes. Every rank must make the same calls in the same order.

    Shape suffixes: B batch rows, T new tokens, P positions with logits, R rows of one run, C tokens of a segment, N ranks.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        mapping, rank = self._config.mapping, self._exchanger.rank
        # Tapped values come from the graph that is split, whatever the number of tokens.
        self._tapped_graph = self._graph.with_name(f"rank{rank}.prefill.onnx")
        group = range(rank % mapping.tp_size, mapping.ranks, mapping.tp_size)
        self._sharing = self._exchanger.of(list(group))

    def _fastest(self, rows: int, tokens: int) -> Any:
        return self._session if tokens == 1 else self._prefill_session

    def _step(
        self,
        run: Run,
        ids_BT: np.ndarray,
        new_B: np.ndarray,
        wanted_RP: np.ndarray,
        state: OrtState,
        taps: bool = False,
    ) -> StepResult:
        if run.tokens == 1 and not taps:
            return super()._step(run, ids_BT, new_B, wanted_RP, state)
        ranks = self._sharing.ranks
        padded = dataclasses.replace(run, tokens=-(-run.tokens // ranks) * ranks)
        ids_BT = np.pad(ids_BT[:, : run.tokens], ((0, 0), (0, padded.tokens - run.tokens)))
        result = super()._step(padded, ids_BT, new_B, wanted_RP, state, taps)
        joined = {name: self._joined(value)[:, : run.tokens] for name, value in result.taps.items()}
        return StepResult(result.logits, joined)

    def _joined(self, part_RC: np.ndarray) -> np.ndarray:
        """All segments of a tapped value [R, C, ...], one behind the other: [R, T, ...]."""
        part_RC = np.ascontiguousarray(part_RC)
        every_NRC = np.empty((self._sharing.ranks, *part_RC.shape), part_RC.dtype)
        self._sharing.all_gather(part_RC, every_NRC)
        return np.moveaxis(every_NRC, 0, 1).reshape(part_RC.shape[0], -1, *part_RC.shape[2:])
