"""From one row of logits to one token: bias, penalties, constraint, temperature, top-k, top-p, and a seeded draw.

Legend: N vocabulary, M candidates that are left after top-k and top-p, in ascending order of their ids.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.generation.constraint import ConstraintError
from engines.generation.settings import GenerationConfig, NotFiniteError

# Rows are cut to this many likely candidates before the sort that top-p needs; widened when their mass falls short.
# Sorting 200,064 values for every token would cost more than a decode step of a small model.
_FIRST_CANDIDATES = 1024


def log_softmax(logits_N: NDArray[np.floating]) -> NDArray[np.float64]:
    """Natural logarithms of the softmax, in fp64; -inf stays -inf."""
    shifted_N = logits_N.astype(np.float64) - np.max(logits_N)
    return shifted_N - np.log(np.sum(np.exp(shifted_N)))


def penalise_repetition(logits_N: NDArray[np.float64], seen_N: NDArray[np.bool_], penalty: float) -> None:
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones, in place (CTRL paper, section
    4.1).
    """
    values = logits_N[seen_N]
    logits_N[seen_N] = np.where(values > 0, values / penalty, values * penalty)


def top_k_ids(values_N: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The `k` largest entries, largest first; equal values in ascending order of id."""
    size = values_N.shape[0]
    if k >= size:
        return np.argsort(-values_N, kind="stable")
    threshold = np.partition(values_N, size - k)[size - k]
    candidates = np.flatnonzero(values_N >= threshold)
    return candidates[np.argsort(-values_N[candidates], kind="stable")][:k]


def top_p_ids(probabilities_N: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """The shortest list of the most likely tokens whose probabilities reach `top_p` of the total, likeliest first."""
    size = probabilities_N.shape[0]
    needed = top_p * probabilities_N.sum()
    count = min(_FIRST_CANDIDATES, size)
    while True:
        ids = top_k_ids(probabilities_N, count)
        cumulative = np.cumsum(probabilities_N[ids])
        if cumulative[-1] >= needed or count == size:
            return ids[: int(np.searchsorted(cumulative, needed)) + 1]
        count = min(8 * count, size)


class Sampler:
    """The sampling state of one sequence: its random stream and the tokens that it has seen."""

    def __init__(self, config: GenerationConfig, vocab_size: int, prompt: list[int]) -> None:
        self._config = config
        # A counter-based generator keyed by the seed alone: what other rows do cannot move this row's stream.
        self._random = np.random.Generator(np.random.Philox(key=config.seed))
        self._bias = dict(config.logit_bias)
        self._seen_N: NDArray[np.bool_] | None = None
        if config.repetition_penalty != 1.0:
            self._seen_N = np.zeros(vocab_size, dtype=bool)
            self._seen_N[prompt] = True
        # Of the output, by token; None when no setting asks for it.
        self._counts: dict[int, int] | None = {} if config.presence_penalty or config.frequency_penalty else None

    def sample(self, logits_N: NDArray[np.floating], allowed_N: NDArray[np.bool_] | None = None) -> int:
        """Choose the next token, of those `allowed_N` if given. Raises NotFiniteError when the logits hold NaN or +inf, or
        nothing above -inf; ConstraintError when nothing that is allowed does.
        """
        if not np.isfinite(logits_N.max()):  # max() is NaN when any entry is
            raise NotFiniteError("the engine returned logits that are not finite; validate it against its checkpoint")
        scores_N = logits_N.astype(np.float64)
        if self._bias:
            scores_N[list(self._bias)] += list(self._bias.values())
        if self._seen_N is not None:
            penalise_repetition(scores_N, self._seen_N, self._config.repetition_penalty)
        if self._counts:
            ids_M = np.fromiter(self._counts, np.int64)
            counts_M = np.fromiter(self._counts.values(), np.float64)
            scores_N[ids_M] -= self._config.presence_penalty + self._config.frequency_penalty * counts_M
        if allowed_N is not None:
            scores_N[~allowed_N] = -np.inf
            if scores_N.max() == -np.inf:
                raise ConstraintError("no token can follow that the constraint of this answer allows")
        token = int(scores_N.argmax()) if self._config.temperature == 0 else self._draw(scores_N)
        if self._seen_N is not None:
            self._seen_N[token] = True
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _draw(self, scores_N: NDArray[np.float64]) -> int:
        config = self._config
        kept_M, probabilities_M = candidates(scores_N, config.temperature, config.top_k, config.top_p)
        cumulative_M = np.cumsum(probabilities_M)
        # random() < 1, but rounding may carry the product up to the total: clip to the last candidate of positive mass.
        position = int(np.searchsorted(cumulative_M, self._random.random() * cumulative_M[-1], side="right"))
        last = int(np.flatnonzero(probabilities_M)[-1])
        return int(kept_M[min(position, last)])


def candidates(
    scores_N: NDArray[np.float64], temperature: float, top_k: int, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids (ascending) and unnormalised probabilities of the tokens that a draw may return; `temperature` above 0."""
    # Subtract first: a tiny temperature must not overflow the largest score; that it makes -inf of others is right.
    with np.errstate(over="ignore"):
        probabilities_N = np.exp((scores_N - scores_N.max()) / temperature)
    kept_M = np.arange(scores_N.shape[0])
    if 0 < top_k < scores_N.shape[0]:
        kept_M = np.sort(top_k_ids(scores_N, top_k))
    if top_p < 1.0:
        kept_M = np.sort(kept_M[top_p_ids(probabilities_N[kept_M], top_p)])
    return kept_M, probabilities_N[kept_M]
