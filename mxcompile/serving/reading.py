"""Reading prompts that have slots: in chunks, clients in turn and the prompts of each in turn, within a budget a step.

Before a prompt with images, its images go through the vision graph, a few tiles at a time; each such run takes the turn of a chunk.

Legend: B slots, T new tokens, N vocabulary.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from engines.errors import EngineError
from engines.generation.generate import token_logprobs
from engines.interface import ImageState, Session, State, SteppedImageSession
from mxcompile.serving.cache import StateCache
from mxcompile.serving.job import Job
from mxcompile.serving.metrics import Metrics
from mxcompile.serving.requests import Failed, RequestError

_SCORED_AT_ONCE = 16  # tokens; each has a row of logits for every slot: 8 slots of Text-01 make 0.1 GB


class PromptReading:
    """Prompts in slots that are not read to their end. Belongs to the scheduler's thread."""

    def __init__(
        self,
        session: Session,
        state: State,
        *,
        chunk: int,
        budget: int,
        cache: StateCache | None,
        metrics: Metrics,
        holds: Callable[[Job], bool],
    ) -> None:
        """`holds`: whether a job still has its slot."""
        self._session, self._state, self._chunk, self._budget = session, state, chunk, budget
        self._cache, self._metrics, self._holds = cache, metrics, holds
        self._jobs: deque[Job] = deque()  # next to read first
        self._turns: dict[str, int] = {}  # of the clients that are being read: when each had its last chunk
        self._turn = itertools.count(1)

    def add(self, job: Job) -> None:
        """Read its prompt, from `job.fed` on."""
        self._jobs.append(job)

    def step(self) -> list[tuple[Job, np.ndarray | Failed]]:
        """Spend the budget of one step. Jobs that came to the end of their prompts, with the logits [N] there, and jobs that failed.

        Chunks of several prompts are read in one run: reading each alone takes twice as long.
        """
        ended: list[tuple[Job, np.ndarray | Failed]] = []
        parts: list[tuple[Job, list[int]]] = []
        spent = 0
        self._jobs = deque(job for job in self._jobs if self._holds(job))
        if not self._jobs:
            self._turns.clear()
        blocked = [job for job in self._jobs if job.blocked]
        self._jobs = deque(job for job in self._jobs if job not in blocked)
        encoded: list[Job] = []
        while self._jobs:
            # The client whose last turn was longest ago; its prompts in turn.
            job = min(self._jobs, key=lambda job: self._turns.get(job.client, 0))
            part = job.sequence.prompt[job.fed : job.fed + self._chunk]
            cost = len(part) if job.encoding is None else self._chunk
            if spent and spent + cost > self._budget:
                break
            self._jobs.remove(job)
            self._turns[job.client] = next(self._turn)
            spent += cost
            if job.encoding is None:
                parts.append((job, part))
            elif (failed := self._encode(job)) is not None:
                ended.append((job, failed))
            else:
                encoded.append(job)
        ended += self._read_parts(parts)
        self._jobs.extend(encoded)
        self._jobs.extendleft(reversed(blocked))
        return ended

    def _encode(self, job: Job) -> Failed | None:
        """One run of the vision graph."""
        assert job.encoding is not None
        try:
            done = job.encoding.advance(cast(SteppedImageSession, self._session))
        except RequestError as error:
            return Failed(error.kind, str(error))
        except EngineError as error:  # the states are as they were
            return Failed("internal", str(error))
        if done:
            unread = job.encoding.places(job.past, job.past + job.fed)
            cast(ImageState, self._state).place_images(job.slot, *unread)
            self._metrics.images_encoded(job.encoding.images, job.encoding.tiles)
            job.encoding = None
        return None

    def _read_parts(self, parts: list[tuple[Job, list[int]]]) -> list[tuple[Job, Any]]:
        if not parts:
            return []
        self._metrics.prompt_tokens(sum(len(part) for _, part in parts))
        plain = [(job, part) for job, part in parts if job.request.prompt_logprobs is None]
        logits = {job.slot: logits_N for (job, _), logits_N in zip(plain, self._read(plain), strict=True)}
        ended = []
        for job, part in parts:
            if job.request.prompt_logprobs is not None:
                logits[job.slot] = self._score(job, part, job.request.prompt_logprobs)
            job.fed += len(part)
            if self._cache is not None and job.keys and len(part) == self._chunk:
                self._cache.store(job.keys[: job.fed // self._chunk], self._state, job.slot)
            if job.fed == len(job.sequence.prompt):
                ended.append((job, logits[job.slot]))
            else:
                self._jobs.append(job)
        return ended

    def _read(self, parts: list[tuple[Job, list[int]]]) -> list[np.ndarray]:
        """One chunk for each of some slots; for each the logits [N] after its last token, of use where a prompt ends."""
        slots, longest = self._state.batch_size, max((len(part) for _, part in parts), default=0)
        if not parts:
            return []
        ids_BT, new_B = np.zeros((slots, longest), np.int64), np.zeros(slots, np.int64)
        for job, part in parts:
            ids_BT[job.slot, : len(part)], new_B[job.slot] = part, len(part)
        if any(job.fed + len(part) == len(job.sequence.prompt) for job, part in parts):
            logits_BN = self._session.forward(ids_BT, new_B, self._state).logits[:, 0]
            return [logits_BN[job.slot] for job, _ in parts]
        # No position is asked for: logits cost a product with the whole vocabulary.
        self._session.forward(ids_BT, new_B, self._state, positions=np.zeros((slots, 0), np.int64))
        return [np.zeros(0)] * len(parts)

    def _score(self, job: Job, part: list[int], top: int) -> np.ndarray:
        """One chunk of a prompt whose tokens' log-probabilities are wanted; the logits [N] after its last token."""
        slots, prompt = self._state.batch_size, job.sequence.prompt
        for at in range(0, len(part), _SCORED_AT_ONCE):
            piece = part[at : at + _SCORED_AT_ONCE]
            ids_BT, new_B = np.zeros((slots, len(piece)), np.int64), np.zeros(slots, np.int64)
            ids_BT[job.slot], new_B[job.slot] = piece, len(piece)
            logits_TN = self._session.forward(ids_BT, new_B, self._state, positions="all").logits[job.slot]
            for after, logits_N in enumerate(logits_TN, start=job.fed + at + 1):
                if after < len(prompt):
                    job.scores.append(token_logprobs(logits_N, prompt[after], top))
        return logits_TN[-1]
