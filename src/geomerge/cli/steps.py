"""Progress in steps on stderr: what `geomerge.cli.progress` is for bytes, for work that is counted in pieces."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from geomerge.cli.console import duration, wants_colour
from geomerge.cli.progress import FIRST_LINE, NEXT_LINE, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_BESIDE = 45
"""Columns that the bar's title and numbers take."""


class StepLines(Silent):
    """Plain lines for logs: the first after two seconds, then one every five.

    Args:
        title: What is being done, in one word.
        unit: What is counted, in the plural.
        clock: Seconds, monotonic.
    """

    def __init__(self, title: str, unit: str = "steps", clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(title)
        self._unit, self._clock = unit, clock
        self._next = clock() + FIRST_LINE
        self._begun: float | None = None

    def start(self, total: int, done: int) -> None:
        super().start(total, done)
        self._next = self._clock() + FIRST_LINE

    def advance(self, nbytes: int) -> None:
        super().advance(nbytes)
        now = self._clock()
        if self._begun is None:
            # What came before the first step, such as making the data, says nothing about the pace.
            self._begun, self.before = now, self.done
        if now >= self._next and self.done < self.total:
            self._next = now + NEXT_LINE
            rate = (self.done - self.before) / max(now - self._begun, 1e-9)
            left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 else ""
            share = 100 * self.done / self.total
            sys.stderr.write(f"{self.title}: {self.done:,} of {self.total:,} {self._unit} ({share:.0f} %){left}\n")
            sys.stderr.flush()


class StepBar(Silent):
    """A bar with what is done and the time that is left.

    Args:
        title: What is being done, in one word.
    """

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self._bar: RichProgress | None = None

    def start(self, total: int, done: int) -> None:
        from rich import progress
        from rich.console import Console

        super().start(total, done)
        colour = wants_colour(sys.stderr)
        console = Console(file=sys.stderr, color_system="standard" if colour else None, highlight=False)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=min(max(console.width - _BESIDE, 8), 40)),
            progress.TaskProgressColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=5,
            transient=True,
        )
        self._task = self._bar.add_task(self.title, total=max(total, 1), completed=done)
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        super().advance(nbytes)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def watch_steps(title: str, unit: str = "steps", *, quiet: bool = False) -> Silent:
    """The progress that suits stderr."""
    if quiet:
        return Silent(title)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return StepBar(title)
    return StepLines(title, unit)
