"""Checks of an engine with a vision half: its image features, and answers about images, against the PyTorch definition.

Engine and reference each compute their own features from the same pixels, so what is compared is the whole way from pixels to
logits. The pixels are noise: reading files and resizing them is no part of either.

Shape suffixes: B rows, P compared positions, n tokens of the images of a prompt, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engines.config import VisionHalf
from engines.interface import ImageSession, Session
from engines.vision.layout import best_resolution, token_rows
from engines.vision.pixels import PreparedImage
from engines.vision.prompts import expand
from mxcompile.validation import metrics
from mxcompile.validation.checks import Bench
from mxcompile.validation.greedy import continue_greedily
from mxcompile.validation.judge import last_position, snapshot_trace
from mxcompile.validation.observe import RowTrace, in_chunks, observe
from mxcompile.validation.results import Check, Fault, GreedyRun, Measure, NotRun
from mxcompile.validation.thresholds import EXACT

FEATURES_GROUP = "Image features against PyTorch"
# Heights and widths in tiles: one that fills a tile, one with padding above and below, one with padding at the sides.
SHAPES = ((1.0, 1.0), (0.9, 2.2), (1.7, 0.6))
TEXT = 6  # tokens before, between and behind the images of a prompt


def check_images(bench: Bench) -> tuple[list[Check], list[GreedyRun], Fault | None]:
    """All checks of the vision half; none for an engine without one. The fault is set when only images go wrong."""
    vision, theirs = bench.engine.config.vision, bench.reference.config.vision
    if vision is None:
        return [], [], None
    if theirs is None:
        bench.not_run.append(NotRun("images", "the reference has no vision half"))
        return [], [], None
    images = [_noise(vision, shape, bench.options.seed + index) for index, shape in enumerate(SHAPES)]
    shown_by = {id(session): _Shown(session, vision, images) for session in (bench.engine, bench.reference)}
    engine, reference = shown_by[id(bench.engine)], shown_by[id(bench.reference)]
    features = zip(images, engine.features, reference.features, strict=True)
    checks = [_check_features(*of_image) for of_image in features]
    wrong = next((check for check in checks if not check.passed), None)
    if wrong is not None:
        measure = wrong.measures[0]
        part = "the vision graph or the order of its features; what the text model makes of them is not judged"
        return checks, [], Fault(None, "vision half", part, wrong.case, measure.name, measure.value, measure.limit)
    if bench.yardstick is not None:
        bench.not_run.append(
            NotRun("prompts with images", "this engine is judged by a yardstick, which runs text only")
        )
        return checks, [], None
    tokens = _longest_prompt(bench, vision, images)
    if tokens is None:
        wanted = images[0].tokens + 2 * TEXT + bench.options.decode_steps
        reason = f"the engine takes {bench.engine.max_seq_len} tokens, the smallest prompt with an image has {wanted}"
        bench.not_run.append(NotRun("prompts with images", reason))
        return checks, [], None
    on_text = list(bench.failed)
    checks += _check_prompt(bench, tokens, engine, reference)
    fitting = min(bench.options.greedy_tokens, bench.longest - len(tokens))
    (check, run), *_ = continue_greedily(
        bench, [tokens], fitting, lambda session, state: shown_by[id(session)].place(tokens, state)
    )
    check.group = "Greedy answer about images against PyTorch"
    check.case = f"{fitting} tokens behind {engine.case(tokens)}"
    checks.append(check)
    bench.failed[:] = on_text  # what is repeated to find a layer is repeated without images
    return checks, [run], None if on_text else _fault_with_images(checks)


def _fault_with_images(checks: list[Check]) -> Fault | None:
    """Where an engine that passes on text fails on images although their features are right."""
    wrong = next((check for check in checks if check.status == "failed" and check.worst is not None), None)
    if wrong is None or wrong.worst is None:
        return None
    part = (
        "the places that the features take in a prompt; the features themselves and prompts of text keep their limits"
    )
    return Fault(None, "vision half", part, wrong.case, wrong.worst.name, wrong.worst.value, wrong.worst.limit)


class _Shown:
    """The images as one session sees them: its own features, computed once. Images stand in a prompt in this order."""

    def __init__(self, session: Session, vision: VisionHalf, images: list[PreparedImage]) -> None:
        self.mark = vision.image_token_id
        self.features = [cast(ImageSession, session).image_features([image]) for image in images]

    def place(self, tokens: NDArray[np.int64], state: Any) -> None:
        """Let a fresh state's only row show the images at the image tokens of `tokens`: as many as there are places for."""
        places_n = np.flatnonzero(tokens == self.mark)
        state.place_images(0, places_n, np.concatenate(self.features)[: len(places_n)])

    def case(self, tokens: NDArray[np.int64]) -> str:
        """A prompt in words."""
        ends = np.cumsum([len(features_nD) for features_nD in self.features])
        count = 1 + int(np.searchsorted(ends, int((tokens == self.mark).sum())))
        return f"{len(tokens)} tokens with {count} image{'s' if count > 1 else ''}"


def _noise(vision: VisionHalf, shape: tuple[float, float], seed: int) -> PreparedImage:
    """An image of so many tiles' height and width whose pixels are as normalised ones."""
    size = round(shape[0] * vision.tile), round(shape[1] * vision.tile)
    height, width = best_resolution(size, vision.pinpoints)
    count = 1 + height * width // vision.tile**2
    tiles = np.random.default_rng([seed, *size]).standard_normal((count, 3, vision.tile, vision.tile), np.float32)
    return PreparedImage(f"{size[1]} x {size[0]} pixels", size, tiles, token_rows(size, vision))


def _check_features(image: PreparedImage, engine_nD: NDArray[np.float32], reference_nD: NDArray[np.float32]) -> Check:
    same = engine_nD.shape == reference_nD.shape
    errors_n = metrics.relative_norm(reference_nD, engine_nD) if same else np.array([np.inf])
    worst = int(np.argmax(errors_n))
    # Of fp32 whatever the text model computes in; a feature is what a hidden state is, a vector that the text model goes on with.
    limit = EXACT["float32"].hidden.value
    measure = Measure("largest relative error of a token's features", float(errors_n[worst]), limit, f"token {worst}")
    return Check(FEATURES_GROUP, image.name, [measure], len(errors_n), len(errors_n))


def _longest_prompt(bench: Bench, vision: VisionHalf, images: list[PreparedImage]) -> NDArray[np.int64] | None:
    """Text around as many of the images as fit."""
    text = bench.prompt(TEXT, row=4)
    text[text == vision.image_token_id] = 0
    for count in range(len(images), 0, -1):
        ids = [*text, *(token for _ in range(count) for token in (vision.image_token_id, *text))]
        tokens = np.asarray(expand(ids, images[:count], vision.image_token_id), np.int64)
        if len(tokens) + bench.options.decode_steps <= bench.longest:
            return tokens
    return None


def _check_prompt(bench: Bench, prompt: NDArray[np.int64], engine: _Shown, reference: _Shown) -> Iterator[Check]:
    """Prefill and decode behind a prompt with images against PyTorch, and the same prompt in chunks against one piece."""
    steps, judge, length = bench.options.decode_steps, bench.judge, len(prompt)
    tokens = np.concatenate([prompt, np.where((text := bench.prompt(steps, row=5)) == engine.mark, 0, text)])
    pieces = [[length], *([[1]] * steps)]
    place, place_reference = partial(engine.place, prompt), partial(reference.place, prompt)
    expected = observe(bench.reference, [tokens], pieces, want="margins", snapshot_after=[1], prepare=place_reference)
    found = observe(bench.engine, [tokens], pieces, snapshot_after=[1], prepare=place)
    compared = judge.compare(engine.case(prompt), expected, found)
    yield judge.logits_check("Prefill logits with images against PyTorch", compared, lambda p: p < length)
    yield judge.states_check("States after images against PyTorch", compared, lambda row: length)
    yield judge.logits_check("Decode logits behind images against PyTorch", compared, lambda p: p >= length)
    whole = observe(bench.engine, [prompt], prepare=place)
    margins = observe(bench.reference, [prompt], want="margins", prepare=place_reference)
    for chunk in bench.options.chunks:
        yield from _chunked(bench, prompt, f"{engine.case(prompt)} in chunks of {chunk}", chunk, place, whole, margins)


def _chunked(
    bench: Bench,
    prompt: NDArray[np.int64],
    case: str,
    chunk: int,
    place: Callable[[Any], None],
    whole: list[RowTrace],
    margins: list[RowTrace],
) -> Iterator[Check]:
    """In pieces by `forward` and by `prefill`: chunks that end inside images, and equal one piece."""
    judge = bench.judge
    pieced = observe(bench.engine, [prompt], in_chunks([prompt], chunk), prepare=place)
    compared = judge.compare(case, whole, pieced, margins)
    logits = judge.logits_check("Chunked prefill with images against one piece", compared)
    state = bench.engine.new_state(1)
    place(state)
    last_N = bench.engine.prefill([prompt.tolist()], state, chunk)[0]
    direct = judge.compare(
        case, [last_position(whole[0])], [snapshot_trace(prompt, last_N, state.read_row(0))], margins
    ).rows[0]
    value, _ = judge.summary(direct.errors_P[direct.judged_P])
    logits.measures.append(Measure("last logits of prefill()", value, judge.limit("logits", 1)))
    yield logits
    yield judge.states_check("States of chunked prefill with images against one piece", compared)
