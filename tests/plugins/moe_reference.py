"""Oracles and inputs for the mixture-of-experts kernels.

Legend: N tokens, D hidden, E experts, L local experts, I inner, k experts per token, R = N * k pairs (token * k + choice).
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Float64 = npt.NDArray[np.float64]

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass
class Case:
    """One call's inputs, as the launcher takes them. Weights are [E, 2I, D] (gate and up rows interleaved) and [E, D, I]."""

    x: Array
    logits: Array
    fc1: Array
    fc2: Array
    fc1_scale: Array | None
    fc2_scale: Array | None
    top_k: int
    normalize: bool

    @property
    def dtype(self) -> str:
        return next(name for name, value in DTYPES.items() if value == self.x.dtype)


def make_case(
    seed: int,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    *,
    dtype: str = "bfloat16",
    int8: bool = False,
    scale_dtype: str = "float32",
    router_dtype: str = "float32",
    normalize: bool = True,
    skew: float = 0.0,
) -> Case:
    """Random inputs, scaled so that outputs are near 1. `skew` adds that much times the expert's number to its logits."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, hidden)).astype(DTYPES[dtype])
    logits = rng.standard_normal((tokens, experts)) * 1.5 - skew * np.arange(experts)

    def weights(rows: int, columns: int) -> tuple[Array, Array | None]:
        values = rng.standard_normal((experts, rows, columns)) * 1.5 / np.sqrt(columns)
        if not int8:
            return values.astype(DTYPES[dtype]), None
        scale = (np.abs(values).max(-1) / 127).astype(DTYPES[scale_dtype])
        return np.clip(np.rint(values / scale.astype(np.float64)[..., None]), -128, 127).astype(np.int8), scale

    fc1, fc1_scale = weights(2 * inner, hidden)
    fc2, fc2_scale = weights(hidden, inner)
    return Case(x, logits.astype(DTYPES[router_dtype]), fc1, fc2, fc1_scale, fc2_scale, top_k, normalize)


def route(logits: Array, top_k: int, normalize: bool) -> tuple[npt.NDArray[np.int64], Float64]:
    """([N, k] experts, [N, k] weights): softmax over all experts in fp64, the k largest, equal ones by lowest expert."""
    values = logits.astype(np.float64)
    chosen = np.argsort(-values, axis=1, kind="stable")[:, :top_k]
    odds = np.exp(values - values.max(1, keepdims=True))
    weights = np.take_along_axis(odds / odds.sum(1, keepdims=True), chosen, 1)
    return chosen, weights / weights.sum(1, keepdims=True) if normalize else weights


def dequantize(weights: Array, scale: Array | None) -> Float64:
    """fp64 weights; scales are per output row."""
    return weights.astype(np.float64) * (1.0 if scale is None else scale.astype(np.float64)[..., None])


def mixture_of_experts(case: Case, first: int = 0, count: int | None = None) -> Float64:
    """[N, D] in fp64: sum_j w_j fc2_e( silu(gate_e x) * (up_e x) ), over the experts first .. first + count - 1 alone."""
    chosen, weights = route(case.logits, case.top_k, case.normalize)
    x = case.x.astype(np.float64)
    out = np.zeros(x.shape)
    for expert in range(first, first + (len(case.fc1) - first if count is None else count)):
        token, choice = np.nonzero(chosen == expert)
        if len(token) == 0:
            continue
        both = x[token] @ dequantize(case.fc1[expert], None if case.fc1_scale is None else case.fc1_scale[expert]).T
        gate, up = both[:, 0::2], both[:, 1::2]
        down = dequantize(case.fc2[expert], None if case.fc2_scale is None else case.fc2_scale[expert])
        inner = gate * np.exp(-np.logaddexp(0, -gate)) * up  # silu without overflow
        np.add.at(out, token, inner @ down.T * weights[token, choice, None])
    return out


def relative_rms(found: Array, expected: Float64) -> float:
    """||found - expected|| / ||expected||; NaN where anything is."""
    error = np.asarray(found, np.float64) - expected
    return float(np.sqrt((error**2).sum() / max((expected**2).sum(), 1e-300)))
