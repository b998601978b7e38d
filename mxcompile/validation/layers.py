"""Compare two runs layer by layer, and name the first layer and kind of part where they leave each other.

Within a layer, values are looked at in the order in which they come about: states (input norm, key and value projections, decay or
rotary embedding), router logits (the rest of the attention, the second norm, the router), the residual stream behind the
layer (the experts).

Shape suffixes: n tokens, D hidden, E experts, k chosen experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.interface import Session
from mxcompile.validation import metrics
from mxcompile.validation.observe import RowTrace, top_margin
from mxcompile.validation.results import Fault, LayerErrors
from mxcompile.validation.thresholds import Thresholds

_SHARE_OF_WRONG = 0.99  # of an expert's tokens: from there on the expert is called wrong
_CLEARLY_OVER = 10.0  # times the limit: no rounding that builds up
_STEP = 4.0  # factor between neighbouring values that rounding does not make
_NOISE = 0.01  # of the limit: smaller errors are not told apart


def layer_errors(
    reference: RowTrace, other: RowTrace, kinds: Sequence[str], experts_per_token: int, thresholds: Thresholds
) -> list[LayerErrors]:
    """Errors of every layer of one row, whose traces hold taps and the snapshot at the end.

    In exact types, what lies behind a router's near-tie that went the other way is left out.
    """
    assert reference.hidden is not None
    assert reference.router is not None
    assert other.hidden is not None
    assert other.router is not None
    length = len(reference.tokens)
    states = metrics.snapshot_errors(reference.snapshots[length], other.snapshots[length])
    moved_n = np.zeros(length, bool)  # tokens that went to other experts in this layer or before
    out = []
    for layer, kind in enumerate(kinds):
        usable = length if not moved_n.any() else int(moved_n.argmax())  # later tokens saw the moved one in attention
        errors = LayerErrors(layer, kind)
        for role, values in ((role, values) for (at, role), values in states.items() if at == layer):
            if role != "recurrent_state":
                setattr(errors, role, _summary(values[:usable], thresholds))  # one entry per position
            elif usable == length:  # else the state holds moved tokens too
                errors.state = _summary(values, thresholds)
        router_n = metrics.largest_difference(reference.router[layer], other.router[layer])
        errors.router = _summary(router_n[:usable], thresholds)
        if thresholds.exact:
            flipped_n = chosen(reference.router[layer], experts_per_token) != chosen(
                other.router[layer], experts_per_token
            )
            tie_n = top_margin(reference.router[layer], experts_per_token) <= thresholds.router_tie.value
            moved_n |= flipped_n.any(-1) & tie_n
        hidden_n = metrics.relative_norm(reference.hidden[layer], other.hidden[layer])
        kept_n = hidden_n[:usable][~moved_n[:usable]]
        errors.hidden = float(kept_n.max(initial=0.0))
        errors.hidden_median = float(np.median(kept_n)) if len(kept_n) else None
        out.append(errors)
    return out


def chosen(router_nE: NDArray, k: int) -> NDArray[np.bool_]:
    """Which experts each token goes to, [n, E]."""
    best = np.argsort(-router_nE, axis=-1, kind="stable")[:, :k]
    out = np.zeros(router_nE.shape, bool)
    np.put_along_axis(out, best, True, axis=-1)
    return out


@dataclass(frozen=True)
class _Probe:
    """One error of a layer and its limit, in the order in which values come about."""

    item: LayerErrors
    what: Literal["states", "router", "hidden"]
    value: float
    limit: float

    @property
    def strain(self) -> float:
        return self.value / self.limit


def first_fault(
    run: str,
    errors: Sequence[LayerErrors],
    reference: RowTrace,
    other: RowTrace,
    thresholds: Thresholds,
    experts_per_token: int,
    session: Session | None,
) -> Fault | None:
    """Where the runs leave each other, if any value is over its limit: the first such value; or, when it is only a little over, the
    value at which errors step up most, as a small fault passes its limit some layers later.

    `session` is the reference's, for telling router from attention; None when the run was not one piece of a fresh sequence.
    """
    probes = list(_probes(errors, thresholds))
    over = next((probe for probe in probes if probe.value > probe.limit), None)
    if over is None:
        return None
    if thresholds.exact and over.strain <= _CLEARLY_OVER:
        step = _largest_step(probes)
        if step is None:
            part = "errors build up over the layers, none stands out"
            return Fault(over.item.layer, "unknown", part, run, "error", over.value, over.limit)
        over = step
    item = over.item
    if over.what == "states":
        return Fault(item.layer, item.kind, _state_part(item), run, "relative error", over.value, over.limit)
    if over.what == "router":
        kind, part = _router_or_attention(item, reference, other, thresholds, session)
        return Fault(item.layer, kind, part, run, "router logits off by", over.value, over.limit)
    experts = wrong_experts(reference, other, item.layer, thresholds, experts_per_token)
    measure = "relative error of the residual stream"
    return Fault(item.layer, "experts", "the experts' output", run, measure, over.value, over.limit, experts)


def _probes(errors: Sequence[LayerErrors], thresholds: Thresholds) -> Iterator[_Probe]:
    for item in errors:
        states = [value for value in (item.state, item.key, item.value) if value is not None]
        if states:
            yield _Probe(item, "states", max(states), thresholds.states.value)
        if item.router is not None:
            yield _Probe(item, "router", item.router, thresholds.router.value)
        hidden = item.hidden if thresholds.exact else item.hidden_median
        if hidden is not None:
            yield _Probe(item, "hidden", hidden, thresholds.hidden.value)


def _largest_step(probes: Sequence[_Probe]) -> _Probe | None:
    """The probe that exceeds everything before it by the largest factor, if that is a step at all."""
    best, factor, before = None, _STEP, _NOISE
    for probe in probes:
        if probe.strain / before >= factor:
            best, factor = probe, probe.strain / before
        before = max(before, probe.strain)
    return best


def _state_part(item: LayerErrors) -> str:
    embedding = ", or the embedding" if item.layer == 0 else ""
    if item.kind == "lightning":
        return f"recurrent state, that is the input norm, the key and value projections or the decay{embedding}"
    key, value = item.key or 0.0, item.value or 0.0
    if value < key / 10:
        return f"keys, that is the key projection or the rotary embedding{embedding}"
    if key < value / 10:
        return f"values, that is the value projection{embedding}"
    return f"keys and values, that is the input norm or their projections{embedding}"


def _router_or_attention(
    item: LayerErrors, reference: RowTrace, other: RowTrace, thresholds: Thresholds, session: Session | None
) -> tuple[str, str]:
    """If the reference, given the engine's router logits, gives out what the engine does, only the router is wrong."""
    rerouted = getattr(session, "hidden_if_routed", None)
    if rerouted is not None and other.router is not None and other.hidden is not None and item.hidden:
        hidden_nD = rerouted(item.layer, reference.tokens, other.router[item.layer])
        left = float(metrics.relative_norm(hidden_nD, other.hidden[item.layer]).max())
        if math.isfinite(left) and left <= 0.1 * item.hidden:
            return "router", "the router's weights"
    detail = "norm or gate, " if item.kind == "lightning" else ""
    return item.kind, f"its output, that is the queries, {detail}the output projection or the norm behind it"


def wrong_experts(
    reference: RowTrace, other: RowTrace, layer: int, thresholds: Thresholds, experts_per_token: int
) -> list[int]:
    """Experts all of whose tokens are wrong, if they explain every wrong token; else none."""
    assert reference.hidden is not None
    assert reference.router is not None
    assert other.hidden is not None
    wrong_n = metrics.relative_norm(reference.hidden[layer], other.hidden[layer]) > thresholds.hidden.value
    routed_nE = chosen(reference.router[layer], experts_per_token)
    counts_E = routed_nE.sum(0)
    wrong_E = (routed_nE & wrong_n[:, None]).sum(0)
    suspects = [int(e) for e in np.flatnonzero((counts_E > 0) & (wrong_E >= _SHARE_OF_WRONG * counts_E))]
    explained_n = routed_nE[:, suspects].any(-1)
    return suspects if suspects and (explained_n | ~wrong_n).all() and len(suspects) < routed_nE.shape[1] else []


def fault_from_states(
    run: str, reference: RowTrace, other: RowTrace, kinds: Sequence[str], thresholds: Thresholds
) -> Fault | None:
    """For engines without taps: the first layer whose state is off, which names that layer or the one before it."""
    length = len(reference.tokens)
    items = [LayerErrors(layer, kind) for layer, kind in enumerate(kinds)]
    for (layer, role), values in metrics.snapshot_errors(reference.snapshots[length], other.snapshots[length]).items():
        setattr(items[layer], "state" if role == "recurrent_state" else role, _summary(values, thresholds))
    probe = next((probe for probe in _probes(items, thresholds) if probe.value > probe.limit), None)
    if probe is None:
        return None
    part = _state_part(probe.item)
    if probe.item.layer:
        part += f", or anything in layer {probe.item.layer - 1} behind its own state (the engine has no taps)"
    return Fault(probe.item.layer, probe.item.kind, part, run, "relative error", probe.value, probe.limit)


def _summary(errors: NDArray, thresholds: Thresholds) -> float:
    """What is held against a limit."""
    if not errors.size:
        return 0.0
    return float(errors.max() if thresholds.exact else np.median(errors))
