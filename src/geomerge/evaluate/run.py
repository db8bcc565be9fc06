"""An evaluation: every model on every task, then what follows from it."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from geomerge.errors import UsageError, did_you_mean
from geomerge.evaluate import statistics
from geomerge.evaluate.cache import Known, keep, key_of, look_up
from geomerge.evaluate.models import Model, ModelsLike, line_up
from geomerge.evaluate.references import TasksLike, find_tasks
from geomerge.evaluate.scores import MEAN, Mean, PairedRow, Score, Scores, SynergyRow, TaskRow
from geomerge.evaluate.task import Settings, Task, random_state_kept, seed_everything
from geomerge.version import __version__

LOGGER = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_LIBRARIES = ("torch", "transformers", "lm_eval", "numpy", "scipy")


class Progress(Protocol):
    """Watches an evaluation. An item is one model on one task."""

    def start(self, items: int, known: int) -> None:
        """The evaluation begins: items in all, and those that were known before."""

    def begin(self, model: str, task: str) -> None:
        """An item begins."""

    def step(self, share: float) -> None:
        """So much of the item is finished, 0 to 1."""

    def end(self) -> None:
        """The item is finished."""

    def finish(self) -> None:
        """The evaluation is over, or was given up."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the evaluation.

    Attributes:
        scores: What was known by then.
        left: How many scores were not.
    """

    def __init__(self, scores: Scores, left: int) -> None:
        super().__init__(f"{left} scores are missing")
        self.scores, self.left = scores, left


@dataclass(frozen=True)
class _Found:
    """One model on one task."""

    known: Known
    cached: bool


def evaluate(
    models: ModelsLike,
    tasks: TasksLike,
    parents: ModelsLike = (),
    base: ModelsLike | None = None,
    *,
    include: Sequence[str | Path] = (),
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    bootstrap: int = statistics.RESAMPLES,
    seed: int = 0,
    chat_template: bool = False,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Scores:
    """Score models on tasks, beside their parents.

    Args:
        models: A path or hub id, a sequence of them, or a mapping from names to paths and modules in memory.
        tasks: References such as ``"skills"`` or ``"perplexity:text.txt"`` (see `geomerge.evaluate.references`), several
            separated by commas or in a sequence; functions; `Task` objects.
        parents: The merge's parents, given like `models`.
        base: The parents' base, or a mapping from its name to it: evaluated too, compared with nothing.
        include: Directories of lm-eval's YAML files.
        limit: Only so many samples of each task.
        batch_size: Samples in one forward pass; by default what suits the kind of task.
        device, dtype: Where and how to compute; ``dtype="auto"`` takes the checkpoint's own.
        bootstrap: Resamples for intervals; 0 leaves them out.
        seed: Of the resampling, and of tasks that draw.
        chat_template: Use the model's chat template in generative tasks.
        trust_remote_code: Let a model directory's own code run.
        tokenizer: For modules in memory: a tokenizer or the directory of one; by default that of the first directory.
        cache: Use scores that are known, and keep those that are found.
        progress: Told how far the evaluation is.

    Returns:
        The scores. The random state of Python, NumPy and torch is what it was.

    Raises:
        UsageError: An argument is wrong, a task does not exist, or needs a package that is missing.
        DataError: A task's data cannot be had.
        ModelError: A model cannot be loaded.
        Interrupted: Ctrl-C; it holds what is known. What was found is in the cache, so the same call goes on.
    """
    settings = _settings(batch_size, dtype, device, limit, seed, chat_template, trust_remote_code)
    if bootstrap < 0:
        raise UsageError(f"the number of resamples is {bootstrap}", hint="it is 0 or more")
    chosen = find_tasks(tasks, include)
    lined_up = line_up(models, parents, base, tokenizer=tokenizer)
    run = _Run(lined_up, chosen, settings, cache, progress)
    try:
        run.look_up()
        run.score()
    except KeyboardInterrupt:
        left = len(lined_up) * len(chosen) - len(run.found)
        raise Interrupted(_assemble(lined_up, chosen, run.found, settings, bootstrap), left) from None
    return _assemble(lined_up, chosen, run.found, settings, bootstrap)


def _settings(
    batch_size: int | None, dtype: str, device: str, limit: int | None, seed: int, chat_template: bool, trust: bool
) -> Settings:
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}", hint="it is 1 or more")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit}", hint="it is 1 or more")
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype {dtype!r}", hint=did_you_mean(dtype, DTYPES))
    return Settings(batch_size, dtype, device, limit, seed, chat_template, trust)


class _Run:
    """Finds every score: in the cache, or by scoring."""

    def __init__(
        self, models: list[Model], tasks: list[Task], settings: Settings, cache: bool, progress: Progress | None
    ) -> None:
        self.models, self.tasks, self.settings, self.cache = models, tasks, settings, cache
        self.progress = progress
        self.found: dict[tuple[int, int], _Found] = {}

    def look_up(self) -> None:
        """Take what is known."""
        if not self.cache:
            return
        for (m, model), (t, task) in itertools.product(enumerate(self.models), enumerate(self.tasks)):
            key = key_of(model.hash, task, self.settings)
            known = None if key is None else look_up(key)
            if known is not None:
                self.found[m, t] = _Found(known, True)

    def score(self) -> None:
        """Score what is not known; models one after the other, so that one is in memory at a time."""
        missing = [t for t in range(len(self.tasks)) if any((m, t) not in self.found for m in range(len(self.models)))]
        # Where all is known, torch need not be imported to keep its state.
        with random_state_kept() if missing else contextlib.nullcontext():
            self._score([self.tasks[t] for t in missing])

    def _score(self, tasks: list[Task]) -> None:
        for task in tasks:
            task.prepare(self.settings)
        if self.progress is not None:
            self.progress.start(len(self.models) * len(self.tasks), len(self.found))
        try:
            for m, model in enumerate(self.models):
                self._score_model(m, model)
                model.release()
        finally:
            if self.progress is not None:
                self.progress.finish()

    def _score_model(self, m: int, model: Model) -> None:
        for t, task in enumerate(self.tasks):
            if (m, t) in self.found:
                continue
            with self._watched(model, task):
                twin = self._twin(m, t)
                if twin is not None:
                    self.found[m, t] = twin
                    continue
                begun = time.perf_counter()
                seed_everything(self.settings.seed)
                samples = task.score(model, self.settings, self._step)
                seconds = round(time.perf_counter() - begun, 3)
                known = Known(samples, task.metric, task.higher_is_better, task.chance, seconds)
                self.found[m, t] = _Found(known, False)
                key = key_of(model.hash, task, self.settings)
                if self.cache and key is not None:
                    keep(key, known)

    def _twin(self, m: int, t: int) -> _Found | None:
        """The score of a model with the same hash, if there is one: a copy need not be scored again."""
        same = (i for i in range(m) if self.models[i].hash == self.models[m].hash)
        return next((self.found[i, t] for i in same if (i, t) in self.found), None)

    @contextlib.contextmanager
    def _watched(self, model: Model, task: Task) -> Iterator[None]:
        if self.progress is not None:
            self.progress.begin(model.name, task.name)
        yield
        if self.progress is not None:
            self.progress.end()

    def _step(self, share: float) -> None:
        if self.progress is not None:
            self.progress.step(share)


# -- what follows ------------------------------------------------------------------------------------------------------


def _assemble(
    models: list[Model],
    tasks: list[Task],
    found: Mapping[tuple[int, int], _Found],
    settings: Settings,
    resamples: int,
) -> Scores:
    """Tables from samples."""
    tasks_known = {
        t: next((found[m, t].known for m in range(len(models)) if (m, t) in found), None) for t in range(len(tasks))
    }
    rows = [_task_row(tasks[t], known) for t, known in tasks_known.items() if known is not None]
    values = {at: one.known.samples.score() for at, one in found.items()}
    parents = [m for m, model in enumerate(models) if model.role == "parent"]
    scores: list[Score] = []
    paired: list[PairedRow] = []
    synergies: list[SynergyRow] = []
    for (m, model), (t, task) in itertools.product(enumerate(models), enumerate(tasks)):
        if (m, t) not in found:
            continue
        one = found[m, t]
        seed = statistics.seed_for(settings.seed, f"bootstrap {task.name}")
        low, high = statistics.score_interval(one.known.samples, resamples=resamples, seed=seed)
        higher = one.known.higher_is_better
        theirs = [values[p, t] for p in parents if (p, t) in found]
        # Perplexities of another tokenizer's tokens are on another scale.
        asked = {found[p, t].known.samples.hashes for p in (m, *parents) if (p, t) in found}
        alike = len(asked) == 1 or one.known.samples.link == "mean"
        whole = len(theirs) == len(parents) and alike
        share = statistics.normalised(values[m, t], theirs, higher_is_better=higher) if whole else None
        scores.append(Score(model.name, task.name, values[m, t], low, high, share, one.known.seconds, one.cached))
        if model.role != "model":
            continue
        for p in parents:
            if (p, t) in found:
                row = statistics.compare(one.known.samples, found[p, t].known.samples, resamples=resamples, seed=seed)
                if row is None:
                    LOGGER.warning(
                        "%s and %s were not asked the same in %s (other tokenizers?): they are not compared sample by sample",
                        model.name,
                        models[p].name,
                        task.name,
                    )
                    continue
                paired.append(
                    PairedRow(model.name, task.name, models[p].name, row.difference, row.low, row.high, row.p, row.test)
                )
        if parents and whole:
            synergies.append(_synergy_row(model.name, task.name, theirs, values[m, t], higher))
    directions = [row.higher_is_better for row in rows]
    means = _means(models, tasks, scores, mixed=len(set(directions)) > 1)
    compared = Counter(row.model for row in synergies)
    synergies += _mean_synergy(
        [m for m in models if m.role == "parent" or compared[m.name] == len(tasks)], means, directions
    )
    return Scores(
        models=tuple(model.row for model in models),
        tasks=tuple(rows),
        scores=tuple(scores),
        means=tuple(means),
        paired=tuple(paired),
        synergy=tuple(synergies),
        settings=_told(settings, resamples),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _task_row(task: Task, known: Known) -> TaskRow:
    return TaskRow(
        name=task.name,
        source=task.source,
        metric=known.metric,
        higher_is_better=known.higher_is_better,
        chance=known.chance,
        version=task.version or "",
        samples=len(known.samples),
        sample_hash=known.samples.sample_hash,
    )


def _means(models: list[Model], tasks: list[Task], scores: list[Score], *, mixed: bool) -> list[Mean]:
    """The mean over all tasks of each model that has all scores; of the shares alone where directions are mixed."""
    made = []
    for model in models:
        own = [score for score in scores if score.model == model.name]
        if len(own) < len(tasks):
            continue
        shares = [score.normalised for score in own if score.normalised is not None]
        made.append(
            Mean(
                model.name,
                math.nan if mixed else math.fsum(score.value for score in own) / len(own),
                math.fsum(shares) / len(shares) if len(shares) == len(own) else None,
            )
        )
    return made


def _mean_synergy(models: list[Model], means: list[Mean], higher: list[bool]) -> list[SynergyRow]:
    """The synergy of the means; there is none when lower scores are better on some tasks and higher ones on others."""
    if not higher or len(set(higher)) > 1:
        return []
    value = {mean.model: mean.value for mean in means}
    parents = [model.name for model in models if model.role == "parent"]
    if not parents or any(name not in value for name in parents):
        return []
    theirs = [value[name] for name in parents]
    return [
        _synergy_row(model.name, MEAN, theirs, value[model.name], higher[0])
        for model in models
        if model.role == "model" and model.name in value
    ]


def _synergy_row(model: str, task: str, parents: list[float], merged: float, higher: bool) -> SynergyRow:
    found = statistics.synergy(parents, merged, higher_is_better=higher)
    return SynergyRow(model, task, found.expected, found.delta, found.relative, found.improvement, found.diversity)


def _told(settings: Settings, resamples: int) -> dict[str, Any]:
    versions = {"geomerge": __version__}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return {
        "batch_size": settings.batch_size,
        "dtype": settings.dtype,
        "device": settings.device,
        "limit": settings.limit,
        "seed": settings.seed,
        "bootstrap": resamples,
        "chat_template": settings.chat_template,
        "trust_remote_code": settings.trust_remote_code,
        "versions": versions,
    }
