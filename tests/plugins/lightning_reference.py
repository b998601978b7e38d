"""Oracles and inputs for the lightning attention kernels.

Shapes: B sequences, T tokens, H heads, K = V = head_dim, P state slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def slope(head: int, layer: int) -> float:
    """Decay rate of head 0..63 in layer 0..79 of MiniMax-Text-01: 2^(-(h+1)/8) * (1 - l/79 + 1e-5)."""
    return 2.0 ** (-(head + 1) / 8) * (1 - layer / 79 + 1e-5)


def slopes(layer: int, heads: int) -> npt.NDArray[np.float32]:
    """`heads` slopes spread over the 64 heads of a layer, the fastest and the slowest among them."""
    chosen = np.linspace(0, 63, heads).round().astype(int) if heads > 1 else [31]
    return np.array([slope(int(head), layer) for head in chosen], np.float32)


@dataclass
class Case:
    """One call's inputs, as the launcher takes them (state pools [P, H, K, V], fp32)."""

    q: Array
    k: Array
    v: Array
    state: npt.NDArray[np.float32]
    log_decay: npt.NDArray[np.float32] | None
    slopes: npt.NDArray[np.float32] | None
    lengths: npt.NDArray[np.int32] | None
    slots: npt.NDArray[np.int32] | None
    scale: float


def make_case(
    rng: np.random.Generator,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    *,
    dtype: str = "bfloat16",
    layer: int = 40,
    per_token: bool = False,
    lengths: list[int] | None = None,
    slots: list[int] | None = None,
    pool: int | None = None,
    scale: float = 1.0,
) -> Case:
    """Random inputs. Rows past a length are NaN: nothing may read them."""

    def rows() -> Array:
        x = rng.standard_normal((batch, tokens, heads, head_dim)).astype(DTYPES[dtype])
        if lengths is not None:
            for b, length in enumerate(lengths):
                x[b, max(length, 0) :] = np.nan
        return x

    decay = slopes(layer, heads)
    log_decay = None
    if per_token:
        log_decay = -(decay * rng.uniform(0, 2, (batch, tokens, heads))).astype(np.float32)
        log_decay[rng.random(log_decay.shape) < 0.1] = 0.0
        if lengths is not None:
            for b, length in enumerate(lengths):
                log_decay[b, max(length, 0) :] = np.nan
    state = (rng.standard_normal((pool or batch, heads, head_dim, head_dim)) * 3).astype(np.float32)
    return Case(
        rows(),
        rows(),
        rows(),
        state,
        log_decay,
        None if per_token else decay,
        None if lengths is None else np.array(lengths, np.int32),
        None if slots is None else np.array(slots, np.int32),
        scale,
    )


def recurrence(case: Case) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Token-by-token fp64 recurrence: outputs [B, T, H, V] (zeros past the lengths) and the whole state pool afterwards."""
    batch, tokens, heads, head_dim = case.q.shape
    out = np.zeros((batch, tokens, heads, head_dim))
    states = case.state.astype(np.float64)
    for b in range(batch):
        slot = b if case.slots is None else int(case.slots[b])
        if not 0 <= slot < len(states):
            continue
        state = states[slot]
        length = tokens if case.lengths is None else int(np.clip(case.lengths[b], 0, tokens))
        q, k, v = (x[b, :length].astype(np.float64) for x in (case.q, case.k, case.v))
        for t in range(length):
            g = -case.slopes.astype(np.float64) if case.log_decay is None else case.log_decay[b, t].astype(np.float64)
            state = np.exp(g)[:, None, None] * state + k[t, :, :, None] * v[t, :, None, :]
            out[b, t] = case.scale * np.einsum("hk,hkv->hv", q[t], state)
        states[slot] = state
    return out, states


def relative_rms(got: Array, want: Array) -> float:
    """RMS of the difference over the RMS of `want`; inf where anything is not finite."""
    difference = got.astype(np.float64) - want.astype(np.float64)
    if not np.isfinite(difference).all():
        return float("inf")
    scale = float(np.sqrt(np.mean(want.astype(np.float64) ** 2)))
    return float(np.sqrt(np.mean(difference**2))) / max(scale, 1e-30)
