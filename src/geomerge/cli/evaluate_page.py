"""What ``geomerge evaluate`` shows: tables of scores, and its progress."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from geomerge.cli.console import clean, duration, heading, table, wants_colour

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress

    from geomerge.evaluate.scores import Score, Scores, TaskRow

_SHARES = ("accuracy", "acc", "acc_norm", "exact_match", "strict_accuracy", "normalised_accuracy")
_NEXT_LINE = 5.0


# -- tables ------------------------------------------------------------------------------------------------------------


def page(scores: Scores) -> list[RenderableType]:
    """All tables of an evaluation."""
    parts: list[RenderableType] = [*_scores(scores)]
    if scores.paired:
        parts += [heading("against the parents, on the same samples"), _paired(scores)]
    if scores.synergy:
        parts += [heading("synergy"), _synergy(scores)]
    parts += ["", *_notes(scores)]
    return parts


def _scores(scores: Scores) -> list[RenderableType]:
    """Models by tasks; where many tasks would be too wide for any terminal, tasks by models."""
    names = [clean(model.name) for model in scores.models]
    roles = ["" if model.role == "model" else model.role for model in scores.models]
    shares = bool(scores.parents)
    wide = len(scores.tasks) > 3 and len(scores.tasks) > len(scores.models)
    means = {mean.model: mean for mean in scores.means}
    mean_row: list[str] = []
    share_row: list[str] = []
    for model in scores.models:
        mean = means.get(model.name)
        only = scores.tasks[0] if len({_is_share(task) for task in scores.tasks}) == 1 and scores.tasks else None
        mean_row.append("-" if mean is None or math.isnan(mean.value) or only is None else _number(mean.value, only))
        share_row.append(_percent(None if mean is None else mean.normalised))
    cells = [[_cell(scores.score(model.name, task.name), task) for task in scores.tasks] for model in scores.models]
    labels = [clean(task.name) for task in scores.tasks]
    several = len(scores.tasks) > 1
    if wide:
        rows = [[label, *(cells[m][t] for m in range(len(names)))] for t, label in enumerate(labels)]
        rows += [["mean", *mean_row]] if several else []
        rows += [["of best parent", *share_row]] if shares else []
        heads = [f"{name} ({role})" if role else name for name, role in zip(names, roles)]
        return [table(["task", *heads], rows, right=heads)]
    heads = [*labels, *(["mean"] if several else []), *(["of best parent"] if shares else [])]
    rows = [
        [
            name,
            role,
            *cells[m],
            *([mean_row[m]] if several else []),
            *([share_row[m]] if shares else []),
        ]
        for m, (name, role) in enumerate(zip(names, roles))
    ]
    return [table(["model", "", *heads], rows, right=heads)]


def _paired(scores: Scores) -> RenderableType:
    tasks = {task.name: task for task in scores.tasks}
    rows = [
        [
            clean(row.model),
            clean(row.task),
            clean(row.against),
            _signed(row.difference, tasks[row.task]),
            "-"
            if math.isnan(row.low)
            else f"{_signed(row.low, tasks[row.task])} … {_signed(row.high, tasks[row.task])}",
            "-" if row.p is None else _p(row.p),
        ]
        for row in scores.paired
    ]
    right = ["difference", "95 % interval", "McNemar's p"]
    return table(["model", "task", "against", *right], rows, right=right)


def _synergy(scores: Scores) -> RenderableType:
    tasks = {task.name: task for task in scores.tasks}
    rows = []
    for row in scores.synergy:
        task = tasks.get(row.task, scores.tasks[0])
        rows.append(
            [
                clean(row.model),
                clean(row.task),
                _number(row.expected, task),
                _signed(row.delta, task),
                "-" if row.relative is None else f"{100 * row.relative:+.1f} %",
                _signed(row.improvement, task),
                _number(row.diversity, task),
            ]
        )
    right = ["expected", "synergy", "relative", "over best parent", "diversity"]
    return table(["model", "task", *right], rows, right=right)


def _notes(scores: Scores) -> list[str]:
    shares = [task for task in scores.tasks if _is_share(task)]
    said = []
    if shares:
        said.append(
            "shares are in percent; ± is half of the 95 % interval, whose ends are given where that would leave 0 to 100"
        )
    lower = [clean(task.name) for task in scores.tasks if not task.higher_is_better]
    if lower:
        said.append(
            f"lower is better: {', '.join(lower)}; in synergy and in shares of the best parent more is better all the same"
        )
    limit = scores.settings.get("limit")
    if limit is not None:
        said.append(f"only the first {limit} samples of each task: not for publication")
    cached = sum(score.cached for score in scores.scores)
    if cached:
        said.append(f"{cached} of {len(scores.scores)} scores were known from earlier runs (--no-cache scores again)")
    return said


def _cell(score: Score | None, task: TaskRow) -> str:
    if score is None:
        return "?"
    half = (score.high - score.low) / 2
    value = _number(score.value, task)
    if math.isnan(half):
        return value
    if _is_share(task) and not half <= score.value <= 1 - half:
        return f"{value} ({_number(score.low, task)} to {_number(score.high, task)})"
    return f"{value} ± {_number(half, task) if _is_share(task) else f'{half:.2g}'}"


def _is_share(task: TaskRow) -> bool:
    return task.metric in _SHARES


def _number(value: float, task: TaskRow) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{100 * value:.1f}" if _is_share(task) else f"{value:.4g}"


def _signed(value: float, task: TaskRow) -> str:
    if not math.isfinite(value):
        return "-"
    # A difference that rounds to nothing has no sign.
    return f"{100 * value + 0.0:+.1f}".replace("-0.0", "+0.0") if _is_share(task) else f"{value + 0.0:+.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


# -- progress ----------------------------------------------------------------------------------------------------------


class Silent:
    """Counts and says nothing: see `geomerge.evaluate.run.Progress`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        # Held here: while lm-eval runs, sys.stderr is led elsewhere.
        self.stream = sys.stderr
        self.clock = clock
        self.items = self.known = self.done = 0
        self.share = 0.0
        self.what = ""
        self._first: tuple[float, float] | None = None
        """When the first share was told, and what was done by then: what comes before is loading, and is done once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    def start(self, items: int, known: int) -> None:
        self.items, self.known, self.done = items, known, known

    def begin(self, model: str, task: str) -> None:
        self.what, self.share = f"{clean(model)} on {clean(task)}", 0.0

    def step(self, share: float) -> None:
        self.share = share
        if self._first is None:
            self._first = self.clock(), self.done + share

    def end(self) -> None:
        self.done, self.share = self.done + 1, 0.0

    def finish(self) -> None:
        """The work is over, or was given up."""

    def left(self) -> float | None:
        """Seconds that are left if the rest takes as long as what is done, or `None` when that is not known yet."""
        if self._first is None:
            return None
        begun, before = self._first
        made = self.done + self.share - before
        return (self.clock() - begun) / made * (self.items - self.done - self.share) if made > 0.01 else None


class Lines(Silent):
    """A plain line every few seconds, for logs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._next = clock() + _NEXT_LINE / 2

    def begin(self, model: str, task: str) -> None:
        super().begin(model, task)
        self._say()

    def step(self, share: float) -> None:
        super().step(share)
        self._say()

    def _say(self) -> None:
        now = self.clock()
        if now < self._next:
            return
        self._next = now + _NEXT_LINE
        left = self.left()
        rest = "" if left is None else f", {duration(left)} left"
        self.stream.write(f"evaluating: {self.done} of {self.items}, {self.what} {100 * self.share:.0f} %{rest}\n")
        self.stream.flush()


class Bar(Silent):
    """A bar with what is being done and the time that is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._bar: RichProgress | None = None
        self._task: Any = None

    def start(self, items: int, known: int) -> None:
        from rich import progress
        from rich.console import Console

        super().start(items, known)
        if items == known:
            return
        console = Console(
            file=self.stream, color_system="standard" if wants_colour(self.stream) else None, highlight=False
        )
        self._bar = progress.Progress(
            progress.TextColumn("evaluating"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.fields[count]}  {task.fields[left]}  {task.description}", markup=False),
            console=console,
            refresh_per_second=5,
            transient=True,
            redirect_stderr=False,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task("", total=max(items, 1), completed=known, count=f"{known}/{items}", left="")
        self._bar.start()

    def begin(self, model: str, task: str) -> None:
        super().begin(model, task)
        self._draw()

    def step(self, share: float) -> None:
        super().step(share)
        self._draw()

    def end(self) -> None:
        super().end()
        self._draw()

    def _draw(self) -> None:
        if self._bar is not None:
            left = self.left()
            self._bar.update(
                self._task,
                completed=self.done + self.share,
                description=self.what,
                count=f"{self.done}/{self.items}",
                left="" if left is None else f"{duration(left)} left",
            )

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def watch(*, quiet: bool = False) -> Silent:
    """The progress that suits stderr."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else Lines()
