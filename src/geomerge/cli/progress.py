"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere, nothing for what is over at once.

Each of these is a `geomerge.engine.run.Progress` and a context manager; leaving it takes the bar away, whatever happened.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from geomerge.cli.console import amount, duration, wants_colour

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

FIRST_LINE = 2.0
"""Seconds before the first plain line: a shorter run says nothing."""

NEXT_LINE = 5.0
"""Seconds between plain lines."""

_REDRAW = 0.1
"""Seconds between updates of the bar's numbers; tiles come thousands of times a second."""


_BESIDE = 62
"""Columns that the bar's title and numbers take."""


class Silent:
    """Counts and says nothing.

    Args:
        title: What is being done, in one word.

    Attributes:
        total: Bytes in all.
        before: Bytes that an earlier run has written.
        done: Bytes that are written, those of the earlier run included.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.total = self.before = self.done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    def start(self, total: int, done: int) -> None:
        self.total, self.before, self.done = total, done, done

    def advance(self, nbytes: int) -> None:
        self.done += nbytes

    def finish(self) -> None:
        """The work is over, or was given up."""


class Lines(Silent):
    """Plain lines for logs: the first after two seconds, then one every five.

    Args:
        title: What is being done, in one word.
        clock: Seconds, monotonic.
    """

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(title)
        self._clock = clock
        self._next = clock() + FIRST_LINE
        self._first: tuple[float, int] | None = None
        """When the first bytes were written, and how many there were then: a merge may measure for long before that."""

    def start(self, total: int, done: int) -> None:
        super().start(total, done)
        self._next = self._clock() + FIRST_LINE
        self._first = None

    def advance(self, nbytes: int) -> None:
        super().advance(nbytes)
        now = self._clock()
        if self._first is None:
            self._first = now, self.done
        begun, before = self._first
        if now >= self._next and now > begun and self.done < self.total:
            self._next = now + NEXT_LINE
            rate = (self.done - before) / (now - begun)
            left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 else ""
            sys.stderr.write(
                f"{self.title}: {amount(self.done)} of {amount(self.total)} ({100 * self.done / self.total:.0f} %), "
                f"{amount(rate)}/s{left}\n"
            )
            sys.stderr.flush()


class Bar(Silent):
    """A bar with bytes, rate and the time that is left."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self._bar: RichProgress | None = None
        self._next = 0.0

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
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(compact=True),
            console=console,
            # No thread that draws: a run may fork only while there is no other thread.
            auto_refresh=False,
            transient=True,
        )
        # rich takes the speed from what is added after the start, so a resumed run's first bytes do not count.
        self._task = self._bar.add_task(self.title, total=max(total, 1), completed=done)
        self._bar.start()

    def advance(self, nbytes: int) -> None:
        super().advance(nbytes)
        now = time.monotonic()
        if self._bar is not None and now >= self._next:
            self._next = now + _REDRAW
            self._bar.update(self._task, completed=self.done, refresh=True)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def watch(title: str, *, quiet: bool = False) -> Silent:
    """The progress that suits stderr."""
    if quiet:
        return Silent(title)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Bar(title)
    return Lines(title)
