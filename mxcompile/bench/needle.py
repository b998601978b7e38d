"""Long-context retrieval: a key at a depth of a long context, asked for at its end; does the engine answer as PyTorch does?

With random weights this measures agreement over long contexts, with trained weights retrieval as well. The answer is the token behind
the key's marker: `rank` 0 means that a side would say it.

Shape suffixes: T tokens, N vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np

from engines import load
from engines.directory import read_config
from engines.interface import Session
from export.contract import router_tap
from mxcompile.bench.environment import environment
from mxcompile.bench.records import check_schema
from mxcompile.bench.results import read_any
from mxcompile.bench.subject import describe_engine, find_checkpoint
from mxcompile.bench.text import find_tokenizer, read_text
from mxcompile.errors import MxcompileError
from mxcompile.progress import Progress, SilentProgress
from mxcompile.quantized import reference_options, yardstick_options
from mxcompile.result_shapes import CheckpointPart, EnginePart, EnvironmentPart
from mxcompile.strict_records import Count, Limit, NotNegative, Whole, one_of, read_record
from mxcompile.validation.metrics import kl_divergence
from mxcompile.validation.thresholds import LOGIT_SCALE, ROUNDED_FACTOR, Thresholds, thresholds_for

SCHEMA = "mxcompile.needle"
SCHEMA_VERSION = 1
MARKER_TOKENS, ANSWER_TOKENS = 4, 4
MARKER_TEXT, ANSWER_TEXT = " The secret number of the lighthouse is", " 48213."
CHUNK = 512
_NO_NUMBER = "the engine gave out what is no number"


@dataclass
class NeedleCell:
    """One context length and depth. `status`: agrees, differs, or tie (a router near-tie of the reference explains the difference).

    max_abs: largest difference of a logit; None when the engine gave out what is no number. margin: of PyTorch's first token over its
    second.
    """

    length: Count
    depth: Whole  # per cent of the context before the key
    max_abs: NotNegative | None
    kl: float | None
    same_token: bool
    margin: float
    engine_rank: Whole
    reference_rank: Whole
    status: Annotated[str, one_of("agrees", "differs", "tie")] = "agrees"
    note: str = ""


class Missing(TypedDict):
    """A length that was not run, and why."""

    length: int
    reason: str


@dataclass
class NeedleReport:
    """The grid. `to_dict` is the JSON form, `from_dict` its inverse."""

    created: str
    engine: EnginePart
    checkpoint: CheckpointPart
    environment: EnvironmentPart
    haystack: str
    limit: Limit  # on the difference of a logit, at this reference's scale
    exact: bool
    cells: list[NeedleCell] = field(default_factory=list)
    not_run: list[Annotated[dict[str, Any], Missing]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """No cell differs (in rounded types: the median keeps the limit), and at least half of the cells could be judged."""
        judged = [cell for cell in self.cells if cell.status != "tie"]
        if not judged or 2 * len(judged) < len(self.cells) or any(cell.status == "differs" for cell in judged):
            return False
        errors = [math.inf if cell.max_abs is None else cell.max_abs for cell in judged]
        return self.exact or float(np.median(errors)) <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "passed": self.passed}
        return head | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> NeedleReport:
        """Inverse of `to_dict`. Raises MxcompileError for another kind of file or schema version."""
        return read_record(cls, check_schema(values, SCHEMA, SCHEMA_VERSION, "mxcompile bench --needle"))


def read_needle(path: str | os.PathLike[str]) -> NeedleReport:
    """Read a grid. Raises MxcompileError naming the file."""
    report: NeedleReport = read_any(path, NeedleReport.from_dict)
    return report


def needle(
    engine_dir: str | os.PathLike[str],
    against: str | os.PathLike[str] | None,
    lengths: Sequence[int],
    depths: Sequence[int] = (0, 25, 50, 75, 100),
    *,
    haystack: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> NeedleReport:
    """Ask both sides at every length and depth.

    Args:
        against: the checkpoint; default: where the engine was built from.
        haystack: a text file to hide the key in, repeated as needed; default: random tokens.

    Raises MxcompileError: another checkpoint, a text without a tokenizer, depths outside 0 to 100.
    """
    progress = progress or SilentProgress()
    if not depths or min(depths) < 0 or max(depths) > 100:
        raise MxcompileError(f"depths are per cents between 0 and 100, not {list(depths)}")
    folder = Path(engine_dir).absolute()
    config = read_config(folder)
    text = None if haystack is None else read_text(haystack)
    pieces = _text_pieces(folder, text) if text is not None else _random_pieces(config.vocab_size, max(lengths), seed)
    checkpoint = find_checkpoint(config, against, needed=True)
    assert checkpoint is not None
    from mxcompile.backends.pytorch import PyTorchSession

    with progress.stage("load"):
        options: dict[str, Any] = {} if threads is None else {"threads": threads}
        moved = {"checkpoint": checkpoint["path"]} if checkpoint["moved"] else {}
        engine = load(folder, **options, **moved)
        # An engine with rounded weights is held against PyTorch with the same.
        options |= reference_options(config) | {"stream": None}
        reference = PyTorchSession.load(checkpoint["path"], "float32", config.num_layers, **options)
    thresholds = thresholds_for(config)
    report = NeedleReport(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        engine=describe_engine(folder, config),
        checkpoint=checkpoint,
        environment=environment(threads),
        haystack="random tokens" if haystack is None else str(haystack),
        limit=0.0,
        exact=thresholds is not None,
    )
    # Limits for rounded types come from what PyTorch itself is off in the same type (see validation.thresholds).
    yardstick = (
        None
        if thresholds is not None
        else PyTorchSession.load(
            checkpoint["path"], config.dtype, config.num_layers, **options | yardstick_options(config)
        )
    )
    yard: list[float] = []
    longest = min(engine.max_seq_len, reference.max_seq_len)
    fitting = [length for length in sorted(set(lengths)) if length <= longest]
    least = len(pieces.marker) * 2 + len(pieces.answer) + 1
    for length in sorted(set(lengths) - set(fitting)):
        report.not_run.append({"length": length, "reason": f"exceeds the engine's max_seq_len {longest}"})
    for length in [length for length in fitting if length < least]:
        fitting.remove(length)
        report.not_run.append(
            {"length": length, "reason": f"is too short for the key and the question ({least} tokens)"}
        )
    found: list[tuple[list[int], np.ndarray, np.ndarray]] = []
    with progress.stage("needle", 2 * len(fitting) * len(depths)) as stage:
        for length in fitting:
            for depth in sorted(set(depths)):
                prompt = pieces.prompt(length, depth)
                reference_N = _answer(reference, prompt)
                stage.advance()
                engine_N = _answer(engine, prompt)
                stage.advance()
                if yardstick is not None:
                    yard.append(float(np.abs(_answer(yardstick, prompt) - reference_N).max()))
                found.append((prompt, reference_N, engine_N))
                report.cells.append(_cell(length, depth, reference_N, engine_N, pieces.answer[0]))
    if not found:
        return report
    if thresholds is None:
        report.limit = ROUNDED_FACTOR * float(np.median(yard))
        for cell in report.cells:
            if cell.max_abs is None:
                cell.status, cell.note = "differs", _NO_NUMBER
        return report
    scale = max(1e-3, float(np.mean([np.abs(reference_N).max() for _, reference_N, _ in found]))) / LOGIT_SCALE
    report.limit = thresholds.logits.value * scale
    for cell, (prompt, _, _) in zip(report.cells, found, strict=True):
        _judge(cell, report.limit, thresholds.stable_margin.value * scale, thresholds, engine, reference, prompt)
    return report


@dataclass(frozen=True)
class _Pieces:
    hay: list[int]
    marker: list[int]
    answer: list[int]

    def prompt(self, length: int, depth: int) -> list[int]:
        """The key after `depth` per cent of the hay; at the end the marker alone, as the question."""
        key = self.marker + self.answer
        room = length - len(key) - len(self.marker)
        hay = (self.hay * (room // len(self.hay) + 1))[:room]
        at = round(room * depth / 100)
        return hay[:at] + key + hay[at:] + self.marker


def _random_pieces(vocab_size: int, longest: int, seed: int) -> _Pieces:
    random = np.random.default_rng(seed)
    marker = random.integers(0, vocab_size, MARKER_TOKENS).tolist()
    answer = random.integers(0, vocab_size, ANSWER_TOKENS).tolist()
    hay = random.integers(0, vocab_size, longest)
    hay[hay == marker[-1]] = (marker[-1] + 1) % vocab_size  # the marker must be seen once only
    return _Pieces(hay.tolist(), marker, answer)


def _text_pieces(folder: Path, text: str) -> _Pieces:
    tokenizer = find_tokenizer((folder,), "leave --haystack out for random tokens")
    return _Pieces(tokenizer.encode(text), tokenizer.encode(MARKER_TEXT), tokenizer.encode(ANSWER_TEXT))


def _answer(session: Session, prompt: list[int]) -> np.ndarray:
    """Logits float32 [N] of what follows the prompt."""
    return session.prefill([prompt], session.new_state(1))[0]


def _cell(length: int, depth: int, reference_N: np.ndarray, engine_N: np.ndarray, answer: int) -> NeedleCell:
    reference_N, engine_N = reference_N.astype(float), engine_N.astype(float)
    finite = bool(np.isfinite(engine_N).all())
    second, first = np.sort(reference_N)[-2:]
    return NeedleCell(
        length=length,
        depth=depth,
        max_abs=float(np.abs(engine_N - reference_N).max()) if finite else None,
        kl=float(kl_divergence(reference_N[None], engine_N[None])[0]) if finite else None,
        same_token=finite and bool(engine_N.argmax() == reference_N.argmax()),
        margin=float(first - second),
        engine_rank=int((engine_N > engine_N[answer]).sum()),
        reference_rank=int((reference_N > reference_N[answer]).sum()),
    )


def _judge(
    cell: NeedleCell,
    limit: float,
    stable: float,
    thresholds: Thresholds,
    engine: Session,
    reference: Session,
    prompt: list[int],
) -> None:
    """In exact types the limit holds in every cell, and a sure first token is the same."""
    within = cell.max_abs is not None and cell.max_abs <= limit
    if within and (cell.same_token or cell.margin < stable):
        return
    cell.status = "differs"
    if cell.max_abs is None:
        cell.note = _NO_NUMBER
    elif engine.config.taps:
        tie = _first_reroute(engine, reference, prompt)
        if tie is not None and tie[2] <= thresholds.router_tie.value:
            cell.status = "tie"
            cell.note = f"token {tie[0]} goes to another expert in layer {tie[1]}, where PyTorch's router logits are {tie[2]:.1e} apart"


def _first_reroute(engine: Session, reference: Session, prompt: list[int]) -> tuple[int, int, float] | None:
    """Position, layer and the reference's margin where the sides first choose different experts; None when they never do."""
    k = int(reference.config.model["num_experts_per_tok"])
    states = engine.new_state(1), reference.new_state(1)
    for start in range(0, len(prompt), CHUNK):
        part = np.asarray([prompt[start : start + CHUNK]])
        taps = [
            side.forward(part, [part.shape[1]], state, taps=True).taps
            for side, state in zip((engine, reference), states, strict=True)
        ]
        found = []
        for layer in range(reference.config.num_layers):
            ours_TE, theirs_TE = (tap[router_tap(layer)][0] for tap in taps)
            chosen = [np.sort(np.argsort(-x_TE, -1)[:, :k], -1) for x_TE in (ours_TE, theirs_TE)]
            for position in np.flatnonzero((chosen[0] != chosen[1]).any(-1))[:1]:
                ordered = np.sort(theirs_TE[position])[::-1]
                found.append((start + int(position), layer, float(ordered[k - 1] - ordered[k])))
        if found:
            return min(found)
    return None


def print_needle(report: NeedleReport) -> None:
    """The grid of the largest logit differences, lengths down and depths across."""
    from mxcompile.cli.output import print_table

    depths = sorted({cell.depth for cell in report.cells})
    rows = []
    for length in sorted({cell.length for cell in report.cells}):
        by_depth = {cell.depth: cell for cell in report.cells if cell.length == length}
        rows.append((length, *(_text(by_depth[depth]) for depth in depths)))
    title = f"Largest logit difference from PyTorch, limit {report.limit:.1e} (key in {report.haystack})"
    print_table(title, ("context", *(f"depth {depth} %" for depth in depths)), rows)
    total = len(report.cells)
    found = sum(cell.engine_rank == 0 for cell in report.cells)
    wanted = sum(cell.reference_rank == 0 for cell in report.cells)
    print(f"retrieved: engine {found} of {total}, PyTorch {wanted} of {total}")
    for cell in report.cells:
        if cell.note:
            print(f"{cell.length} tokens, depth {cell.depth} %: {cell.note}")
    for item in report.not_run:
        print(f"not run: {item['length']} tokens: {item['reason']}")
    print(verdict(report))


def verdict(report: NeedleReport) -> str:
    """One sentence."""
    judged = sum(cell.status != "tie" for cell in report.cells)
    if 2 * judged < len(report.cells) or not report.cells:
        return "Too few cells could be judged."
    return "The engine answers as PyTorch does." if report.passed else "The engine does not answer as PyTorch does."


def _text(cell: NeedleCell) -> str:
    value = "not finite" if cell.max_abs is None else f"{cell.max_abs:.1e}"
    return value if cell.status == "agrees" else f"{value} {cell.status.upper()}"
