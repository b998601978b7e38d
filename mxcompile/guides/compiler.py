"""From a guide to the constraints that answers follow.

Legend: N vocabulary.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.generation import Constraint, ConstraintError
from mxcompile.errors import MxcompileError
from mxcompile.guides.guide import Guide, GuideError
from mxcompile.guides.library import check_installed, make_matcher, make_tokenizer, shortened
from mxcompile.guides.trial import STACK, Trial
from mxcompile.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance


T = TypeVar("T")


class GuideCompiler:
    """Compiles guides for the vocabulary of one engine."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        """`vocab_size` of the engine, which may be padded beyond the tokenizer's. Costs nothing until it is used."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._trial: Trial | None = None
        self._made: tuple[llguidance.LLTokenizer, NDArray[np.bool_]] | None = None

    def prepare(self) -> None:
        """Do what is needed once: a second or two for 200,000 tokens. Does nothing without a tokenizer or the library."""
        with self._lock, contextlib.suppress(MxcompileError):  # whoever compiles will be told
            self._ready()

    def compile(self, guide: Guide) -> Callable[[], Constraint]:
        """Makes constraints, one for each answer. From any thread, one guide at a time.

        Raises GuideError for a guide that cannot be followed, EnvironmentProblem when the library is missing,
        MxcompileError for an engine without a tokenizer.
        """
        with self._lock:
            tokenizer, known_N = self._ready()
            assert self._trial is not None
            grammar = self._trial.compile(guide)
            matcher = _with_deep_stack(lambda: make_matcher(tokenizer, grammar, guide.kind))
            make = partial(_Follower, matcher, known_N)
            try:
                make().allowed()  # with the whole vocabulary; too much of it is told here and not at the first token
            except ConstraintError as error:
                raise GuideError(f"{guide.kind}: {error}") from error
            return make

    def close(self) -> None:
        """End the process that tries guides, if there is one."""
        with self._lock:
            if self._trial is not None:
                self._trial.close()

    def _ready(self) -> tuple[llguidance.LLTokenizer, NDArray[np.bool_]]:
        if self._made is None:
            text = self._tokenizer
            if text is None:
                raise MxcompileError("an answer under a guide needs a tokenizer, which this engine was built without")
            if not text.byte_level:
                raise MxcompileError("an answer under a guide needs a byte-level tokenizer, which this engine's is not")
            check_installed()
            tokens = [text.token_bytes(token) for token in range(self._vocab_size)]
            special = sorted(token for token in text.special if token < self._vocab_size and tokens[token])
            self._trial = Trial(self._vocab_size, [(token, tokens[token].decode()) for token in special])

            def encode(data: bytes) -> list[int]:
                return text.encode(data.decode(errors="replace"))

            known_N = np.array([bool(token) for token in tokens])
            self._made = make_tokenizer([*tokens, b"<end of the answer>"], special, encode), known_N
        return self._made


def _with_deep_stack(work: Callable[[], T]) -> T:
    """Do `work` with twice the stack that was enough in the trial."""
    found: Future[T] = Future()

    def do() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    before = threading.stack_size(2 * STACK)  # of the next thread; one that another thread starts now gets as much, too
    try:
        thread = threading.Thread(target=do)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    return found.result()


class _Follower:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, known_N: NDArray[np.bool_]) -> None:
        """`known_N`: ids that stand for something, not those of a padded vocabulary."""
        self._matcher, self._known_N = matcher.deep_copy(), known_N

    def allowed(self) -> tuple[NDArray[np.bool_], bool]:
        size = self._known_N.shape[0]
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=size + 1, bitorder="little").view(np.bool_)
        return allowed[:size] & self._known_N, bool(allowed[size])

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = shortened(self._matcher.get_error())
            raise ConstraintError(f"the answer cannot follow its schema or grammar any further: {reason}")
