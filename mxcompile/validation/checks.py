"""The checks: what is run, and what is held against what. Each function returns its checks; `Bench` is what they share.

Engine and reference see the same tokens. Groups "... against PyTorch" compare the two; the others compare the engine with itself
on another way through the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.interface import Session
from mxcompile.validation import metrics
from mxcompile.validation.judge import Comparison, Judge, last_position, snapshot_trace
from mxcompile.validation.observe import RowTrace, Want, has_taps, in_chunks, observe
from mxcompile.validation.options import ValidationOptions
from mxcompile.validation.results import Check, Measure, NotRun, PositionErrors


@dataclass
class Schedule:
    """Tokens of the rows of a run and its pieces, to repeat it with taps."""

    rows: list[NDArray[np.int64]]
    pieces: list[list[int]]
    text: str


@dataclass
class Bench:
    """Sessions, options, the judge, and what earlier checks left for later ones."""

    engine: Session
    reference: Session
    options: ValidationOptions
    judge: Judge
    yardstick: Session | None = None  # for engines in rounded types: the PyTorch definition in the same type
    not_run: list[NotRun] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    failed: list[Schedule] = field(default_factory=list)
    engine_traces: dict[tuple[int, ...], RowTrace] = field(default_factory=dict)
    reference_traces: dict[tuple[int, ...], RowTrace] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return min(self.engine.vocab_size, self.reference.vocab_size)

    @property
    def longest(self) -> int:
        return min(self.engine.max_seq_len, self.reference.max_seq_len)

    def prompt(self, length: int, row: int = 0) -> NDArray[np.int64]:
        """Random tokens; the same for the same length, row and seed."""
        return np.random.default_rng([self.options.seed, length, row]).integers(0, self.vocab_size, length)

    def run_engine(self, tokens: NDArray[np.int64]) -> RowTrace:
        """The engine's run of a single row in one piece; kept."""
        key = tuple(tokens.tolist())
        if key not in self.engine_traces:
            self.engine_traces[key] = observe(self.engine, [tokens])[0]
        return self.engine_traces[key]

    def run_reference(self, tokens: NDArray[np.int64]) -> RowTrace:
        """The reference's run of a single row in one piece, with router margins where it has taps; kept."""
        key = tuple(tokens.tolist())
        if key not in self.reference_traces:
            self.reference_traces[key] = self.observe_reference(tokens, [[len(tokens)]])
        return self.reference_traces[key]

    def observe_reference(self, tokens: NDArray[np.int64], pieces: list[list[int]]) -> RowTrace:
        """The reference's run of a single row, with router margins where it has taps, and with its yardstick."""
        want: Want = "margins" if has_taps(self.reference) else "logits"
        trace = observe(self.reference, [tokens], pieces, want=want, snapshot_after=[1])[0]
        if self.yardstick is not None:
            trace.yardstick = observe(self.yardstick, [tokens], pieces, snapshot_after=[1])[0]
        return trace

    def record(self, schedule: Schedule, *checks: Check) -> list[Check]:
        """Remember what was run when a check failed."""
        if any(check.status == "failed" for check in checks):
            self.failed.append(schedule)
        return list(checks)


def prompt_lengths(bench: Bench) -> list[int]:
    """The wanted lengths that fit with the tokens decoded behind them; the longest that fits instead of those that do not."""
    wanted, room = bench.options.prompt_lengths, bench.longest - bench.options.decode_steps
    fitting = [length for length in wanted if length <= room]
    left_out = [length for length in wanted if length > room]
    if left_out:
        instead = f"; {room} tokens run instead" if room >= 1 and room not in fitting else ""
        reason = f"the engine takes {bench.engine.max_seq_len} tokens{instead}"
        bench.not_run.append(NotRun(f"prompts of {', '.join(map(str, left_out))} tokens", reason))
        if instead:
            fitting.append(room)
    return sorted(fitting)


def check_length(bench: Bench, length: int) -> tuple[list[Check], PositionErrors]:
    """Prefill a prompt, decode some tokens behind it: logits at all positions, and states after both, against PyTorch."""
    steps = bench.options.decode_steps
    tokens = np.concatenate([bench.prompt(length), bench.prompt(steps, row=1)])
    pieces = [[length], *([[1]] * steps)]
    reference = [bench.observe_reference(tokens, pieces)]
    engine = observe(bench.engine, [tokens], pieces, snapshot_after=[1])
    case = f"{length} token{'s' if length > 1 else ''}"
    compared = bench.judge.compare(case, reference, engine)
    bench.comparisons.append(compared)
    judge = bench.judge
    checks = [
        judge.logits_check("Prefill logits against PyTorch", compared, lambda p: p < length),
        judge.states_check("States after prefill against PyTorch", compared, lambda row: length),
        judge.logits_check("Decode logits against PyTorch", compared, lambda p: p >= length),
        judge.states_check("States after decode against PyTorch", compared),
    ]
    bench.record(Schedule([tokens], pieces, f"a prompt of {case} and {steps} decoded ones"), *checks)
    row = compared.rows[0]
    curve = PositionErrors(
        case,
        row.reference.positions.tolist(),
        row.errors_P.tolist(),
        metrics.kl_divergence(row.reference.logits_PN, row.other.logits_PN).tolist(),
        metrics.top_margin(row.reference.logits_PN).tolist(),
        decode_from=length,
    )
    return checks, curve


def check_ragged(bench: Bench, lengths: tuple[int, ...]) -> Iterator[Check]:
    """A batch of rows of these lengths, right-padded with stray ids, then decoded with idle rows in between."""
    steps = bench.options.decode_steps
    lengths = tuple(min(length, bench.longest - steps) for length in lengths)
    case = f"rows of {', '.join(map(str, lengths))} tokens"
    if len(lengths) > bench.engine.max_batch_size:
        bench.not_run.append(NotRun(f"ragged batch, {case}", f"the engine takes {bench.engine.max_batch_size} rows"))
        return
    rows = [
        np.concatenate([bench.prompt(length, row), bench.prompt(steps, row + 1)]) if length else np.zeros(0, np.int64)
        for row, length in enumerate(lengths)
    ]
    pieces = [list(lengths), *([[int(length > 0) for length in lengths]] * steps)]
    batch = observe(bench.engine, rows, pieces, seed=bench.options.seed)
    filled = [row for row, length in enumerate(lengths) if length]
    references = [bench.run_reference(rows[row]) for row in filled]
    singles = [bench.run_engine(rows[row]) for row in filled]
    judge, batched = bench.judge, [batch[row] for row in filled]
    schedule = Schedule(rows, pieces, f"a batch with {case}")
    against = judge.compare(case, references, batched)
    yield from bench.record(
        schedule,
        judge.logits_check("Ragged batch against PyTorch", against),
        judge.states_check("States of a ragged batch against PyTorch", against),
    )
    alone = judge.compare(case, singles, batched, references)
    yield from bench.record(
        schedule,
        judge.logits_check("Ragged batch against single rows", alone),
        judge.states_check("States of a ragged batch against single rows", alone),
    )
    yield idle_rows(bench, [row[: lengths[i]] for i, row in enumerate(rows)], case)


def idle_rows(bench: Bench, prompts: list[NDArray[np.int64]], case: str) -> Check:
    """Rows without new tokens keep every bit of their states while the others go on, and empty rows stay empty."""
    state = bench.engine.new_state(len(prompts))
    bench.engine.prefill([prompt.tolist() for prompt in prompts], state)
    before = [state.read_row(row) for row in range(len(prompts))]
    working = max(row for row, prompt in enumerate(prompts) if len(prompt))
    new_B = np.zeros(len(prompts), np.int64)
    for tokens in (3, 1):  # a piece and a decode step
        new_B[working] = tokens
        ids_BT = np.random.default_rng(bench.options.seed).integers(0, bench.vocab_size, (len(prompts), tokens))
        bench.engine.forward(ids_BT, new_B, state)
    changed = filled = 0
    for row, snapshot in enumerate(before):
        if row != working:
            changed += metrics.changed_elements(snapshot, state.read_row(row))
        if not len(prompts[row]):
            filled += sum(int(np.count_nonzero(array)) for array in state.read_row(row).recurrent.values())
    measures = [
        Measure("state elements of idle rows that changed", float(changed), 0.0),
        Measure("elements that are not zero in rows that had no token", float(filled), 0.0),
    ]
    return Check("Idle rows keep their states", case, measures, len(prompts) - 1, len(prompts) - 1)


def check_chunked(bench: Bench, length: int, chunk: int) -> list[Check]:
    """A prompt in chunks equals the prompt in one piece: all logits, the states, and what `prefill` returns."""
    tokens = bench.prompt(length)
    whole, reference = bench.run_engine(tokens), bench.run_reference(tokens)
    pieces = in_chunks([tokens], chunk)
    case = f"{length} tokens in chunks of {chunk}"
    judge = bench.judge
    compared = judge.compare(case, [whole], observe(bench.engine, [tokens], pieces), [reference])
    group = "Chunked prefill against one piece"
    logits = judge.logits_check(group, compared)
    states = judge.states_check(f"States of {group[0].lower()}{group[1:]}", compared)
    state = bench.engine.new_state(1)
    last_N = bench.engine.prefill([tokens.tolist()], state, chunk)[0]
    trace = snapshot_trace(tokens, last_N, state.read_row(0))
    direct = judge.compare(case, [last_position(whole)], [trace], [reference])
    value, _ = judge.summary(direct.rows[0].errors_P[direct.rows[0].judged_P])
    logits.measures.append(Measure("last logits of prefill()", value, judge.limit("logits", 1)))
    states.measures += [
        Measure(f"{measure.name}, by prefill()", measure.value, measure.limit, measure.where)
        for measure in judge.states_check(group, direct).measures
    ]
    return bench.record(Schedule([tokens], pieces, f"a prompt of {case}"), logits, states)


def check_stepwise(bench: Bench, length: int) -> list[Check]:
    """A prompt decoded token by token equals the prompt in one piece."""
    tokens = bench.prompt(length)
    pieces = in_chunks([tokens], 1)
    case = f"{length} tokens"
    judge = bench.judge
    compared = judge.compare(
        case, [bench.run_engine(tokens)], observe(bench.engine, [tokens], pieces), [bench.run_reference(tokens)]
    )
    group = "Prefill against token by token"
    return bench.record(
        Schedule([tokens], pieces, f"a prompt of {case} read token by token"),
        judge.logits_check(group, compared),
        judge.states_check(f"States of {group[0].lower()}{group[1:]}", compared),
    )
