"""What a client asks of the scheduler and what comes back, free of any protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engines.generation import GenerationConfig, GenerationResult, TokenEvent, TokenLogprobs
from mxcompile.errors import MxcompileError

if TYPE_CHECKING:
    from mxcompile.serving.images import PromptImage

# invalid: the request can never be served as it is; limited: not now, this client has too many already; unavailable:
# not now; cancelled: the client left; internal: the engine failed on it.
FailureKind = Literal["invalid", "limited", "unavailable", "cancelled", "internal"]
MOST_ANSWERS = 128
"""Answers of one request at most; each takes a slot while it is written."""


class RequestError(MxcompileError):
    """A request that is refused; `kind` says whether asking again may help."""

    def __init__(self, message: str, kind: FailureKind = "invalid") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Finished:
    """A request's end. `cached_tokens` of its context came from a session or the prefix cache, not from a prefill."""

    result: GenerationResult
    cached_tokens: int


@dataclass(frozen=True)
class Failed:
    """A request's other end."""

    kind: FailureKind
    message: str


@dataclass(frozen=True)
class PromptRead:
    """The prompt was read: its tokens, and the log-probability of each but the first, which nothing precedes."""

    tokens: list[int]
    logprobs: list[TokenLogprobs]


Event = PromptRead | TokenEvent | Finished | Failed
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Request:
    """One generation. Events arrive in order on the scheduler's thread; Finished or Failed is the last, exactly once.

    `session` continues the named session: `prompt` then follows what it holds. `session_start` begins it anew.
    `client` is whom to be fair to. `others` are further answers to the same prompt, which is read once for all; each
    has events of its own. `prompt_logprobs` asks for a PromptRead before the first token, to the first answer, with so
    many of the likeliest tokens; the prompt is then read whole and in small pieces. `images` take places of `prompt`, in
    ascending order. `emit` must not block and must not call the scheduler.
    """

    prompt: list[int]
    config: GenerationConfig
    emit: Emit
    session: str | None = None
    session_start: bool = False
    client: str = ""
    others: tuple[tuple[GenerationConfig, Emit], ...] = ()
    prompt_logprobs: int | None = None
    images: tuple[PromptImage, ...] = ()

    @property
    def image_bytes(self) -> int:
        """Bytes of the image files that it holds."""
        return sum(len(image.data) for image in self.images)


@dataclass(frozen=True)
class Limits:
    """What the scheduler lets in.

    `max_queue`: requests waiting for a slot; `max_queue_per_client`: of one client (default: as many). `max_wait_s`:
    seconds one may wait. `max_prompt_tokens`: longest prompt of one request (default: the engine's max_seq_len).
    `prefill_budget`: prompt tokens read between two decode steps (default: one chunk); at least one chunk is always
    read. `max_image_bytes`: image files of all requests that wait for a slot.
    """

    max_queue: int = 256
    max_wait_s: float = 60.0
    max_prompt_tokens: int | None = None
    prefill_budget: int | None = None
    max_queue_per_client: int | None = None
    max_image_bytes: int = 1 << 29
