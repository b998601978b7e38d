"""The generation loop: ragged prefill, then one decode step per token for the rows that are not finished.

Legend: B batch, T new tokens, N vocabulary.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from engines.generation.constraint import allowed_tokens
from engines.generation.results import FinishReason, GenerationResult, TokenEvent, TokenLogprobs
from engines.generation.sampling import Sampler, log_softmax, top_k_ids
from engines.generation.settings import GenerationConfig, GenerationError
from engines.generation.stopping import StopStrings

if TYPE_CHECKING:
    from engines.interface import ImageSession, ImageState, Session
    from engines.vision.pixels import PreparedImage


class Detokenizer(Protocol):
    """Turns the tokens of one sequence into text as they come."""

    def push(self, token: int) -> str:
        """Text that this token completes; may be empty."""

    def finish(self) -> str:
        """Text still open once no more tokens come."""


class Generation:
    """One running batch. Iterate for a TokenEvent per token; `results()` runs it to its end.

    Leaving the iteration early stops the work. `state` continues earlier sequences (chat): the prompts then follow
    what the state holds.
    """

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig | Sequence[GenerationConfig] | None = None,
        *,
        detokenizer: Callable[[], Detokenizer] | None = None,
        state: Any = None,
        prefill_chunk: int | None = None,
        images: Sequence[Sequence[PreparedImage]] | None = None,
    ) -> None:
        """Check the request. Raises GenerationError, before any work, with the row and the numbers at fault.

        `images`: those of each prompt, whose places are the prompt's image tokens (`engines.vision.prompts.expand`).
        """
        self._session = session
        self._prompts = [_token_ids(row, prompt) for row, prompt in enumerate(prompts)]
        configs = _configs(config, len(self._prompts))
        _check_batch(session, len(self._prompts))
        self._prefill_chunk = prefill_chunk
        past_B = np.zeros(len(self._prompts), np.int64) if state is None else np.asarray(state.lengths, dtype=np.int64)
        if len(past_B) != len(self._prompts):
            raise GenerationError(
                f"the state holds {len(past_B)} sequences, but {len(self._prompts)} prompts were given"
            )
        vocab_size = session.vocab_size
        for row, prompt in enumerate(self._prompts):
            check_prompt(row, prompt, int(past_B[row]), session.max_seq_len, vocab_size)
            check_bias(configs[row], vocab_size)
            if configs[row].stop_strings and detokenizer is None:
                raise GenerationError("stop strings need a tokenizer; use stop token ids with this engine")
        self._images = _image_places(session, self._prompts, images, past_B)
        self._state = session.new_state(len(self._prompts)) if state is None else state
        self._rows = [
            Row(row, prompt, configs[row], vocab_size, detokenizer() if detokenizer else None)
            for row, prompt in enumerate(self._prompts)
        ]
        for sequence, past in zip(self._rows, past_B, strict=True):
            # The last token that is sampled need not be fed, so one more fits than the cache has room for.
            room = session.max_seq_len - int(past) - len(sequence.prompt) + 1
            sequence.limit = min(sequence.config.max_new_tokens, room)
        self._events = self._run()

    def __iter__(self) -> Iterator[TokenEvent]:
        return self._events

    def results(self) -> list[GenerationResult]:
        """One result per prompt, in order, after running what is left to run."""
        for _ in self._events:
            pass
        return [row.result(self._first_token_s) for row in self._rows]

    def _run(self) -> Iterator[TokenEvent]:
        start = time.perf_counter()
        self._first_token_s = 0.0
        for row, (places_n, shown) in self._images.items():
            features_nD = cast("ImageSession", self._session).image_features(shown)
            cast("ImageState", self._state).place_images(row, places_n, features_nD)
        logits_BN = self._session.prefill(self._prompts, self._state, chunk=self._prefill_chunk)
        while True:
            active = [row for row in self._rows if row.finish_reason is None]
            events = [row.step(logits_BN[row.index]) for row in active]
            if not self._first_token_s:
                self._first_token_s = time.perf_counter() - start
            yield from events
            active = [row for row in active if row.finish_reason is None]
            if not active:
                return
            logits_BN = self._decode(active)

    def _decode(self, active: list[Row]) -> NDArray[np.floating]:
        ids_B1 = np.zeros((len(self._rows), 1), dtype=np.int64)
        new_lengths_B = np.zeros(len(self._rows), dtype=np.int64)
        for row in active:
            ids_B1[row.index, 0] = row.unfed.pop()
            new_lengths_B[row.index] = 1
        if len(active) == len(self._rows):
            return self._session.decode(ids_B1[:, 0], self._state)
        return self._session.forward(ids_B1, new_lengths_B, self._state, positions="last").logits[:, 0]


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    on_token: Callable[[TokenEvent], None] | None = None,
    *,
    detokenizer: Callable[[], Detokenizer] | None = None,
    state: Any = None,
    prefill_chunk: int | None = None,
) -> list[GenerationResult]:
    """Generate for a batch of token lists of any lengths; rows may finish at different times.

    `config` is one for all prompts or one per prompt. `on_token` is called for each token as it is drawn.
    `detokenizer` makes a fresh Detokenizer per sequence; text and stop strings need it. `state` continues earlier
    sequences (see Generation). Raises GenerationError: empty prompt, prompt beyond the engine's capacity, unknown
    token, more prompts than the batch size.
    """
    generation = Generation(session, prompts, config, detokenizer=detokenizer, state=state, prefill_chunk=prefill_chunk)
    for event in generation:
        if on_token is not None:
            on_token(event)
    return generation.results()


class Row:
    """One sequence while it is being generated."""

    def __init__(
        self, index: int, prompt: list[int], config: GenerationConfig, vocab_size: int, detokenizer: Detokenizer | None
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.config = config
        self.limit = config.max_new_tokens
        self.finish_reason: FinishReason | None = None
        self.unfed: list[int] = []
        self._stop_reason: int | str | None = None
        self._sampler = Sampler(config, vocab_size, prompt)
        self._constraint = config.constraint() if config.constraint is not None else None
        self._detokenizer = detokenizer
        self._stops = StopStrings(config.stop_strings)
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._first_time = self._last_time = 0.0

    def step(self, logits_N: NDArray[np.floating]) -> TokenEvent:
        """Draw one token and decide whether the sequence ends with it."""
        stop_ids = self.config.stop_token_ids
        allowed_N = allowed_tokens(self._constraint, stop_ids) if self._constraint is not None else None
        token = self._sampler.sample(logits_N, allowed_N)
        self._last_time = time.perf_counter()
        self._first_time = self._first_time or self._last_time
        self.unfed.append(token)
        logprobs = None
        text = ""
        if token in stop_ids:
            self.finish_reason, self._stop_reason = "stop", token
        else:
            self._tokens.append(token)
            if self.config.logprobs is not None:
                logprobs = token_logprobs(logits_N, token, self.config.logprobs)
                self._logprobs.append(logprobs)
            if self._detokenizer is not None:
                text = self._stops.feed(self._detokenizer.push(token))
            if self._constraint is not None:
                self._constraint.accept(token)
                if not stop_ids and not self._constraint.allowed()[0].any():
                    self.finish_reason = "stop"  # nothing can follow, and no token says so
        if self.finish_reason is None and self._stops.matched is None and len(self._tokens) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._detokenizer is not None:
            text += self._stops.feed(self._detokenizer.finish())
            text += self._stops.finish()
        if self._stops.matched is not None:
            self.finish_reason, self._stop_reason = "stop", self._stops.matched
        self._pieces.append(text)
        return TokenEvent(self.index, token, text, logprobs, self.finish_reason)

    def result(self, first_token_s: float) -> GenerationResult:
        assert self.finish_reason is not None
        steps = len(self._tokens) + (1 if isinstance(self._stop_reason, int) else 0)
        elapsed = self._last_time - self._first_time
        return GenerationResult(
            prompt_tokens=len(self.prompt),
            tokens=self._tokens,
            text="".join(self._pieces) if self._detokenizer is not None else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            unfed_tokens=list(self.unfed),
            time_to_first_token_s=first_token_s,
            decode_tokens_per_s=(steps - 1) / elapsed if steps > 1 and elapsed > 0 else None,
            logprobs=self._logprobs,
        )


def token_logprobs(logits_N: NDArray[np.floating], token: int, count: int) -> TokenLogprobs:
    """Log-probability of `token` and of the `count` likeliest tokens, by the logits before it."""
    values_N = log_softmax(logits_N)
    top = [int(i) for i in top_k_ids(values_N, count)] if count else []
    return TokenLogprobs(float(values_N[token]), tuple((i, float(values_N[i])) for i in top))


def check_bias(config: GenerationConfig, vocab_size: int) -> None:
    for token, _ in config.logit_bias:
        if token >= vocab_size:
            raise GenerationError(f"logit_bias has token {token}, but the vocabulary is 0 to {vocab_size - 1}")


def _token_ids(row: int, prompt: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise GenerationError(f"prompt {row} must be a list of token ids, which are whole numbers") from None


def _configs(config: GenerationConfig | Sequence[GenerationConfig] | None, count: int) -> list[GenerationConfig]:
    if config is None or isinstance(config, GenerationConfig):
        return [config or GenerationConfig()] * count
    if len(config) != count:
        raise GenerationError(f"{len(config)} generation settings were given for {count} prompts")
    return list(config)


def _image_places(
    session: Session,
    prompts: list[list[int]],
    images: Sequence[Sequence[PreparedImage]] | None,
    past_B: NDArray[np.int64],
) -> dict[int, tuple[NDArray[np.int64], Sequence[PreparedImage]]]:
    """By row: the positions that its images take in the whole sequence, and the images."""
    if images is None or not any(images):
        return {}
    vision = session.config.vision
    if vision is None:
        raise GenerationError("this engine has no vision half and takes no images")
    if len(images) != len(prompts):
        raise GenerationError(f"images were given for {len(images)} prompts, but there are {len(prompts)}")
    found = {}
    for row, (prompt, shown) in enumerate(zip(prompts, images, strict=True)):
        places_n = np.flatnonzero(np.asarray(prompt) == vision.image_token_id)
        wanted = sum(image.tokens for image in shown)
        if len(places_n) != wanted and shown:
            raise GenerationError(f"prompt {row} has {len(places_n)} image tokens, but its images take {wanted}")
        if shown:
            found[row] = places_n + int(past_B[row]), shown
    return found


def _check_batch(session: Session, count: int) -> None:
    if count == 0:
        raise GenerationError("no prompt was given")
    if count > session.max_batch_size:
        raise GenerationError(
            f"{count} prompts are more than the engine's batch size of {session.max_batch_size}; "
            "give fewer at a time, or build with a larger --max-batch-size"
        )


def check_prompt(row: int, prompt: list[int], past: int, capacity: int, vocab_size: int) -> None:
    if not prompt:
        raise GenerationError(f"prompt {row} is empty: it needs at least one token")
    if past + len(prompt) > capacity:
        held = f" after the {past} tokens that its state holds" if past else ""
        raise GenerationError(
            f"prompt {row} has {len(prompt)} tokens{held}, but the engine holds at most {capacity}; "
            "shorten it, or build with a larger --max-seq-len"
        )
    for token in (min(prompt), max(prompt)):
        if not 0 <= token < vocab_size:
            raise GenerationError(f"prompt {row} has token {token}, but the vocabulary is 0 to {vocab_size - 1}")
