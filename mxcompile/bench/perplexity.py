"""Perplexity of a text under the engine, the PyTorch definition and transformers: the same tokens, the same contexts.

The text is cut into segments of `context` tokens; neighbours share one token, so that every token but the text's first is predicted
once. A segment is read in prefill chunks with the logits of all tokens, and -log p of a token is a log-sum-exp in fp64. Contestants run
one after the other, so that only one of them is in memory.

Shape suffixes: P positions, N vocabulary.
"""

from __future__ import annotations

import datetime
import gc
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import load
from engines.config import EngineConfig
from engines.directory import read_config
from mxcompile.bench.environment import environment
from mxcompile.bench.options import BACKENDS, DTYPES
from mxcompile.bench.perplexity_results import REFERENCE, TWIN, YARDSTICK, PerplexityReport, Side, read_perplexity
from mxcompile.bench.records import plain, previous
from mxcompile.bench.results import write_json
from mxcompile.bench.subject import describe_engine, find_checkpoint
from mxcompile.bench.text import find_tokenizer, read_text
from mxcompile.bench.worker import describe
from mxcompile.errors import MxcompileError
from mxcompile.progress import Progress, SilentProgress, Stage
from mxcompile.quantized import reference_options, yardstick_options
from mxcompile.validation.thresholds import thresholds_for

DEFAULT_CONTEXT = 2048
SAVE_EVERY_S = 10.0
BLOCK = 64  # rows whose logits are widened to fp64 at a time
DIGITS = 9  # of a stored value; fp32 logits are 1e-7 exact

Predict = Callable[[Sequence[int]], Iterator[NDArray[np.float32]]]
"""Logits [P, N] of a fresh sequence's tokens, in pieces, in order."""


def perplexity(
    engine_dir: str | os.PathLike[str],
    text: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    backends: Sequence[str] = ("engine", "pytorch"),
    context: int | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    json_file: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> PerplexityReport:
    """Read the text with every contestant; the engine and PyTorch always take part.

    Args:
        text: a UTF-8 file.
        against: the checkpoint; default: where the engine was built from.
        context: tokens of a segment; default: 2048, or what the engine takes if that is less.
        dtype: of transformers; PyTorch, which the others are held against, computes in float32.
        json_file: written whole every ten seconds and after every contestant.
        resume: go on with the unfinished run in `json_file`.

    Raises MxcompileError: another checkpoint, no tokenizer, a text that is unreadable, not UTF-8 or shorter than two tokens, a context
    that the engine does not take. What a contestant cannot do is in the report.
    """
    progress = progress or SilentProgress()
    folder = Path(engine_dir).absolute()
    config = read_config(folder)
    names = _names(backends, config, dtype)
    content = read_text(text)
    checkpoint = find_checkpoint(config, against, needed=True)
    assert checkpoint is not None
    tokens = _tokens(content, folder, checkpoint, config)
    context = _context(context, config)
    segments = cut(tokens, context)
    encoded = content.encode()
    report = PerplexityReport(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        options=plain({"backends": tuple(names), "context": context, "dtype": dtype, "threads": threads})
        | {"text": hashlib.sha256(encoded).hexdigest()},
        engine=describe_engine(folder, config),
        checkpoint=checkpoint,
        environment=environment(threads),
        text={
            "path": str(text),
            "bytes": len(encoded),
            "sha256": hashlib.sha256(encoded).hexdigest(),
            "tokens": len(tokens),
            "segments": len(segments),
        },
    )
    target = None if json_file is None else Path(json_file)
    old = previous(target, resume, read_perplexity, report, "no measurement of perplexity")
    if old is not None and old.finished:
        return old
    report = old or report
    thresholds = thresholds_for(config)

    def save() -> None:
        if target is not None:
            write_json(report.to_dict(), target)

    if config.quantization is not None:
        names.append(TWIN)
    if thresholds is None:
        names.append(YARDSTICK)
    try:
        for name in names:
            with progress.stage(name, len(segments)) as stage:
                side = report.side(name)
                if side is None:
                    side = Side(name, _dtype(name, config, dtype))
                    report.sides.append(side)
                side.left_out, side.failures = "", []
                stage.advance(len(side.nll))
                _read(side, segments, partial(_open, name, folder, config, checkpoint, dtype, threads), stage, save)
                gc.collect()
    except KeyboardInterrupt:
        report.interruptions += 1
        save()
        raise
    report.judge(thresholds)
    report.finished = True
    save()
    return report


def cut(tokens: Sequence[int], context: int) -> list[Sequence[int]]:
    """Segments of at most `context` tokens; each begins with its predecessor's last token, and none has fewer than two."""
    return [tokens[start : start + context] for start in range(0, len(tokens) - 1, context - 1)]


def negative_log_likelihood(logits_PN: NDArray[np.float32], next_P: Sequence[int]) -> NDArray[np.float64]:
    """-log softmax(logits)[next] of each position in nats, computed in fp64, [P]."""
    out = np.empty(len(next_P))
    for start in range(0, len(next_P), BLOCK):
        wide_PN = logits_PN[start : start + BLOCK].astype(np.float64)
        largest_P = wide_PN.max(-1)
        with np.errstate(invalid="ignore"):
            total_P = np.log(np.exp(wide_PN - largest_P[:, None]).sum(-1)) + largest_P
        out[start : start + BLOCK] = total_P - wide_PN[np.arange(len(wide_PN)), next_P[start : start + BLOCK]]
    return out


def _read(
    side: Side,
    segments: Sequence[Sequence[int]],
    opener: Callable[[], Predict],
    stage: Stage,
    save: Callable[[], None],
) -> None:
    """All segments that the contestant has not read yet. An execution error is tried again once; a second one leaves it out."""
    if len(side.nll) == len(segments):
        return
    try:
        predict = opener()
    except (Exception, MemoryError) as error:
        side.left_out = describe(error)
        return
    saved = time.monotonic()
    weight = sum(len(part) for part in side.nll)
    for segment in segments[len(side.nll) :]:
        for attempt in range(2):
            try:
                values, scale = _segment(predict, segment)
                break
            except (Exception, MemoryError) as error:
                side.failures.append(describe(error))
                if attempt:
                    side.left_out = f"failed twice: {side.failures[-1]}"
                    return
        side.nll.append([round(value, DIGITS) if np.isfinite(value) else None for value in values.tolist()])
        side.logit_scale = (weight * side.logit_scale + len(values) * scale) / (weight + len(values))
        weight += len(values)
        stage.advance()
        if time.monotonic() - saved > SAVE_EVERY_S:
            save()
            saved = time.monotonic()
    save()


def _segment(predict: Predict, segment: Sequence[int]) -> tuple[NDArray[np.float64], float]:
    """-log p of every token but the first, and the mean of the largest |logit|."""
    found, scales, done = [], [], 0
    for logits_PN in predict(segment):
        following = segment[done + 1 : done + 1 + len(logits_PN)]
        done += len(logits_PN)
        found.append(negative_log_likelihood(logits_PN[: len(following)], following))
        scales.append(np.abs(logits_PN[: len(following)]).max(-1))
    scale = float(np.concatenate(scales).mean())
    return np.concatenate(found), scale if np.isfinite(scale) else 0.0


def _open(
    name: str, folder: Path, config: EngineConfig, checkpoint: dict[str, Any], dtype: str, threads: int | None
) -> Predict:
    """Load a contestant."""
    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    if name == "transformers":
        from mxcompile.backends.transformers import TransformersSession

        if checkpoint.get("layers") != config.num_layers:
            raise MxcompileError("the engine holds the first layers only, and the port always runs all of them")
        port = TransformersSession.load(checkpoint["path"], dtype, **options)
        return lambda segment: port.all_logits(segment, config.limits.prefill_chunk)
    if name == "engine":
        moved = {"checkpoint": checkpoint["path"]} if checkpoint["moved"] else {}
        session: Any = load(folder, **options, **moved)
    else:
        from mxcompile.backends.pytorch import PyTorchSession

        if name != REFERENCE:
            options |= yardstick_options(config) if name == YARDSTICK else reference_options(config)
        options["stream"] = None
        session = PyTorchSession.load(checkpoint["path"], _dtype(name, config, dtype), config.num_layers, **options)

    def predict(segment: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        state, chunk = session.new_state(1), config.limits.prefill_chunk
        for start in range(0, len(segment), chunk):
            part = np.asarray([segment[start : start + chunk]], np.int64)
            yield session.forward(part, [part.shape[1]], state, positions="all").logits[0]

    return predict


def _dtype(name: str, config: EngineConfig, dtype: str) -> str:
    """What a contestant computes in."""
    if name in ("engine", YARDSTICK):
        return config.dtype
    return "float32" if name in (REFERENCE, TWIN) else dtype


def _names(backends: Sequence[str], config: EngineConfig, dtype: str) -> list[str]:
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise MxcompileError(f"the backends are {', '.join(BACKENDS)}, not {', '.join(unknown)}")
    if dtype not in DTYPES:
        raise MxcompileError(f"the dtype of transformers must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return [name for name in BACKENDS if name in (*backends, "engine", REFERENCE)]


def _tokens(content: str, folder: Path, checkpoint: dict[str, Any], config: EngineConfig) -> list[int]:
    """The text by the checkpoint's tokenizer, else the engine's; every token must be in the model's vocabulary."""
    instead = "add the checkpoint's tokenizer.json to its folder"
    tokens = find_tokenizer((checkpoint["path"], folder), instead).encode(content)
    if len(tokens) < 2:
        raise MxcompileError(f"the text is too short: it has {len(tokens)} token, and perplexity needs at least 2")
    if max(tokens) >= config.vocab_size:
        raise MxcompileError(
            f"the tokenizer gives token {max(tokens)}, and the model's vocabulary ends at {config.vocab_size - 1}; "
            "the tokenizer is of another model"
        )
    return tokens


def _context(context: int | None, config: EngineConfig) -> int:
    longest = config.limits.max_seq_len
    if context is None:
        return min(DEFAULT_CONTEXT, longest)
    if not 2 <= context <= longest:
        raise MxcompileError(f"the context must be between 2 and the engine's {longest} tokens, not {context}")
    return context
