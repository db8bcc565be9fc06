"""Scores arranged for a report: who is the merge, who the best parent, and how sure the difference of their means is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from geomerge.errors import UsageError
from geomerge.evaluate.scores import MEAN, ModelRow, PairedRow, Score, Scores, SynergyRow, TaskRow

MOST_MODELS, MOST_TASKS = 2_000, 2_000

LARGEST = 1e100
"""A score from here on (a perplexity that ran away) is no number to draw."""


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; NaN where it is not known."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return abs(self.low) < LARGEST and abs(self.high) < LARGEST

    @property
    def clear(self) -> bool:
        """Whether it leaves zero out."""
        return self.known and (self.low > 0 or self.high < 0)


def _sane(score: Score) -> Score:
    """The score without a share that cannot be drawn."""
    share = score.normalised
    return score if share is None or abs(share) < LARGEST else dataclasses.replace(score, normalised=None)


def mean_of(parts: Sequence[Interval]) -> Interval:
    """The mean of independent numbers, each with its own interval.

    The tasks' samples are different ones, so the errors of their scores are independent and their squares add up:
    the mean's arm to each side is √(Σ armᵢ²) / T.
    """
    value = math.fsum(p.value for p in parts) / len(parts)
    if not all(p.known for p in parts):
        return Interval(value)
    below = math.sqrt(math.fsum((p.value - p.low) ** 2 for p in parts)) / len(parts)
    above = math.sqrt(math.fsum((p.high - p.value) ** 2 for p in parts)) / len(parts)
    return Interval(value, value - below, value + above)


@dataclass(frozen=True)
class Sheet:
    """One evaluation, or several of the same tasks put together.

    Attributes:
        scores: The rows.
        labels: The files they came from.
    """

    scores: Scores
    labels: tuple[str, ...]
    _by: dict[tuple[str, str], Score] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = (s for s in self.scores.scores if abs(s.value) < LARGEST)  # NaN is not
        object.__setattr__(self, "_by", {(s.model, s.task): _sane(s) for s in known})

    def __hash__(self) -> int:
        return id(self)

    def score(self, model: str, task: str) -> Score | None:
        """One score, or `None` when there is none or it is not a number."""
        return self._by.get((model, task))

    @cached_property
    def merges(self) -> list[ModelRow]:
        """The models under test, the best mean first."""
        return self._ranked("model")

    @cached_property
    def parents(self) -> list[ModelRow]:
        """The parents, the best mean first."""
        return self._ranked("parent")

    @cached_property
    def base(self) -> list[ModelRow]:
        """The base model, if it was scored."""
        return self._ranked("base")

    @property
    def tasks(self) -> tuple[TaskRow, ...]:
        """The tasks in the evaluation's order."""
        return self.scores.tasks

    @cached_property
    def upwards(self) -> bool | None:
        """Whether higher is better on all tasks; `None` when tasks differ in that."""
        directions = {task.higher_is_better for task in self.tasks}
        return directions.pop() if len(directions) == 1 else None

    @cached_property
    def fractions(self) -> frozenset[str]:
        """The tasks whose scores are shares, 0 to 1."""
        outside = {s.task for s in self.scores.scores if math.isfinite(s.value) and not 0 <= s.value <= 1}
        return frozenset(t.name for t in self.tasks if t.higher_is_better and t.name not in outside)

    @property
    def all_fractions(self) -> bool:
        """Whether all scores are shares."""
        return bool(self.tasks) and len(self.fractions) == len(self.tasks)

    def interval(self, model: str, task: str) -> Interval | None:
        """One score with its interval."""
        found = self.score(model, task)
        return None if found is None else Interval(found.value, found.low, found.high)

    def mean(self, model: str) -> Interval | None:
        """The mean over all tasks; `None` when a score is missing or means make no sense."""
        parts = [self.interval(model, task.name) for task in self.tasks]
        if self.upwards is None or not parts or not all(parts):
            return None
        return mean_of([p for p in parts if p is not None])

    def normalised(self, model: str) -> float | None:
        """The mean share of the best parent's score."""
        found = self.scores.mean(model)
        return None if found is None else found.normalised

    @cached_property
    def _paired(self) -> dict[tuple[str, str, str], PairedRow]:
        return {(p.model, p.task, p.against): p for p in self.scores.paired if abs(p.difference) < LARGEST}

    def paired(self, model: str, task: str, against: str) -> PairedRow | None:
        """A model's difference from a parent on one task."""
        return self._paired.get((model, task, against))

    def difference(self, model: str, against: str) -> Interval | None:
        """The difference of two means. From paired differences where all tasks have one; else without an interval."""
        a, b = self.mean(model), self.mean(against)
        if a is None or b is None:
            return None
        rows = [self.paired(model, task.name, against) for task in self.tasks]
        if all(rows):
            return mean_of([Interval(r.difference, r.low, r.high) for r in rows if r is not None])
        return Interval(a.value - b.value)

    def synergy(self, model: str, task: str = MEAN) -> SynergyRow | None:
        """What the parents let expect of a model on a task, or on the mean."""
        return self._synergy.get((model, task))

    @cached_property
    def _synergy(self) -> dict[tuple[str, str], SynergyRow]:
        return {
            (s.model, s.task): s
            for s in self.scores.synergy
            if all(abs(v) < LARGEST for v in (s.expected, s.delta, s.improvement, s.diversity))
        }

    def _ranked(self, role: str) -> list[ModelRow]:
        sign = 1.0 if self.upwards is False else -1.0

        def rank(model: ModelRow) -> tuple[bool, float]:
            mean = self.mean(model.name)
            value = mean.value if mean is not None else self.normalised(model.name)
            return value is None, 0.0 if value is None else (sign if mean is not None else -1.0) * value

        return sorted((m for m in self.scores.models if m.role == role), key=rank)


def checked(scores: Scores, where: str) -> Scores:
    """Scores whose rows fit each other.

    Raises:
        UsageError: A name stands twice, or a row names a model or a task that is not there.
    """
    models, tasks = [m.name for m in scores.models], [t.name for t in scores.tasks]
    for what, names, most in (("model", models, MOST_MODELS), ("task", tasks, MOST_TASKS)):
        if not names:
            raise UsageError(f"the scores hold no {what}", where=where)
        if len(names) > most:
            raise UsageError(f"the scores hold {len(names):,} {what}s; a report shows at most {most:,}", where=where)
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise UsageError(f"the {what} {twice!r} stands in the scores twice", where=where)
    known_models, known_tasks = set(models), set(tasks)
    rows: Iterable[Score | PairedRow | SynergyRow] = (*scores.scores, *scores.paired, *scores.synergy)
    for row in rows:
        named = [row.model, row.against] if isinstance(row, PairedRow) else [row.model]
        stranger = next((name for name in named if name not in known_models), None)
        if stranger is not None:
            raise UsageError(
                f"the scores are damaged: a row names the model {stranger!r}, which is not in them", where=where
            )
        if row.task not in known_tasks and not (isinstance(row, SynergyRow) and row.task == MEAN):
            raise UsageError(
                f"the scores are damaged: a row names the task {row.task!r}, which is not in them", where=where
            )
    return scores


def combine(found: Sequence[tuple[str, Scores]]) -> list[Sheet]:
    """Put evaluations of the same tasks against the same parents into one sheet each.

    Args:
        found: File and scores, in the order in which they were given.

    Returns:
        The sheets. A model that stands in several files of a sheet is shown once; another model of the same name gets its
        hash behind its name.
    """
    groups: dict[tuple[object, ...], list[tuple[str, Scores]]] = {}
    for label, scores in found:
        tasks = frozenset((t.name, t.source, t.metric, t.version, t.sample_hash) for t in scores.tasks)
        parents = frozenset((m.name, m.hash, m.role) for m in scores.models if m.role != "model")
        groups.setdefault((tasks, parents), []).append((label, scores))
    return [_fold(group) for group in groups.values()]


def _fold(group: list[tuple[str, Scores]]) -> Sheet:
    _, whole = group[0]
    for _, more in group[1:]:
        there = {m.name: m.hash for m in whole.models}
        renamed = {
            m.name: f"{m.name} ({m.hash[:8]})" if m.name in there and there[m.name] != m.hash else m.name
            for m in more.models
        }
        new = {name for name, shown in renamed.items() if shown not in there}
        whole = dataclasses.replace(
            whole,
            models=whole.models + tuple(_named(m, renamed) for m in more.models if m.name in new),
            scores=whole.scores + tuple(_of(s, renamed) for s in more.scores if s.model in new),
            means=whole.means
            + tuple(dataclasses.replace(m, model=renamed[m.model]) for m in more.means if m.model in new),
            paired=whole.paired + tuple(_of(p, renamed) for p in more.paired if p.model in new),
            synergy=whole.synergy + tuple(_of(s, renamed) for s in more.synergy if s.model in new),
        )
    return Sheet(whole, tuple(label for label, _ in group))


def _named(model: ModelRow, names: dict[str, str]) -> ModelRow:
    return dataclasses.replace(model, name=names[model.name])


_Of = TypeVar("_Of", Score, PairedRow, SynergyRow)


def _of(row: _Of, names: dict[str, str]) -> _Of:
    return dataclasses.replace(row, model=names[row.model])
