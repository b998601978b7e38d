"""How far the PyTorch definition itself is off in a rounded type: what engines of that type are measured by.

Shape suffixes: P positions, N vocabulary, n tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.interface import Session
from mxcompile.validation import metrics
from mxcompile.validation.observe import observe
from mxcompile.validation.thresholds import TOP_K, Yardstick


def measure_yardstick(
    reference: Session, rounded: Session, tokens: NDArray[np.int64], logit_factor: float, dtype: str
) -> Yardstick:
    """Run both on one prompt. `logit_factor`: the reference's logit scale over LOGIT_SCALE. `dtype`: what `rounded` computes in."""
    exact, other = (observe(session, [tokens], want="taps")[0] for session in (reference, rounded))
    logits_P = metrics.largest_difference(exact.logits_PN, other.logits_PN) / logit_factor
    kl_P = metrics.kl_divergence(exact.logits_PN, other.logits_PN) / logit_factor**2
    length = len(tokens)
    states = list(metrics.snapshot_errors(exact.snapshots[length], other.snapshots[length]).values())
    # Limits that hold for every layer come from the layer that is off most.
    medians_of = [float(np.median(errors)) for errors in states]
    largest_of = [float(errors.max()) for errors in states]
    assert exact.hidden is not None
    assert exact.router is not None
    assert other.hidden is not None
    assert other.router is not None
    hidden = [float(np.median(metrics.relative_norm(a, b))) for a, b in zip(exact.hidden, other.hidden, strict=True)]
    router = [
        float(np.median(metrics.largest_difference(a, b))) for a, b in zip(exact.router, other.router, strict=True)
    ]
    first_P = exact.logits_PN.argmax(-1)
    return Yardstick(
        dtype=dtype,
        logits=(float(np.median(logits_P)), float(np.percentile(logits_P, 95)), float(logits_P.max())),
        kl=(float(np.median(kl_P)), float(kl_P.max())),
        states=(max(medians_of), max(largest_of)),
        hidden=max(hidden),
        router=max(router),
        topk=float(metrics.in_top(first_P, other.logits_PN, TOP_K).mean()),
    )


def quantization_effect(reference: Session, original: Session, tokens: NDArray[np.int64]) -> dict[str, float]:
    """How far a session with quantized weights (`reference`) is from the PyTorch definition with the checkpoint's own, on one prompt."""
    with_own, with_quantized = (observe(session, [tokens])[0].logits_PN for session in (original, reference))
    return {
        "relative_logit_error": float(np.median(metrics.relative_norm(with_own, with_quantized))),
        "kl_divergence": float(np.median(metrics.kl_divergence(with_own, with_quantized))),
        "same_first_token": float((with_own.argmax(-1) == with_quantized.argmax(-1)).mean()),
        "tokens": float(len(tokens)),
    }
