"""What generation reports: an event per token while it runs, a result per prompt when it is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of the model itself: before penalty, temperature, top-k and top-p."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), likeliest first


@dataclass(frozen=True)
class TokenEvent:
    """One step of one sequence. Text is what may be shown now: it can be empty, or be the text of several tokens."""

    row: int
    token: int
    text: str = ""
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class GenerationResult:
    """One finished sequence."""

    prompt_tokens: int
    tokens: list[int]  # without the stop token
    text: str | None  # None without a detokenizer; without the stop string
    finish_reason: FinishReason
    stop_reason: int | str | None  # the stop token id or string that ended it
    unfed_tokens: list[int]  # sampled but not yet in the state: put these before what continues the sequence
    time_to_first_token_s: float  # of the whole batch: prefill and the first draw
    decode_tokens_per_s: float | None  # of this sequence, from its second token on; None with fewer than two
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one for each of `tokens`, when asked for

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)
