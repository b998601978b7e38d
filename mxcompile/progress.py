"""How long work reports its progress, without knowing who shows it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Stage(Protocol):
    """One stage while it runs."""

    def advance(self, amount: int = 1) -> None:
        """So many more of the stage's units are done."""


class Progress(Protocol):
    """Shows stages one after the other."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """Enter a stage of `total` units (None: unknown)."""


class SilentStage:
    """A stage that nobody watches."""

    def advance(self, amount: int = 1) -> None:
        """Nothing to show."""


class SilentProgress:
    """The progress of library calls: nothing is shown."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        yield SilentStage()


class StageClock:
    """Wraps a Progress and keeps how long each stage took, in `seconds` (stages of one name add up)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        start = time.perf_counter()
        try:
            with self._progress.stage(name, total) as stage:
                yield stage
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
