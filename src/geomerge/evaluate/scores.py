"""Scores of models on tasks, as `geomerge evaluate` finds them, and their JSON file. Importing this costs next to nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from geomerge.errors import RunError, UsageError
from geomerge.version import __version__

FORMAT = 1
SCHEMA = Path(__file__).parent / "scores.schema.json"
"""The JSON schema of the file."""

MEAN = "mean"
"""The task's name in the synergy rows of the mean over all tasks."""

Role = Literal["model", "parent", "base"]
_LARGEST = 256_000_000


@dataclass(frozen=True)
class ModelRow:
    """A model that was evaluated.

    Attributes:
        name: Unique in the file.
        source: Its path, its hub id, or ``memory``.
        hash: The identity of its weights, config and tokenizer.
        role: ``model``, ``parent`` or ``base``.
        parameters: How many numbers it has.
    """

    name: str
    source: str
    hash: str
    role: Role
    parameters: int


@dataclass(frozen=True)
class TaskRow:
    """A task.

    Attributes:
        name: Unique in the file.
        source: ``lab:skills``, ``lm-eval``, ``leaderboard``, ``perplexity``, ``classification``, ``python``.
        metric: ``accuracy``, ``exact_match``, ``perplexity``, ...
        higher_is_better: Whether it is.
        chance: What guessing gets, `None` when unknown.
        version: Changes when the same model may get another score.
        samples: How many.
        sample_hash: Of all samples in their order.
    """

    name: str
    source: str
    metric: str
    higher_is_better: bool
    chance: float | None
    version: str
    samples: int
    sample_hash: str


@dataclass(frozen=True)
class Score:
    """One model on one task; `value`, `low` and `high` (95 %) in the task's unit, accuracies as 0 to 1.

    Attributes:
        normalised: The share of the best parent's score, `None` without parents.
        seconds: What it took to find out, at the time.
        cached: Whether it was known before.
    """

    model: str
    task: str
    value: float
    low: float
    high: float
    normalised: float | None = None
    seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True)
class Mean:
    """One model's mean over all tasks; `value` is NaN when lower is better on some and higher on others."""

    model: str
    value: float
    normalised: float | None = None


@dataclass(frozen=True)
class PairedRow:
    """A model's difference from a parent on the same samples: see `geomerge.evaluate.statistics.Difference`."""

    model: str
    task: str
    against: str
    difference: float
    low: float
    high: float
    p: float | None
    test: Literal["mcnemar", "bootstrap"]


@dataclass(frozen=True)
class SynergyRow:
    """A model against what its parents let expect: see `geomerge.evaluate.statistics.Synergy`."""

    model: str
    task: str
    expected: float
    delta: float
    relative: float | None
    improvement: float
    diversity: float


@dataclass(frozen=True)
class Scores:
    """Everything that one evaluation found.

    Attributes:
        models, tasks: In the order of the tables: models first, then the parents, then the base.
        scores: One for each model and task that is known (all, unless the evaluation was interrupted).
        means: One for each model whose scores are complete.
        paired: Each model against each parent.
        synergy: Each model on each task, and on the task ``mean``.
        settings: How it was done: batch size, dtype, device, limit, seed, resamples, versions.
        made: When, in UTC.
        geomerge: The version that did it.
    """

    models: tuple[ModelRow, ...]
    tasks: tuple[TaskRow, ...]
    scores: tuple[Score, ...]
    means: tuple[Mean, ...] = ()
    paired: tuple[PairedRow, ...] = ()
    synergy: tuple[SynergyRow, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    made: str = ""
    geomerge: str = __version__

    def score(self, model: str, task: str) -> Score | None:
        """One model's score on one task, or `None` when it is not known."""
        return next((s for s in self.scores if (s.model, s.task) == (model, task)), None)

    def value(self, model: str, task: str) -> float:
        """One model's score on one task.

        Raises:
            KeyError: It is not known.
        """
        found = self.score(model, task)
        if found is None:
            raise KeyError(f"{model} on {task}")
        return found.value

    def mean(self, model: str) -> Mean | None:
        """One model's mean over all tasks."""
        return next((m for m in self.means if m.model == model), None)

    @property
    def parents(self) -> tuple[ModelRow, ...]:
        """The models that were given as parents."""
        return tuple(model for model in self.models if model.role == "parent")

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; a number that is not finite becomes ``null``."""
        return {
            "format": FORMAT,
            "kind": "scores",
            "geomerge": self.geomerge,
            "made": self.made,
            **{part: [_plain(dataclasses.asdict(row)) for row in getattr(self, part)] for part in _ROWS},
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "scores") -> Scores:
        """The scores that `to_json` gave.

        Args:
            data: Parsed JSON.
            where: For messages.

        Raises:
            UsageError: It is something else, or damaged, or of a later version.
        """
        if not isinstance(data, dict) or data.get("kind") != "scores":
            raise UsageError("it does not hold scores", where=where, hint="`geomerge evaluate --out FILE` writes them")
        if data.get("format") != FORMAT:
            raise UsageError(f"it has format {data.get('format')!r}; this version reads {FORMAT}", where=where)
        try:
            rows = {
                part: tuple(_row(kind, row, f"{part}[{i}]") for i, row in enumerate(data.get(part, ())))
                for part, kind in _ROWS.items()
            }
            settings = data.get("settings", {})
            if not isinstance(settings, dict):
                raise TypeError("settings is not an object")
            return cls(
                **rows, settings=settings, made=str(data.get("made", "")), geomerge=str(data.get("geomerge", ""))
            )
        except (TypeError, KeyError, ValueError) as error:
            raise UsageError(f"it is damaged: {error}", where=where) from None

    @classmethod
    def read(cls, path: str | Path) -> Scores:
        """Read a file that `write` wrote.

        Raises:
            UsageError: It is missing, or holds something else.
        """
        where = str(path)
        try:
            if Path(path).stat().st_size > _LARGEST:
                raise UsageError("it is too large to hold scores", where=where)
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")), where)
        except OSError as error:
            raise UsageError(f"it cannot be read: {error.strerror}", where=where) from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"it is not JSON: {error}", where=where) from None

    def write(self, path: str | Path) -> None:
        """Write a JSON file; it appears whole or not at all.

        Raises:
            RunError: It cannot be written.
        """
        place = Path(path)
        unfinished = place.with_name(f"{place.name}.partial")
        try:
            unfinished.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            unfinished.replace(place)
        except OSError as error:
            raise RunError(f"the scores cannot be written: {error.strerror}", where=str(place)) from None


_ROWS: dict[str, type[Any]] = {
    "models": ModelRow,
    "tasks": TaskRow,
    "scores": Score,
    "means": Mean,
    "paired": PairedRow,
    "synergy": SynergyRow,
}

Row = TypeVar("Row")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _row(kind: Callable[..., Row], data: Any, what: str) -> Row:
    """A row from its JSON object; unknown keys are those of a later version and left out."""
    if not isinstance(data, dict):
        raise TypeError(f"{what} is not an object")
    hints = get_type_hints(kind)
    made = {}
    for name, hint in hints.items():
        if name not in data:
            continue
        value = data[name]
        if hint is float:
            value = math.nan if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{what}.{name} is not a number")
            value = float(value)
        elif hint in (str, int, bool) and type(value) is not hint:
            raise TypeError(f"{what}.{name} is not of type {hint.__name__}")
        elif hint == float | None and value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{what}.{name} is not a number")
            value = float(value)
        elif str(hint).startswith("typing.Literal") and value not in hint.__args__:
            raise ValueError(f"{what}.{name} is {value!r}")
        made[name] = value
    return kind(**made)
