"""One answer on its way through the scheduler.

Legend: N vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engines.generation import GenerationConfig, TokenLogprobs
from engines.generation.generate import Row
from engines.interface import RowSnapshot
from mxcompile.serving.encoding import Encoding
from mxcompile.serving.images import PromptImage
from mxcompile.serving.requests import Emit, Request

Ticket = int


@dataclass(frozen=True)
class Read:
    """A prompt that was read: what a row remembers of it, and the logits [N] after it."""

    snapshot: RowSnapshot
    logits_N: np.ndarray


@dataclass(eq=False)
class Job:
    """`slot` is -1 while it waits; `fed` counts prompt tokens that its row has seen."""

    ticket: Ticket
    request: Request
    config: GenerationConfig
    emit: Emit
    arrived: float
    read: Read | None = None  # of a further answer: what the first one's slot has read for it
    unborn: list[tuple[GenerationConfig, Emit]] = field(default_factory=list)  # answers that wait for this one's prompt
    slot: int = -1
    row: Row | None = None
    fed: int = 0
    scores: list[TokenLogprobs] = field(default_factory=list)  # of the prompt from its second token on, if asked for
    images: list[PromptImage] = field(default_factory=list)  # by their places in what is read, unfed tokens included
    encoding: Encoding | None = None  # of those that are not known; None when there is none to wait for
    keys: list[bytes] = field(default_factory=list)  # of the prompt's whole blocks, where the prefix cache is asked
    past: int = 0  # tokens of the session before this request
    cached: int = 0
    last_token: float = 0.0

    @property
    def client(self) -> str:
        return self.request.client

    @property
    def sequence(self) -> Row:
        assert self.row is not None
        return self.row

    @property
    def blocked(self) -> bool:
        """Whether nothing can be done for it until an image is decoded."""
        return self.encoding is not None and not self.encoding.ready
