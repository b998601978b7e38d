"""Progress on stderr: a bar per stage on a terminal, a plain line per finished stage with `-v`, else nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mxcompile.progress import Progress, SilentProgress, SilentStage, Stage

if TYPE_CHECKING:
    import rich.progress


def progress(verbose: bool) -> contextlib.AbstractContextManager[Progress]:
    """The way of showing progress that suits stderr."""
    if sys.stderr.isatty():
        return _bars()
    return contextlib.nullcontext(LineProgress() if verbose else SilentProgress())


class LineProgress:
    """One line per finished stage."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        start = time.perf_counter()
        yield SilentStage()
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[share]:>4}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield BarProgress(bars)


class BarProgress:
    """One bar per stage; stages of unknown size pulse."""

    def __init__(self, bars: rich.progress.Progress) -> None:
        self._bars = bars

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        task = self._bars.add_task(name, total=total, share="")
        stage = _BarStage(self._bars, task, total)
        yield stage
        self._bars.update(task, total=total or 1, completed=total or 1)
        self._bars.stop_task(task)


class _BarStage:
    def __init__(self, bars: rich.progress.Progress, task: rich.progress.TaskID, total: int | None) -> None:
        self._bars, self._task, self._total, self._done = bars, task, total, 0

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        share = f"{min(1.0, self._done / self._total):.0%}" if self._total else ""
        self._bars.update(self._task, advance=amount, share=share)
