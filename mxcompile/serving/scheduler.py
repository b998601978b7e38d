"""In-flight batching on one session: requests enter free slots between steps, prompts are read in chunks.

What holds whatever else is being served: a request's prompt is read in the same chunks as `engines.generation` reads
it, its row is its own, and its draws use its own random stream. Runs are shared; they round as the engine's kernels
do for that many rows, which can tip a draw only where two tokens or two experts tie to the last bits.

Rules of a step, in this order:
1. cancelled requests leave their slots; waiting ones that are too old are refused;
2. free slots are filled from the queue, the least served client first and its requests in order of arrival, lowest
   slot first (idle rows cost least at the end);
3. every sequence that decodes gets one token, in one run;
4. prompts are read one chunk each, clients in turn and the prompts of each in turn, as many as `prefill_budget` tokens
   allow: a long prompt delays neither the running answers nor a short prompt behind it by more than the budget.

A request for several answers has its prompt read once, in one slot; what that row remembers is then copied to a slot
for each further answer, as they become free.

Legend: B slots, T new tokens, N vocabulary.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engines.generation import GenerationConfig, GenerationError, TokenLogprobs
from engines.generation.generate import Detokenizer, Row, check_prompt, token_logprobs
from engines.interface import RowSnapshot, Session
from mxcompile.serving.cache import SessionStore, StateCache
from mxcompile.serving.fair_queue import FairQueue
from mxcompile.serving.metrics import Metrics
from mxcompile.serving.requests import (
    MOST_ANSWERS,
    Emit,
    Failed,
    Finished,
    Limits,
    PromptRead,
    Request,
    RequestError,
)

Ticket = int
_SCORED_AT_ONCE = 16  # tokens; each has a row of logits for every slot: 8 slots of Text-01 make 0.1 GB


@dataclass(frozen=True)
class _Read:
    """A prompt that was read: what a row remembers of it, and the logits [N] after it."""

    snapshot: RowSnapshot
    logits_N: np.ndarray


@dataclass(eq=False)
class _Job:
    """One answer on its way. `slot` is -1 while it waits; `fed` counts prompt tokens that its row has seen."""

    ticket: Ticket
    request: Request
    config: GenerationConfig
    emit: Emit
    arrived: float
    read: _Read | None = None  # of a further answer: what the first one's slot has read for it
    unborn: list[tuple[GenerationConfig, Emit]] = field(default_factory=list)  # answers that wait for this one's prompt
    slot: int = -1
    row: Row | None = None
    fed: int = 0
    scores: list[TokenLogprobs] = field(default_factory=list)  # of the prompt from its second token on, if asked for
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


class Scheduler:
    """Serves requests on one session. `submit` and `cancel` from any thread, `step` from one."""

    def __init__(
        self,
        session: Session,
        *,
        limits: Limits | None = None,
        detokenizer: Callable[[], Detokenizer] | None = None,
        cache: StateCache | None = None,
        sessions: SessionStore | None = None,
        prefill_chunk: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prefill_chunk` defaults to the engine's own; a cache's block must be the same size."""
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self._session, self._detokenizer, self._clock = session, detokenizer, clock
        self._cache, self._sessions = cache, sessions
        self._chunk = prefill_chunk or session.config.limits.prefill_chunk
        if cache is not None and cache.block != self._chunk:
            raise ValueError(f"the cache's block of {cache.block} tokens is not the prefill chunk of {self._chunk}")
        self._budget = self.limits.prefill_budget or self._chunk
        self._state = session.new_state(session.max_batch_size)
        self._slots: list[_Job | None] = [None] * session.max_batch_size
        self._free = list(range(session.max_batch_size))  # a heap
        self._reading: deque[_Job] = deque()  # in slots, prompt not read to its end; next to read first
        self._turns: dict[str, int] = {}  # of the clients that are being read: when each had its last chunk
        self._turn = itertools.count(1)
        self._tickets = itertools.count(1)
        # The rest is shared between threads, under the lock.
        self._changed = threading.Condition()
        self._queue: FairQueue[_Job] = FairQueue()
        self._open: dict[Ticket, int] = {}  # answers that have not ended
        self._cancelled: set[Ticket] = set()
        self._busy_sessions: set[str] = set()
        self._closed: str | None = None  # why nothing is let in any more

    @property
    def active(self) -> int:
        """Occupied slots."""
        return len(self._slots) - len(self._free)

    @property
    def waiting(self) -> int:
        """Answers in the queue."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Nothing to do until the next `submit`."""
        return not len(self._queue) and self.active == 0

    def submit(self, request: Request) -> Ticket:
        """Queue a request. Raises RequestError, and then emits nothing, when it cannot be served."""
        with self._changed:
            try:
                self._check(request)
            except RequestError as error:
                self.metrics.refused(error.kind)
                raise
            job = _Job(next(self._tickets), request, request.config, request.emit, self._clock())
            job.unborn += request.others
            self._open[job.ticket] = 1 + len(request.others)
            if request.session is not None:
                self._busy_sessions.add(request.session)
            self._queue.push(job)
            self._changed.notify()
            return job.ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request; it ends with Failed("cancelled") unless it is finished by then."""
        with self._changed:
            self._cancelled.add(ticket)
            self._changed.notify()

    def drain(self) -> None:
        """Refuse what comes from now on; what was let in is served to its end."""
        with self._changed:
            self._closed = "the server is shutting down"
            self._changed.notify()

    def wait(self, timeout: float) -> None:
        """Return when there may be something to do, or after `timeout` seconds."""
        with self._changed:
            if self.idle and not self._cancelled and self._closed is None:
                self._changed.wait(timeout)

    def step(self) -> bool:
        """Advance everything by one step; returns whether there was anything to do.

        An exception of the session passes through: its state is lost then, call `fail_all`.
        """
        self._admit()
        decoding = [job for job in self._slots if job is not None and job.sequence.unfed]
        if decoding:
            self._decode(decoding)
        self._read_prompts()
        self.metrics.occupancy(self.active, self.waiting)
        return bool(decoding) or self.active > 0

    def fail_all(self, message: str) -> None:
        """The engine is gone: end every request with Failed("unavailable"), and refuse what comes, with `message`."""
        with self._changed:
            self._closed = message
            tickets = {job.ticket for job in [*self._queue, *self._slots] if job is not None}
        for ticket in tickets:
            self._fail(ticket, Failed("unavailable", message))

    def _check(self, request: Request) -> None:
        if self._closed is not None:
            raise RequestError(self._closed, "unavailable")
        past = 0
        longest = self.limits.max_prompt_tokens
        if longest is not None and len(request.prompt) > longest:
            raise RequestError(f"the prompt has {len(request.prompt)} tokens; this server takes at most {longest}")
        prompt = request.prompt
        if len(request.others) >= MOST_ANSWERS:
            raise RequestError(f"{len(request.others) + 1} answers were asked for; at most {MOST_ANSWERS} are written")
        if request.session is not None:
            if request.others:
                raise RequestError("a session goes on with one answer; ask for one")
            if request.prompt_logprobs is not None:
                raise RequestError(
                    "a session's prompt has no log-probabilities of its own; send the whole conversation"
                )
            if self._sessions is None:
                raise RequestError("this server keeps no sessions; send the whole conversation without session_id")
            if request.session in self._busy_sessions:
                raise RequestError(f"session {request.session!r} is still answering another request", "unavailable")
            if not request.session_start:
                held = self._sessions.load(request.session)
                if held is None:
                    raise RequestError(
                        f"session {request.session!r} is not known (it was never started, or was dropped for room); "
                        "send the whole conversation with session_start"
                    )
                past, prompt = held.length, [*held.unfed, *request.prompt]
        try:
            check_prompt(0, prompt, past, self._session.max_seq_len, self._session.vocab_size)
        except GenerationError as error:
            raise RequestError(str(error).replace("prompt 0", "the prompt")) from error
        if request.config.stop_strings and self._detokenizer is None:
            raise RequestError("stop strings need a tokenizer, which this engine was built without")
        waiting, own = len(self._queue), self._queue.waiting_of(request.client)
        if self._free and not waiting:
            return
        if self.limits.max_queue_per_client is not None and own >= self.limits.max_queue_per_client:
            raise RequestError(f"{own} requests of this client are waiting already; try again later", "limited")
        if waiting >= self.limits.max_queue:
            raise RequestError(f"{waiting} requests are waiting already; try again later", "unavailable")

    def _admit(self) -> None:
        now = self._clock()
        oldest = now - self.limits.max_wait_s
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            late = {job.ticket for job in self._queue if job.arrived < oldest and job.read is None}
        for ticket in cancelled:
            self._fail(ticket, Failed("cancelled", "the request was cancelled"))
        for ticket in late - cancelled:
            message = f"no slot became free within {self.limits.max_wait_s:g} s; try again later"
            self._fail(ticket, Failed("unavailable", message))
        while True:
            with self._changed:
                if not self._free or not len(self._queue):
                    return
                job = self._queue.pop()
                job.slot = heapq.heappop(self._free)
                self._slots[job.slot] = job
            if job.read is not None:
                self._go_on(job, job.read)
            else:
                self.metrics.queued(now - job.arrived)
                self._place(job)

    def _go_on(self, job: _Job, read: _Read) -> None:
        """Give a further answer its slot and its first token."""
        job.read = None
        self._state.write_row(job.slot, read.snapshot)
        self._begin(job, job.request.prompt)
        self._draw(job, read.logits_N)

    def _begin(self, job: _Job, prompt: list[int]) -> None:
        make = self._detokenizer
        job.row = Row(job.slot, prompt, job.config, self._session.vocab_size, make() if make else None)
        # The last token that is drawn need not be fed, so one more fits than the engine has room for.
        job.row.limit = min(job.config.max_new_tokens, self._session.max_seq_len - job.past - len(prompt) + 1)

    def _place(self, job: _Job) -> None:
        """Give a request its slot: empty, or with what a session or the prefix cache remembers."""
        request = job.request
        self._state.clear_row(job.slot)
        prompt = request.prompt
        found: RowSnapshot | None = None
        if request.session is not None and not request.session_start:
            assert self._sessions is not None
            saved = self._sessions.load(request.session)
            if saved is None:  # dropped for room, or its file was damaged, since the request came
                self._fail(job.ticket, Failed("invalid", f"session {request.session!r} was dropped; start it again"))
                return
            prompt, found = [*saved.unfed, *prompt], saved.snapshot
            job.past = job.cached = found.length
        elif self._cache is not None and request.prompt_logprobs is None:
            job.keys = self._cache.keys(prompt)
            # At least one token must be read, for its logits.
            found = self._cache.find(job.keys[: (len(prompt) - 1) // self._chunk])
            if found is not None:
                job.fed = job.cached = found.length
            self.metrics.prefix(job.fed, len(prompt))
        if found is not None:
            self._state.write_row(job.slot, found)
        with self._changed:
            # At once, not as it is read: the next slot must see it.
            self._queue.charge(job.client, len(prompt) - job.fed)
        self._begin(job, prompt)
        self._reading.append(job)

    def _decode(self, jobs: list[_Job]) -> None:
        slots = len(self._slots)
        ids_B1, new_B = np.zeros((slots, 1), np.int64), np.zeros(slots, np.int64)
        for job in jobs:
            ids_B1[job.slot, 0] = job.sequence.unfed.pop()
            new_B[job.slot] = 1
        if len(jobs) == slots:
            logits_BN = self._session.decode(ids_B1[:, 0], self._state)
        else:
            logits_BN = self._session.forward(ids_B1, new_B, self._state).logits[:, 0]
        self.metrics.decode_step(len(jobs))
        for job in jobs:
            self._draw(job, logits_BN[job.slot])

    def _read_prompts(self) -> None:
        """Read chunks of several prompts in one run, up to the budget: reading each alone takes twice as long."""
        parts: list[tuple[_Job, list[int]]] = []
        spent = 0
        if not self._reading:
            self._turns.clear()
        while self._reading:
            # The client whose last turn was longest ago; its prompts in turn.
            job = min(self._reading, key=lambda job: self._turns.get(job.client, 0))
            part = job.sequence.prompt[job.fed : job.fed + self._chunk]
            if parts and spent + len(part) > self._budget:
                break
            self._reading.remove(job)
            self._turns[job.client] = next(self._turn)
            if self._slots[job.slot] is job:  # not cancelled
                parts.append((job, part))
                spent += len(part)
        if not parts:
            return
        self.metrics.prompt_tokens(spent)
        plain = [(job, part) for job, part in parts if job.request.prompt_logprobs is None]
        logits = {job.slot: logits_N for (job, _), logits_N in zip(plain, self._read(plain), strict=True)}
        for job, part in parts:
            if job.request.prompt_logprobs is not None:
                logits[job.slot] = self._score(job, part, job.request.prompt_logprobs)
            job.fed += len(part)
            if self._cache is not None and job.keys and len(part) == self._chunk:
                self._cache.store(job.keys[: job.fed // self._chunk], self._state, job.slot)
            if job.fed == len(job.sequence.prompt):
                if job.request.prompt_logprobs is not None:
                    job.emit(PromptRead(job.sequence.prompt, job.scores))
                if job.unborn:
                    self._fork(job, logits[job.slot])
                self._draw(job, logits[job.slot])
            else:
                self._reading.append(job)

    def _read(self, parts: list[tuple[_Job, list[int]]]) -> list[np.ndarray]:
        """One chunk for each of some slots; for each the logits [N] after its last token, of use where a prompt ends."""
        slots, longest = len(self._slots), max((len(part) for _, part in parts), default=0)
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

    def _score(self, job: _Job, part: list[int], top: int) -> np.ndarray:
        """One chunk of a prompt whose tokens' log-probabilities are wanted; the logits [N] after its last token."""
        slots, prompt = len(self._slots), job.sequence.prompt
        for at in range(0, len(part), _SCORED_AT_ONCE):
            piece = part[at : at + _SCORED_AT_ONCE]
            ids_BT, new_B = np.zeros((slots, len(piece)), np.int64), np.zeros(slots, np.int64)
            ids_BT[job.slot], new_B[job.slot] = piece, len(piece)
            logits_TN = self._session.forward(ids_BT, new_B, self._state, positions="all").logits[job.slot]
            for after, logits_N in enumerate(logits_TN, start=job.fed + at + 1):
                if after < len(prompt):
                    job.scores.append(token_logprobs(logits_N, prompt[after], top))
        return logits_TN[-1]

    def _fork(self, job: _Job, logits_N: np.ndarray) -> None:
        """Let the further answers wait for slots, before the other requests of their client."""
        read = _Read(self._state.read_row(job.slot), logits_N.copy())
        with self._changed:
            for config, emit in reversed(job.unborn):
                other = _Job(job.ticket, job.request, config, emit, job.arrived, read)
                other.cached = job.cached
                self._queue.push(other, first=True)
        job.unborn.clear()

    def _draw(self, job: _Job, logits_N: np.ndarray) -> None:
        if self._slots[job.slot] is not job:
            return  # another answer to its prompt has failed
        try:
            event = job.sequence.step(logits_N)
        except GenerationError as error:
            self._fail(job.ticket, Failed("internal", str(error)))
            return
        now = self._clock()
        if job.last_token:
            self.metrics.next_token(now - job.last_token)
        else:
            self.metrics.first_token(now - job.arrived)
        job.last_token = now
        with self._changed:
            self._queue.charge(job.client, 1)
        job.emit(event)
        if event.finish_reason is not None:
            self._finish(job, Finished(job.sequence.result(now - job.arrived), job.cached))

    def _finish(self, job: _Job, event: Finished) -> None:
        request = job.request
        if request.session is not None:
            assert self._sessions is not None
            self._sessions.save(request.session, self._state.read_row(job.slot), event.result.unfed_tokens)
        with self._changed:
            self._release(job)
            self._open[job.ticket] -= 1
            ended = not self._open[job.ticket]
            if ended:
                self._close(job)
        if ended:
            self.metrics.ended("finished")
        job.emit(event)

    def _fail(self, ticket: Ticket, failure: Failed) -> None:
        """End what is left of a request, if anything is. A session stays as it was before."""
        with self._changed:
            jobs = [job for job in self._slots if job is not None and job.ticket == ticket]
            for job in jobs:
                self._release(job)
            jobs += self._queue.remove(lambda job: job.ticket == ticket)
            if not jobs:
                return
            self._close(jobs[0])
        self.metrics.ended(failure.kind)
        for job in jobs:
            for emit in [job.emit, *(emit for _, emit in job.unborn)]:
                emit(failure)

    def _release(self, job: _Job) -> None:
        self._slots[job.slot] = None
        heapq.heappush(self._free, job.slot)
        self._queue.ended(job.client)

    def _close(self, job: _Job) -> None:
        del self._open[job.ticket]
        if job.request.session is not None:
            self._busy_sessions.discard(job.request.session)
