"""Requests whose answers must follow a guide: reading them, and compiling the guide where nobody waits for it."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engines.generation import Constraint
from mxcompile.guides import Guide
from mxcompile.serving.requests import RequestError

if TYPE_CHECKING:
    from mxcompile.loading import LoadedEngine

KIND, TEXT = "guided_decoding_guide_type", "guided_decoding_guide"
"""Inputs of a request, as TensorRT-LLM's backend for Triton names them."""
MOST_WAITING = 64
"""Requests whose guides wait to be compiled; each takes two seconds at most."""


def read_constraint(message: dict[str, Any], engine: LoadedEngine) -> Callable[[], Constraint] | None:
    """What a "generate" message wants answers to follow. Raises MxcompileError for a guide that cannot be followed."""
    if KIND not in message:
        if TEXT in message:
            raise RequestError(f"{TEXT} needs {KIND}")
        return None
    return engine.guides.compile(Guide(message[KIND], message.get(TEXT, "")))


def read_bias(message: dict[str, Any]) -> tuple[tuple[int, float], ...]:
    """What a "generate" message adds to the logits of which tokens."""
    ids, values = message.get("logit_bias_ids", ()), message.get("logit_bias_values", ())
    if len(ids) != len(values):
        raise RequestError(f"there are {len(ids)} logit_bias_ids, but {len(values)} logit_bias_values")
    return tuple(zip(ids, values, strict=True))


class Compiling:
    """Handles messages that have a guide on a thread of its own, in order: neither steps nor other messages wait for it."""

    def __init__(
        self,
        handle: Callable[[dict[str, Any]], None],
        refuse: Callable[[dict[str, Any], str, str], None],
        cancel: Callable[[int], None],
    ) -> None:
        """`handle` compiles a message's guide and submits its request, or answers why not. `refuse` answers a message with a
        kind of failure and a reason; `cancel` takes a submitted request back.
        """
        self._handle, self._refuse, self._cancel = handle, refuse, cancel
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._now: int | None = None  # the request whose guide is being compiled
        self._left = False  # its client is gone
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether all that was put has been handled."""
        with self._changed:
            return not self._waiting and self._now is None

    def put(self, message: dict[str, Any]) -> None:
        """Have a message handled, unless too many wait already."""
        with self._changed:
            full = len(self._waiting) >= MOST_WAITING
            if not full:
                self._waiting[message["id"]] = message
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify()
        if full:
            self._refuse(message, "unavailable", f"{MOST_WAITING} schemas and grammars wait already; try again later")

    def drop(self, number: int) -> bool:
        """Cancel the request of this number; whether it was here."""
        with self._changed:
            if self._now == number:
                self._left = True
                return True
            message = self._waiting.pop(number, None)
        if message is not None:
            self._refuse(message, "cancelled", "the request was cancelled")
        return message is not None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                number, message = self._waiting.popitem(last=False)
                self._now, self._left = number, False
            with contextlib.suppress(ConnectionError):  # a refusal that nobody reads any more
                self._handle(message)
            with self._changed:
                left, self._now = self._left, None
            if left:
                self._cancel(number)
