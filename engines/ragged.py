"""What sessions of all runtimes share: ragged rows are checked, cut into runs that a runtime takes, and put together again.

Shape suffixes: B batch rows, T new tokens, P positions with logits, N vocabulary, R rows of one run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines import checks
from engines.config import EngineConfig
from engines.errors import EngineError
from engines.interface import Positions, State, StepResult
from engines.plan import Run, cut_columns, plan


class RaggedSession(ABC):
    """`prefill` and `forward` of `engines.interface.Session` over a runtime's own `_step`."""

    _config: EngineConfig
    _max_step_tokens: int | None = None  # new tokens that one step takes; None: any number
    _max_step_positions = 1  # positions with logits that one step gives, where the tokens are limited

    @abstractmethod
    def _own(self, state: State) -> Any:
        """`state` if this session made it, else EngineError. It must have `reserve` and `lengths`."""

    @abstractmethod
    def _step(
        self, run: Run, ids_BT: np.ndarray, new_B: np.ndarray, wanted_RP: np.ndarray, state: Any, taps: bool = False
    ) -> StepResult:
        """One run over rows of one length class; logits [R, P, N] of `wanted_RP`; advances the state."""

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def max_seq_len(self) -> int:
        return self._config.limits.max_seq_len

    @property
    def max_batch_size(self) -> int:
        return self._config.limits.max_batch_size

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    def prefill(self, prompts: Sequence[Sequence[int]], state: State, chunk: int | None = None) -> np.ndarray:
        state = self._own(state)
        chunk = self._config.limits.prefill_chunk if chunk is None else chunk
        if self._max_step_tokens is not None:
            chunk = min(chunk, self._max_step_tokens)
        if chunk < 1:
            raise EngineError(f"the prefill chunk must be at least 1 token, not {chunk}")
        rows = checks.prompt_rows(prompts, state.batch_size)
        lengths_B = np.array([len(row) for row in rows], np.int64)
        for prompt_ids in rows:
            self._check_ids(prompt_ids)
        self._check_lengths(state, lengths_B)
        self._own(state).reserve(int((state.lengths + lengths_B).max()))
        logits_BN = np.zeros((state.batch_size, self.vocab_size), np.float32)
        for start in range(0, int(lengths_B.max(initial=0)), chunk):
            new_B = np.clip(lengths_B - start, 0, chunk)
            ids_BT = np.zeros((state.batch_size, int(new_B.max())), np.int64)
            for row, prompt in enumerate(rows):
                ids_BT[row, : new_B[row]] = prompt[start : start + chunk]
            ends_B = (new_B > 0) & (lengths_B <= start + chunk)
            for run in plan(new_B, state.lengths):
                ends_R = ends_B[run.first : run.end]
                # Logits cost a product with the whole vocabulary: only rows that end here ask for them.
                wanted_RP = np.maximum(new_B[run.first : run.end, None] - 1, 0)[:, : int(ends_R.any())]
                logits_RPN = self._step(run, ids_BT, new_B, wanted_RP, state).logits
                if ends_R.any():
                    logits_BN[run.first : run.end][ends_R] = logits_RPN[ends_R, 0]
        return logits_BN

    def forward(
        self,
        ids_BT: np.ndarray,
        new_lengths_B: np.ndarray | Sequence[int],
        state: State,
        positions: Positions = "last",
        taps: bool = False,
    ) -> StepResult:
        state = self._own(state)
        ids_BT, new_B = checks.integers(ids_BT), checks.integers(new_lengths_B).astype(np.int64)
        if ids_BT.ndim != 2 or len(ids_BT) != state.batch_size or new_B.shape != (state.batch_size,):
            raise EngineError(
                f"forward takes ids [batch, tokens] and one new length per row; the state has {state.batch_size} rows, "
                f"the ids are {ids_BT.shape} and the new lengths {new_B.shape}"
            )
        tokens = ids_BT.shape[1]
        if new_B.min() < 0 or new_B.max() > tokens:
            raise EngineError(f"new lengths {new_B.tolist()} do not lie within 0 and the {tokens} tokens given")
        valid_BT = np.arange(tokens) < new_B[:, None]
        self._check_ids(ids_BT[valid_BT])
        self._check_lengths(state, new_B)
        ids_BT = np.where(valid_BT, ids_BT, 0).astype(np.int64)
        positions_BP = _positions(positions, new_B, tokens)
        logits_BPN = np.zeros((*positions_BP.shape, self.vocab_size), np.float32)
        outputs: dict[str, np.ndarray] = {}
        for run in plan(new_B, state.lengths):
            here = slice(run.first, run.end)
            # "all" of a shorter run ends with the run
            columns = run.tokens if isinstance(positions, str) and positions == "all" else positions_BP.shape[1]
            new_R1, asked_RP = new_B[here, None], positions_BP[here, :columns]
            meant_RP = (asked_RP >= 0) & (asked_RP < new_R1)
            if self._max_step_tokens is not None:
                if taps and not self._config.taps:
                    raise EngineError(
                        "this engine gives out no inner values; build it with --taps, or compare layers with an onnxruntime engine"
                    )
                logits_RPN, found = self._in_pieces(run, ids_BT, new_B, asked_RP, meant_RP, state, taps)
                logits_BPN[here, :columns] = logits_RPN
                _gather_taps(found, outputs, run, valid_BT)
                continue
            wanted_RP = np.where(meant_RP, asked_RP, 0)
            result = self._step(run, ids_BT, new_B, wanted_RP, state, taps)
            logits_BPN[here, :columns][meant_RP] = result.logits[meant_RP]
            _gather_taps(result.taps, outputs, run, valid_BT)
        return StepResult(logits_BPN, outputs)

    def _in_pieces(
        self,
        run: Run,
        ids_BT: np.ndarray,
        new_B: np.ndarray,
        asked_RP: np.ndarray,
        meant_RP: np.ndarray,
        state: Any,
        taps: bool,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A run in pieces that keep the runtime's limits; logits [R, P, N], 0 where none are meant, and taps [R, T, ...]."""
        assert self._max_step_tokens is not None
        logits_RPN = np.zeros((*asked_RP.shape, self.vocab_size), np.float32)
        wanted_RT = np.zeros((run.end - run.first, run.tokens), bool)
        pieces: dict[str, list[np.ndarray]] = {}
        for row, (asked_P, meant_P) in enumerate(zip(asked_RP, meant_RP, strict=True)):
            wanted_RT[row, asked_P[meant_P]] = True
        for start, end in cut_columns(run.tokens, wanted_RT, self._max_step_tokens, self._max_step_positions):
            columns = [np.flatnonzero(wanted_T[start:end]) for wanted_T in wanted_RT]
            asked_Rp = np.zeros((len(columns), max(map(len, columns))), np.int64)
            for row, found in enumerate(columns):
                asked_Rp[row, : len(found)] = found
            piece = Run(run.first, run.end, end - start)
            new_piece_B = np.clip(new_B - start, 0, end - start)
            result = self._step(piece, ids_BT[:, start:end], new_piece_B, asked_Rp, state, taps)
            found_RpN = result.logits
            for name, tap in result.taps.items():
                pieces.setdefault(name, []).append(tap)
            for row, found in enumerate(columns):
                for column, position in enumerate(found):
                    logits_RPN[row, meant_RP[row] & (asked_RP[row] == start + position)] = found_RpN[row, column]
        return logits_RPN, {name: np.concatenate(parts, axis=1) for name, parts in pieces.items()}

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise EngineError(f"token id {wrong} lies outside the vocabulary of {self.vocab_size}")

    def _check_lengths(self, state: Any, new_B: np.ndarray) -> None:
        total_B = state.lengths + new_B
        over = np.flatnonzero((total_B > self.max_seq_len) & (new_B > 0))
        if len(over):
            row = int(over[0])
            raise EngineError(
                f"row {row} holds {state.lengths[row]} tokens and gets {new_B[row]} more: {total_B[row]} exceeds the "
                f"engine's max_seq_len {self.max_seq_len}; shorten the prompt or build with a larger --max-seq-len"
            )


def _gather_taps(taps: dict[str, np.ndarray], outputs: dict[str, np.ndarray], run: Run, valid_BT: np.ndarray) -> None:
    """Put a run's taps [R, T, ...] to their rows of `outputs` [B, T, ...], which stay 0 at padding."""
    here = slice(run.first, run.end)
    for name, tap_RT in taps.items():
        out = outputs.setdefault(name, np.zeros((*valid_BT.shape, *tap_RT.shape[2:]), tap_RT.dtype))
        valid_RT = valid_BT[here, : run.tokens]
        out[here, : run.tokens][valid_RT] = tap_RT[valid_RT]


def _positions(positions: Positions, new_B: np.ndarray, tokens: int) -> np.ndarray:
    """Indices into the T new tokens, int64 [B, P]; those that are no valid token stay outside 0 .. new length - 1."""
    if isinstance(positions, str):
        if positions == "last":
            return new_B[:, None] - 1
        if positions == "all":
            return np.broadcast_to(np.arange(tokens), (len(new_B), tokens))
        raise EngineError(f'positions must be "last", "all" or an array, not {positions!r}')
    array = np.asarray(positions)
    if array.ndim != 2 or len(array) != len(new_B) or not np.issubdtype(array.dtype, np.integer):
        raise EngineError(f"positions must be integers [batch, P], not {array.dtype} {array.shape}")
    if array.size and (array.min() < 0 or array.max() >= tokens):
        raise EngineError(f"positions must lie within 0 and {tokens - 1}, the new tokens given")
    return array.astype(np.int64)
