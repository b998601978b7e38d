"""Run rows of tokens through a session in given pieces and keep what comes out.

Shape suffixes: B batch rows, T new tokens, P compared positions, N vocabulary, L layers, E experts, D hidden, n tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.interface import RowSnapshot, Session
from export.contract import hidden_tap, router_tap

Want = Literal["logits", "margins", "taps"]
"""logits: nothing else, on the path that users run; margins: also the router's margins; taps: also hidden states and router logits."""

# Logits are kept for at most this many numbers of a row; of longer ones, a selection of positions is compared.
MAX_LOGITS = 1 << 24


@dataclass
class RowTrace:
    """What one row gave. `snapshots[n]`: what it remembered after its first n tokens."""

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]  # P, ascending
    logits_PN: NDArray[np.float32]
    snapshots: dict[int, RowSnapshot] = field(default_factory=dict)
    margins_Ln: NDArray[np.float32] | None = None  # last chosen minus first left-out expert
    hidden: list[NDArray[np.float32]] | None = None  # per layer [n, D]
    router: list[NDArray[np.float32]] | None = None  # per layer [n, E]
    yardstick: RowTrace | None = None  # of the same tokens, for references of engines in rounded types


def one_piece(rows: Sequence[NDArray[np.int64]]) -> list[list[int]]:
    """Every row whole."""
    return [[len(row) for row in rows]]


def in_chunks(rows: Sequence[NDArray[np.int64]], chunk: int) -> list[list[int]]:
    """Pieces of `chunk` tokens, the last one shorter."""
    longest = max(len(row) for row in rows)
    return [[int(np.clip(len(row) - start, 0, chunk)) for row in rows] for start in range(0, longest, chunk)]


def compared_positions(length: int, vocab_size: int) -> NDArray[np.int64]:
    """All positions of a row, or as many as MAX_LOGITS allows: both ends, around multiples of 64, and evenly spaced ones."""
    room = max(64, MAX_LOGITS // vocab_size)
    if length <= room:
        return np.arange(length)
    third = room // 3
    edges = np.arange(0, length, 64)[: third // 2]
    chosen = [np.arange(third // 2), length - 1 - np.arange(third // 2), edges, edges[1:] - 1]
    return np.unique(np.concatenate([*chosen, np.linspace(0, length - 1, third).astype(np.int64)]))


def has_taps(session: Session) -> bool:
    """Whether the session can give out hidden states and router logits of every layer."""
    layers = range(session.config.num_layers)
    return {tap(layer) for layer in layers for tap in (hidden_tap, router_tap)} <= set(session.config.taps)


def observe(
    session: Session,
    rows: Sequence[NDArray[np.int64]],
    pieces: Sequence[Sequence[int]] | None = None,
    *,
    want: Want = "logits",
    snapshot_after: Sequence[int] = (),
    seed: int = 0,
    prepare: Callable[[Any], None] = lambda state: None,
) -> list[RowTrace]:
    """Run `rows` in one batch.

    Args:
        pieces: per piece the new tokens of each row; default: one piece. Pieces of one token for every row run through
            `decode` when only logits are wanted, as in generation.
        snapshot_after: numbers of pieces after which to keep what each row remembers; always after the last.
        seed: of the ids that fill the padding, which must not matter.
        prepare: called with the fresh state, to place images in it.
    """
    pieces = one_piece(rows) if pieces is None else pieces
    stray = np.random.default_rng(seed)
    experts_per_token = int(session.config.model.get("num_experts_per_tok", 0))
    traces = [_empty(row, session) for row in rows]
    parts: list[list[dict[str, Any]]] = [[] for _ in rows]
    state = session.new_state(len(rows))
    prepare(state)
    done_B = np.zeros(len(rows), np.int64)
    taps = want != "logits"
    for index, piece in enumerate(pieces):
        new_B = np.asarray(piece, np.int64)
        ids_BT = stray.integers(0, session.vocab_size, (len(rows), max(1, int(new_B.max()))))
        for row, tokens in enumerate(rows):
            ids_BT[row, : new_B[row]] = tokens[done_B[row] : done_B[row] + new_B[row]]
        wanted = [
            trace.positions[(trace.positions >= start) & (trace.positions < start + new)] - start
            for trace, start, new in zip(traces, done_B, new_B, strict=True)
        ]
        if not taps and (new_B == 1).all():
            logits_BPN, tapped = session.decode(ids_BT[:, 0], state)[:, None], {}
        else:
            width = max(1, max(len(positions) for positions in wanted))
            positions_BP = np.zeros((len(rows), width), np.int64)
            for row, positions in enumerate(wanted):
                positions_BP[row, : len(positions)] = positions
            result = session.forward(ids_BT, new_B, state, positions=positions_BP, taps=taps)
            logits_BPN, tapped = result.logits, result.taps
        for row, positions in enumerate(wanted):
            part: dict[str, Any] = {"logits": logits_BPN[row, : len(positions)].copy()}
            for name, tap_BT in tapped.items():
                part[name] = _reduced(name, tap_BT[row, : new_B[row]], want, experts_per_token)
            parts[row].append(part)
        done_B += new_B
        if index + 1 in snapshot_after or index + 1 == len(pieces):
            for row, trace in enumerate(traces):
                trace.snapshots[int(done_B[row])] = state.read_row(row)
    for trace, mine in zip(traces, parts, strict=True):
        _join(trace, mine, want, session.config.num_layers)
    return traces


def _empty(tokens: NDArray[np.int64], session: Session) -> RowTrace:
    return RowTrace(tokens, compared_positions(len(tokens), session.vocab_size), np.zeros((0, 0), np.float32))


def _reduced(name: str, tap_TX: NDArray, want: Want, experts_per_token: int) -> NDArray | None:
    """A copy of what is wanted of a tap."""
    if want == "taps":
        return tap_TX.copy()
    return top_margin(tap_TX, experts_per_token) if name.endswith("router_logits") else None


def top_margin(router_TE: NDArray, experts_per_token: int) -> NDArray:
    """Last chosen minus first left-out router logit, [T]; infinite when every expert is chosen."""
    if router_TE.shape[-1] <= experts_per_token:
        return np.full(len(router_TE), np.inf, np.float32)
    ordered = np.sort(router_TE, axis=-1)
    return ordered[:, -experts_per_token] - ordered[:, -experts_per_token - 1]


def _join(trace: RowTrace, parts: list[dict[str, Any]], want: Want, layers: int) -> None:
    def whole(name: str) -> NDArray:
        return np.concatenate([part[name] for part in parts])

    trace.logits_PN = whole("logits")
    if want == "margins":
        trace.margins_Ln = np.stack([whole(router_tap(layer)) for layer in range(layers)])
    if want == "taps":
        trace.hidden = [whole(hidden_tap(layer)) for layer in range(layers)]
        trace.router = [whole(router_tap(layer)) for layer in range(layers)]
