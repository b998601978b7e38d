"""Feature rows that wait in a state until the tokens whose places they take are computed.

They are kept by row of the batch and by position in its sequence, not by call: so it does not matter in what pieces the tokens come.

Legend: n places of one row, D hidden size of the text model, R rows of one run, T new tokens, m features of one run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.errors import EngineError


@dataclass
class PlacedImages:
    """What waits in one state. `width`: D of the model, or None for an engine without a vision half."""

    width: int | None
    _rows: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the features that wait."""
        return sum(features_nD.nbytes for _, features_nD in self._rows.values())

    def put(self, row: int, positions_n: NDArray[np.int64], features_nD: NDArray[np.float32], length: int) -> None:
        """Let features take the places of tokens that `row`, of `length` tokens so far, gets later; replaces what waits there.

        Raises EngineError unless positions ascend from `length` on, and there is one row of D features for each.
        """
        if self.width is None:
            raise EngineError("this engine has no vision half and takes no images")
        positions_n, features_nD = np.asarray(positions_n, np.int64), np.ascontiguousarray(features_nD, np.float32)
        if positions_n.ndim != 1 or features_nD.shape != (len(positions_n), self.width):
            raise EngineError(
                f"{positions_n.shape} places need features [places, {self.width}], not {list(features_nD.shape)}"
            )
        if len(positions_n) and (positions_n[0] < length or (np.diff(positions_n) < 1).any()):
            raise EngineError(f"places of images must ascend from position {length} on, where the row continues")
        if len(positions_n):
            self._rows[row] = positions_n, features_nD
        else:
            self.drop(row)

    def drop(self, row: int) -> None:
        """Forget what waits for `row`."""
        self._rows.pop(row, None)

    def passed(self, lengths_B: NDArray[np.int64]) -> None:
        """Forget what waited for tokens that rows of these lengths have by now."""
        for row in [row for row, (positions_n, _) in self._rows.items() if positions_n[-1] < lengths_B[row]]:
            del self._rows[row]

    def feeds(
        self, first: int, past_R: NDArray[np.int64], tokens: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The graph's inputs for a run of rows `first` and on: features [m, D], m >= 1, and which of them each token takes [R, T]."""
        assert self.width is not None
        found: list[NDArray[np.float32]] = []
        taken_RT = np.full((len(past_R), tokens), -1, np.int64)
        count = 0
        for index, past in enumerate(past_R):
            if first + index not in self._rows:
                continue
            positions_n, features_nD = self._rows[first + index]
            start, end = np.searchsorted(positions_n, (past, past + tokens))
            if start < end:
                taken_RT[index, positions_n[start:end] - past] = np.arange(count, count + end - start)
                found.append(features_nD[start:end])
                count += int(end - start)
        if not found:
            return np.zeros((1, self.width), np.float32), taken_RT
        return found[0] if len(found) == 1 else np.concatenate(found), taken_RT
