"""Compare two runs layer by layer, and name the first layer and kind of part where they leave each other.

Within a layer, values are looked at in the order in which they come about: states (input norm, key and value projections, decay or
rotary embedding), router logits (the rest of the attention, the second norm, the router), the residual stream behind the
layer (the experts).

Shape suffixes: n tokens, D hidden, E experts, k chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.interface import Session
from mxcompile.validation import metrics
from mxcompile.validation.observe import RowTrace, top_margin
from mxcompile.validation.results import Fault, LayerErrors
from mxcompile.validation.thresholds import Thresholds

_SHARE_OF_WRONG = 0.99  # of an expert's tokens: from there on the expert is called wrong


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


def first_fault(
    run: str,
    errors: Sequence[LayerErrors],
    reference: RowTrace,
    other: RowTrace,
    thresholds: Thresholds,
    experts_per_token: int,
    session: Session | None,
) -> Fault | None:
    """The first value over its limit. `session` is the reference's, for telling router from attention; None when the run
    was not one piece of a fresh sequence."""
    for item in errors:
        state = _state_fault(item, thresholds, run)
        if state is not None:
            return state
        hidden = item.hidden if thresholds.exact else item.hidden_median
        router_off = item.router is not None and item.router > thresholds.router.value
        hidden_off = hidden is not None and hidden > thresholds.hidden.value
        if router_off:
            assert item.router is not None
            kind, part = _router_or_attention(item, reference, other, thresholds, session)
            return Fault(item.layer, kind, part, run, "router logits off by", item.router, thresholds.router.value)
        if hidden_off:
            assert hidden is not None
            experts = wrong_experts(reference, other, item.layer, thresholds, experts_per_token)
            measure = "relative error of the residual stream"
            return Fault(
                item.layer, "experts", "the experts' output", run, measure, hidden, thresholds.hidden.value, experts
            )
    return None


def _state_fault(item: LayerErrors, thresholds: Thresholds, run: str) -> Fault | None:
    limit = thresholds.states.value
    embedding = ", or the embedding" if item.layer == 0 else ""
    over = {name for name in ("state", "key", "value") if (getattr(item, name) or 0.0) > limit}
    if not over:
        return None
    if "state" in over:
        part = "recurrent state, that is the input norm, the key and value projections or the decay"
    elif over == {"key"}:
        part = "keys, that is the key projection or the rotary embedding"
    elif over == {"value"}:
        part = "values, that is the value projection"
    else:
        part = "keys and values, that is the input norm or their projections"
    value = max(getattr(item, name) for name in over)
    return Fault(item.layer, item.kind, part + embedding, run, "relative error", value, limit)


def _router_or_attention(
    item: LayerErrors, reference: RowTrace, other: RowTrace, thresholds: Thresholds, session: Session | None
) -> tuple[str, str]:
    """If the reference, given the engine's router logits, gives out what the engine does, only the router is wrong."""
    rerouted = getattr(session, "hidden_if_routed", None)
    if rerouted is not None and other.router is not None and other.hidden is not None:
        hidden_nD = rerouted(item.layer, reference.tokens, other.router[item.layer])
        errors_n = metrics.relative_norm(hidden_nD, other.hidden[item.layer])
        if _summary(errors_n, thresholds) <= thresholds.hidden.value:
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
    for item in items:
        fault = _state_fault(item, thresholds, run)
        if fault is not None:
            if item.layer:
                fault.part += f", or anything in layer {item.layer - 1} behind its own state (the engine has no taps)"
            return fault
    return None


def _summary(errors: NDArray, thresholds: Thresholds) -> float:
    """What is held against a limit."""
    if not errors.size:
        return 0.0
    return float(errors.max() if thresholds.exact else np.median(errors))
