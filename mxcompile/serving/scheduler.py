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
   allow: a long prompt delays neither the running answers nor a short prompt behind it by more than the budget. The
   images of a prompt are decoded in another process, meanwhile others go on; then a run of the vision graph on a few
   tiles takes the turn of a chunk.

A request for several answers has its prompt read once, in one slot; what that row remembers is then copied to a slot
for each further answer, as they become free.

Legend: B slots, N vocabulary.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

import numpy as np

from engines.generation import ConstraintError, GenerationError
from engines.generation.generate import Detokenizer, Row, check_bias, check_prompt
from engines.interface import RowSnapshot, Session
from mxcompile.serving.cache import SessionStore, StateCache
from mxcompile.serving.encoding import Encoding
from mxcompile.serving.fair_queue import FairQueue
from mxcompile.serving.image_reader import ImageReader
from mxcompile.serving.job import Job, Read, Ticket
from mxcompile.serving.metrics import Metrics
from mxcompile.serving.reading import PromptReading
from mxcompile.serving.requests import MOST_ANSWERS, Failed, Finished, Limits, PromptRead, Request, RequestError


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
        images: ImageReader | None = None,
        prefill_chunk: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`images` decodes those of requests, which may have none without it. `prefill_chunk` defaults to the engine's own; a cache's
        block must be the same size.
        """
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self._session, self._detokenizer, self._clock = session, detokenizer, clock
        self._cache, self._sessions, self._images = cache, sessions, images
        self._chunk = prefill_chunk or session.config.limits.prefill_chunk
        if cache is not None and cache.block != self._chunk:
            raise ValueError(f"the cache's block of {cache.block} tokens is not the prefill chunk of {self._chunk}")
        self._state = session.new_state(session.max_batch_size)
        self._slots: list[Job | None] = [None] * session.max_batch_size
        self._free = list(range(session.max_batch_size))  # a heap
        self._reading = PromptReading(
            session,
            self._state,
            chunk=self._chunk,
            budget=self.limits.prefill_budget or self._chunk,
            cache=cache,
            metrics=self.metrics,
            holds=lambda job: self._slots[job.slot] is job,
        )
        self._tickets = itertools.count(1)
        # The rest is shared between threads, under the lock.
        self._changed = threading.Condition()
        self._queue: FairQueue[Job] = FairQueue()
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
            job = Job(next(self._tickets), request, request.config, request.emit, self._clock())
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
            if self._cancelled or (self.idle and self._closed is not None):
                return
            if self.idle or (not (len(self._queue) and self._free) and self._all_blocked()):
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

    def _all_blocked(self) -> bool:
        return all(job is None or job.blocked for job in self._slots)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

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
        if request.images:
            self._check_images(request)
        try:
            check_prompt(0, prompt, past, self._session.max_seq_len, self._session.vocab_size)
            check_bias(request.config, self._session.vocab_size)
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

    def _check_images(self, request: Request) -> None:
        if self._images is None:
            raise RequestError("this server reads no images")
        if request.prompt_logprobs is not None:
            raise RequestError(
                "the tokens of an image have no log-probabilities; ask for those of a prompt without images"
            )
        waiting = sum(job.request.image_bytes for job in self._queue if job.read is None)
        if waiting and waiting + request.image_bytes > self.limits.max_image_bytes:
            raise RequestError(f"{waiting} bytes of images are waiting already; try again later", "unavailable")

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

    def _go_on(self, job: Job, read: Read) -> None:
        """Give a further answer its slot and its first token."""
        job.read = None
        self._state.write_row(job.slot, read.snapshot)
        self._begin(job, job.request.prompt)
        self._draw(job, read.logits_N)

    def _begin(self, job: Job, prompt: list[int]) -> None:
        make = self._detokenizer
        job.row = Row(job.slot, prompt, job.config, self._session.vocab_size, make() if make else None)
        # The last token that is drawn need not be fed, so one more fits than the engine has room for.
        job.row.limit = min(job.config.max_new_tokens, self._session.max_seq_len - job.past - len(prompt) + 1)

    def _place(self, job: Job) -> None:
        """Give a request its slot: empty, or with what a session or the prefix cache remembers."""
        request = job.request
        self._state.clear_row(job.slot)
        prompt, job.images = request.prompt, list(request.images)
        found: RowSnapshot | None = None
        if request.session is not None and not request.session_start:
            assert self._sessions is not None
            saved = self._sessions.load(request.session)
            if saved is None:  # dropped for room, or its file was damaged, since the request came
                self._fail(job.ticket, Failed("invalid", f"session {request.session!r} was dropped; start it again"))
                return
            prompt, found = [*saved.unfed, *prompt], saved.snapshot
            job.images = [image.behind(len(saved.unfed)) for image in job.images]
            job.past = job.cached = found.length
        elif self._cache is not None and request.prompt_logprobs is None:
            job.keys = self._cache.keys(prompt, job.images)
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
        unknown = [image for image in job.images if image.end > job.fed]
        self.metrics.images_known(len(job.images) - len(unknown))
        if unknown:
            assert self._images is not None
            job.encoding = Encoding(unknown, self._images, self._wake)
        self._reading.add(job)

    def _decode(self, jobs: list[Job]) -> None:
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
        for job, outcome in self._reading.step():
            if isinstance(outcome, Failed):
                self._fail(job.ticket, outcome)
                continue
            if job.request.prompt_logprobs is not None:
                job.emit(PromptRead(job.sequence.prompt, job.scores))
            if job.unborn:
                self._fork(job, outcome)
            self._draw(job, outcome)

    def _fork(self, job: Job, logits_N: np.ndarray) -> None:
        """Let the further answers wait for slots, before the other requests of their client."""
        read = Read(self._state.read_row(job.slot), logits_N.copy())
        with self._changed:
            for config, emit in reversed(job.unborn):
                other = Job(job.ticket, job.request, config, emit, job.arrived, read)
                other.cached = job.cached
                self._queue.push(other, first=True)
        job.unborn.clear()

    def _draw(self, job: Job, logits_N: np.ndarray) -> None:
        if self._slots[job.slot] is not job:
            return  # another answer to its prompt has failed
        try:
            event = job.sequence.step(logits_N)
        except GenerationError as error:
            self._fail(job.ticket, Failed("invalid" if isinstance(error, ConstraintError) else "internal", str(error)))
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

    def _finish(self, job: Job, event: Finished) -> None:
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

    def _release(self, job: Job) -> None:
        if job.encoding is not None:
            job.encoding.drop()
        self._slots[job.slot] = None
        heapq.heappush(self._free, job.slot)
        self._queue.ended(job.client)

    def _close(self, job: Job) -> None:
        del self._open[job.ticket]
        if job.request.session is not None:
            self._busy_sessions.discard(job.request.session)
