"""Errors between two runs, in numbers. What is not finite counts as infinitely wrong.

Shape suffixes: P positions, N vocabulary, H heads, K and V channels, G kv heads, n tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.interface import RowSnapshot

Errors = NDArray[np.float64]


def largest_difference(reference_PN: NDArray, other_PN: NDArray) -> Errors:
    """Largest |difference| of each position, [P]."""
    if not reference_PN.size:
        return np.zeros(len(reference_PN))
    return _finite(np.abs(reference_PN.astype(np.float64) - other_PN).max(-1))


def relative_norm(reference: NDArray, other: NDArray, axes: int = 1) -> Errors:
    """|difference| / |reference| over the last `axes` axes; a difference from zero is infinite, 0 / 0 is 0."""
    over = tuple(range(-axes, 0))
    difference = np.sqrt(((reference.astype(np.float64) - other) ** 2).sum(over))
    size = np.sqrt((reference.astype(np.float64) ** 2).sum(over))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _finite(np.where(difference == 0, 0.0, difference / size))


def kl_divergence(reference_PN: NDArray, other_PN: NDArray) -> Errors:
    """KL(softmax(reference) || softmax(other)) of each position, nats, [P]."""
    out = np.zeros(len(reference_PN))
    for index, (reference, other) in enumerate(zip(reference_PN, other_PN, strict=True)):  # rows: little memory
        p, q = _log_softmax(reference.astype(np.float64)), _log_softmax(other.astype(np.float64))
        # Exactly non-negative; the plain sum of p log(p / q) cancels below 1e-16.
        out[index] = (np.exp(p) * (np.expm1(q - p) - (q - p))).sum()
    return _finite(out)


def _log_softmax(logits_N: NDArray) -> NDArray:
    shifted = logits_N - logits_N.max()
    return shifted - np.log(np.exp(shifted).sum())


def top_margin(logits_PN: NDArray) -> Errors:
    """First minus second largest logit of each position, [P]."""
    if not logits_PN.size:
        return np.zeros(len(logits_PN))
    two = np.partition(logits_PN, -2, axis=-1)[:, -2:]
    return (two[:, 1] - two[:, 0]).astype(np.float64)


def in_top(token_P: NDArray, logits_PN: NDArray, k: int) -> NDArray[np.bool_]:
    """Whether each token is among the k largest logits, [P]."""
    k = min(k, logits_PN.shape[-1])
    best = np.argpartition(-logits_PN, k - 1, axis=-1)[:, :k]
    return (best == token_P[:, None]).any(-1)


def snapshot_errors(reference: RowSnapshot, other: RowSnapshot) -> dict[tuple[int, str], Errors]:
    """Relative errors by (layer, role): recurrent states per head [H], keys and values per position [n]."""
    errors = {(layer, "recurrent_state"): _state(reference, other, layer) for layer in reference.recurrent}
    for role, mine, theirs in (("key", reference.key, other.key), ("value", reference.value, other.value)):
        for layer, cache_GnK in mine.items():
            if theirs[layer].shape != cache_GnK.shape:
                errors[layer, role] = np.array([np.inf])
            else:
                errors[layer, role] = relative_norm(cache_GnK.swapaxes(0, 1), theirs[layer].swapaxes(0, 1), axes=2)
    return dict(sorted(errors.items()))


def _state(reference: RowSnapshot, other: RowSnapshot, layer: int) -> Errors:
    return relative_norm(reference.recurrent[layer], other.recurrent[layer], axes=2)


def changed_elements(one: RowSnapshot, other: RowSnapshot) -> int:
    """Number of state elements that differ at all."""
    changed = 0
    for mine, theirs in ((one.recurrent, other.recurrent), (one.key, other.key), (one.value, other.value)):
        for layer, array in mine.items():
            changed += int((array != theirs[layer]).sum()) if array.shape == theirs[layer].shape else array.size
    return changed


def _finite(errors: NDArray) -> Errors:
    return np.where(np.isfinite(errors), errors, np.inf)
