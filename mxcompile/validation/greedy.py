"""Greedy continuations of the engine and the reference, in step.

Both are fed the reference's tokens. Up to the first step at which they choose differently that is each one's own continuation; from
there on only the teacher-forced agreement goes on. Every disagreement is stated with the reference's margin.

Shape suffixes: B rows, N vocabulary, P steps, L layers, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.interface import Session
from export.contract import router_tap
from mxcompile.validation import metrics
from mxcompile.validation.checks import Bench, Schedule
from mxcompile.validation.judge import Comparison, RowComparison, reroute_text
from mxcompile.validation.observe import RowTrace, has_taps, top_margin
from mxcompile.validation.results import Check, GreedyRun, Measure, NotRun

GROUP = "Greedy decoding against PyTorch"


def check_greedy(bench: Bench) -> tuple[list[Check], list[GreedyRun]]:
    """Continue every prompt greedily, in batches as large as the engine takes."""
    steps, checks, runs = bench.options.greedy_tokens, list[Check](), list[GreedyRun]()
    lengths = [length for length in bench.options.greedy_prompts if length + 2 <= bench.longest]
    if not lengths:
        bench.not_run.append(NotRun(GROUP, f"the engine takes {bench.engine.max_seq_len} tokens"))
    while lengths:
        batch, lengths = lengths[: bench.engine.max_batch_size], lengths[bench.engine.max_batch_size :]
        fitting = min(steps, bench.longest - max(batch))
        if fitting < steps:
            bench.not_run.append(NotRun(f"{steps} greedy tokens", f"{fitting} fit into the engine's capacity"))
        for check, run in continue_greedily(bench, [bench.prompt(length, row=2) for length in batch], fitting):
            checks.append(check)
            runs.append(run)
    return checks, runs


def continue_greedily(
    bench: Bench,
    prompts: list[NDArray[np.int64]],
    steps: int,
    prepare: Callable[[Session, Any], None] = lambda session, state: None,
) -> list[tuple[Check, GreedyRun]]:
    """Continue prompts in one batch by `steps` tokens; `prepare` is called with either session and its fresh state."""
    lengths = [len(prompt) for prompt in prompts]
    reference_state, engine_state = bench.reference.new_state(len(prompts)), bench.engine.new_state(len(prompts))
    prepare(bench.reference, reference_state)
    prepare(bench.engine, engine_state)
    tapped = has_taps(bench.reference)
    ids_BT = np.zeros((len(prompts), max(lengths)), np.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = prompt
    result = bench.reference.forward(ids_BT, lengths, reference_state, taps=tapped)
    engine_BN = bench.engine.prefill([prompt.tolist() for prompt in prompts], engine_state)
    margins = [[_margins(bench, result.taps, row, length)] if tapped else [] for row, length in enumerate(lengths)]
    records: list[list[_Step]] = [[] for _ in prompts]
    chosen: list[list[int]] = [prompt.tolist() for prompt in prompts]
    for step in range(steps):
        reference_BN = result.logits[:, 0]
        for row in range(len(prompts)):
            records[row].append(_Step(reference_BN[row], engine_BN[row]))
            chosen[row].append(records[row][-1].reference)
        if step + 1 == steps:
            break
        tokens_B = np.array([tokens[-1] for tokens in chosen])
        result = bench.reference.forward(tokens_B[:, None], [1] * len(prompts), reference_state, taps=tapped)
        engine_BN = bench.engine.decode(tokens_B, engine_state)
        for row in range(len(prompts) if tapped else 0):
            margins[row].append(_margins(bench, result.taps, row, 1))
    out = []
    for row, length in enumerate(lengths):
        fed = np.array(chosen[row][:-1])  # the last token is not fed
        margins_Ln = np.concatenate(margins[row], axis=1) if tapped else None
        snapshots = (reference_state.read_row(row), engine_state.read_row(row))
        check, run = _judge(bench, length, records[row], margins_Ln, fed, snapshots)
        pieces = [[length], *([[1]] * (len(fed) - length))]
        bench.record(Schedule([fed], pieces, f"greedy decoding behind {length} tokens"), check)
        out.append((check, run))
    return out


class _Step:
    """What is kept of one step."""

    def __init__(self, reference_N: NDArray, engine_N: NDArray) -> None:
        self.reference, self.engine = int(reference_N.argmax()), int(engine_N.argmax())
        self.error = float(metrics.largest_difference(reference_N[None], engine_N[None])[0])
        self.margin = float(metrics.top_margin(reference_N[None])[0])
        self.lead = float(reference_N[self.reference] - reference_N[self.engine])  # over the engine's token


def _margins(bench: Bench, taps: dict[str, NDArray], row: int, length: int) -> NDArray[np.float32]:
    k = int(bench.reference.config.model["num_experts_per_tok"])
    layers = range(bench.reference.config.num_layers)
    return np.stack([top_margin(taps[router_tap(layer)][row, :length], k) for layer in layers])


def _judge(
    bench: Bench,
    length: int,
    steps: list[_Step],
    margins_Ln: NDArray[np.float32] | None,
    fed: NDArray[np.int64],
    snapshots: tuple,
) -> tuple[Check, GreedyRun]:
    judge, thresholds = bench.judge, bench.judge.thresholds
    case = f"{len(steps)} tokens behind {length}"
    positions_P = length - 1 + np.arange(len(steps))
    errors_P = np.array([step.error for step in steps])
    judged_P, reroute = judge.set_aside(case, 0, positions_P, errors_P, margins_Ln)
    agreed_P = np.array([step.reference == step.engine for step in steps])
    first = int(np.argmin(agreed_P)) if not agreed_P.all() else len(steps)
    run = GreedyRun(length, len(steps), first, float(agreed_P.mean()), agreed=agreed_P.tolist())
    unexplained = np.zeros(len(steps), bool)
    for index in np.flatnonzero(~agreed_P):
        tie = thresholds.exact and steps[index].lead <= judge.stable_margin
        unexplained[index] = judged_P[index] and not tie
    if first < len(steps):
        step = steps[first]
        run.difference_margin, run.reference_token, run.engine_token = step.lead, step.reference, step.engine
        if reroute is not None and not judged_P[first]:
            run.explanation = reroute_text(reroute)
        elif thresholds.exact:
            near = "within" if not unexplained[first] else "beyond"
            run.explanation = f"the reference's margin is {near} the stable margin of {judge.stable_margin:.1e}"
    value, worst = judge.summary(errors_P[judged_P])
    measures = [
        Measure(
            f"{judge.word} logit difference", value, judge.limit("logits", 1), f"step {worst}" if judged_P.any() else ""
        )
    ]
    if thresholds.exact:
        measures.insert(0, Measure("tokens that differ without a tie", float(unexplained.sum()), 0.0))
        if unexplained.any():
            measures[0].where = f"step {int(np.argmax(unexplained))}"
    else:
        sure_P = np.array([step.margin >= judge.stable_margin for step in steps])
        share = float(agreed_P[sure_P].mean()) if sure_P.any() else 1.0
        counts = f"{int(agreed_P[sure_P].sum())} of {int(sure_P.sum())}"
        name = "same token where the reference is sure"
        measures.insert(0, Measure(name, share, thresholds.stable_top1.value, counts, at_least=True))
    row = RowTrace(fed, positions_P, np.zeros((0, 0), np.float32), {len(fed): snapshots[0]}, margins_Ln)
    other = RowTrace(fed, positions_P, row.logits_PN, {len(fed): snapshots[1]})
    compared = Comparison(case, [RowComparison(row, other, errors_P, judged_P, reroute)])
    # Generated text repeats itself, and with it its errors: no better than few positions.
    states = judge.states_check(GROUP, compared)
    for measure in states.measures:
        measure.limit = judge.limit("states", 1)
    check = Check(GROUP, case, measures + states.measures, len(steps), int(judged_P.sum()), states.notes)
    if run.explanation:
        check.notes.append(
            f"first difference at step {first}: token {run.reference_token} against {run.engine_token}, "
            f"reference margin {run.difference_margin:.1e}; {run.explanation}"
        )
    return check, run
