"""A session whose logits are exact functions of each row's own history, so that batching can never move a bit.

The row's state is one integer per token seen, folded by a hash; reading a stale or foreign state shows at once.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from engines.interface import RowSnapshot, StepResult

VOCABULARY = 23


class ToyState:
    def __init__(self, batch_size):
        self.history = [[] for _ in range(batch_size)]
        self.batch_size = batch_size

    @property
    def lengths(self):
        return np.array([len(row) for row in self.history], np.int64)

    def read_row(self, row, start=0):
        seen = self.history[row]
        assert 0 <= start <= len(seen)
        return RowSnapshot(
            len(seen),
            {0: np.array([[[hash_of(seen)]]], np.float32)},
            {1: np.array(seen[start:], np.float32).reshape(1, -1, 1)},
            {1: np.array(seen[start:], np.float32).reshape(1, -1, 1) + 1},
        )

    def write_row(self, row, snapshot):
        seen = [int(token) for token in snapshot.key[1].reshape(-1)]
        assert snapshot.length == len(seen)
        assert snapshot.recurrent[0].reshape(-1)[0] == np.float32(hash_of(seen))
        assert np.array_equal(snapshot.value[1], snapshot.key[1] + 1)
        self.history[row] = seen

    def clear_row(self, row):
        self.history[row] = []


class ToySession:
    """See `engines.interface.Session`."""

    def __init__(self, max_batch_size=3, max_seq_len=48, chunk=4):
        self.max_batch_size, self.max_seq_len, self.vocab_size = max_batch_size, max_seq_len, VOCABULARY
        self.config = SimpleNamespace(limits=SimpleNamespace(prefill_chunk=chunk), vision=None)
        self.rows_run = 0

    def new_state(self, batch_size):
        return ToyState(batch_size)

    def prefill(self, prompts, state, chunk=None):
        for row, prompt in enumerate(prompts):
            state.history[row] += [int(token) for token in prompt]
        return np.stack([logits_of(seen) for seen in state.history])

    def decode(self, tokens_B, state):
        return self.forward(np.asarray(tokens_B)[:, None], np.ones(state.batch_size, np.int64), state).logits[:, 0]

    def forward(self, ids_BT, new_lengths_B, state, positions="last", taps=False):
        assert not taps
        before = [list(seen) for seen in state.history]
        for row, new in enumerate(new_lengths_B):
            state.history[row] += [int(token) for token in ids_BT[row, :new]]
            assert len(state.history[row]) <= self.max_seq_len
            self.rows_run += int(new > 0)
        if not isinstance(positions, str):
            assert positions.shape == (state.batch_size, 0)
            return StepResult(np.zeros((state.batch_size, 0, VOCABULARY), np.float32))
        if isinstance(positions, str) and positions == "all":
            logits_BTN = np.zeros((state.batch_size, ids_BT.shape[1], VOCABULARY), np.float32)
            for row, new in enumerate(new_lengths_B):
                for at in range(new):
                    logits_BTN[row, at] = logits_of([*before[row], *(int(token) for token in ids_BT[row, : at + 1])])
            return StepResult(logits_BTN)
        logits_BN = np.stack([logits_of(seen) for seen in state.history])
        logits_BN[np.asarray(new_lengths_B) == 0] = 0
        return StepResult(logits_BN[:, None])


def hash_of(seen):
    value = 7
    for token in seen:
        value = (value * 31 + token + 1) % 1_000_003
    return value


def logits_of(seen):
    return np.random.default_rng(hash_of(seen)).normal(size=VOCABULARY).astype(np.float32)
