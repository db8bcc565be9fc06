"""Any task, group or tag of lm-eval, its own or from a directory of YAML files: ``NAME`` or ``NAME@METRIC``."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomerge.errors import DataError, UsageError, did_you_mean
from geomerge.evaluate import harness
from geomerge.evaluate.models import Model
from geomerge.evaluate.samples import Samples
from geomerge.evaluate.task import Settings, Tick

_READ = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".txt", ".parquet")
_MOST = 512 << 20
_DATA_FILE = re.compile(r"[^\s\"'\[\]{},]+\.(?:jsonl?|csv|tsv|txt|parquet|arrow)\b")
_NAMES = {"acc": "accuracy"}


@dataclass(frozen=True)
class LmEvalTask:
    """A task of the harness; a group or a tag is one task here.

    A group's score is the mean over all its samples, or over its tasks when the group asks for that; a tag's is the mean over
    its tasks.

    Attributes:
        task: The harness's name.
        wanted: The metric, by default the group's first or the task's first.
        include: Directories of task files.
    """

    task: str
    wanted: str | None = None
    include: tuple[Path, ...] = ()
    _told: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    source = "lm-eval"

    @property
    def name(self) -> str:
        return self.task if self.wanted is None else f"{self.task}@{self.wanted}"

    @functools.cached_property
    def version(self) -> str:
        """A hash of the harness's version and of everything in the included directories."""
        parts = ["1", harness.harness_version(), *(digest_folder(folder) for folder in self.include)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def metric(self) -> str:
        chosen = self._metric()
        return _NAMES.get(chosen, chosen)

    @property
    def higher_is_better(self) -> bool:
        first = next(iter(self._loaded.tasks.values()))
        return bool(first.higher_is_better().get(self._metric(), True))

    @property
    def chance(self) -> float | None:
        found: float | None = self._told.get("chance")
        return found

    @functools.cached_property
    def _loaded(self) -> harness.Loaded:
        return harness.load(self.task, self.include)

    def _metric(self) -> str:
        """The metric that every leaf task has."""
        tasks = list(self._loaded.tasks.values())
        shared = [m for m in tasks[0].higher_is_better() if all(m in task.higher_is_better() for task in tasks)]
        if self.wanted is not None:
            theirs = next((name for name, ours in _NAMES.items() if ours == self.wanted), self.wanted)
            if theirs not in shared:
                raise UsageError(f"{self.task!r} has no metric {self.wanted!r}", hint=did_you_mean(self.wanted, shared))
            return theirs
        if not shared:
            listed = ", ".join(list(self._loaded.tasks)[:8])
            raise UsageError(
                f"the tasks of the group {self.task!r} have no metric in common", hint=f"name them: {listed}"
            )
        first = self._loaded.metric
        return first if first is not None and first in shared else str(shared[0])

    def prepare(self, settings: Settings) -> None:
        """Load the task and its data."""
        self._metric()

    def score(self, model: Model, settings: Settings, tick: Tick) -> Samples:
        """See `geomerge.evaluate.task.Task`."""
        metric = self._metric()
        records, results = harness.run(model, self._loaded, settings, tick)
        samples = from_records(records, metric, pooled=self._loaded.weighted, name=self.name)
        for part, (leaf, row) in enumerate(results.items()):
            _check(samples, part, metric, row, leaf)
        choices = [record.choices for rows in records.values() for record in rows]
        guessed = metric in ("acc", "acc_norm") and all(choices)
        self._told["chance"] = sum(1 / n for n in choices) / len(choices) if guessed else None
        return samples


def from_records(records: dict[str, list[harness.Record]], metric: str, *, pooled: bool, name: str) -> Samples:
    """Samples of one metric over leaf tasks, each of which is a stratum.

    Args:
        records: By leaf task.
        metric: One that all have.
        pooled: One column over all samples; otherwise one for each leaf task.
        name: For messages.

    Raises:
        UsageError: The metric is no mean over samples.
    """
    import numpy as np

    total = sum(len(rows) for rows in records.values())
    values = np.zeros((total, 1 if pooled else len(records)))
    weights = np.zeros_like(values)
    strata = np.repeat(np.arange(len(records)), [len(rows) for rows in records.values()])
    link = None
    hashes = []
    for i, (part, record) in enumerate(zip(strata, (r for rows in records.values() for r in rows))):
        found = harness.outcome(metric, record.outcomes.get(metric))
        if found is None:
            raise _no_mean(metric, name)
        column = 0 if pooled else part
        values[i, column], weights[i, column], link = found.value, found.weight, found.link
        hashes.append(record.hash)
    return Samples.of(values, hashes, weights=weights, strata=strata, link=link or "mean")


def _check(samples: Samples, part: int, metric: str, row: dict[str, Any], leaf: str) -> None:
    """Compare with what the harness itself aggregates: whoever wrote the task may have meant more than a mean."""
    import numpy as np

    rows = samples.strata == part
    column = 0 if samples.values.shape[1] == 1 else part
    mean = np.average(samples.values[rows, column], weights=samples.weights[rows, column])
    ours = float(np.exp(mean)) if samples.link == "exp" else float(mean)
    theirs = row.get(metric)
    if not isinstance(theirs, int | float) or not np.isclose(ours, theirs, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise _no_mean(metric, leaf)


def _no_mean(metric: str, name: str) -> UsageError:
    return UsageError(
        f"{name}: the metric {metric!r} is not a mean over samples, so it has no paired statistics",
        hint="choose another of the task's metrics: TASK@METRIC",
    )


def lm_eval_task(reference: str, include: Sequence[str | Path] = ()) -> LmEvalTask:
    """The task of a reference ``NAME`` or ``NAME@METRIC``. Whether it exists is seen when it is prepared.

    Raises:
        DataError: A directory to include is not there.
    """
    folders = []
    for folder in include:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise DataError(
                "there is no such directory", where=str(folder), hint="--include takes a directory of YAML files"
            )
        folders.append(path)
    task, _, metric = reference.partition("@")
    return LmEvalTask(task, metric or None, tuple(folders))


def digest_folder(folder: Path) -> str:
    """A hash of a directory's task files and of the data files that they name."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in _READ and f.is_file())
    named: set[Path] = set()
    for file in files:
        if file.suffix in (".yaml", ".yml"):
            for text in _DATA_FILE.findall(file.read_text(encoding="utf-8", errors="replace")):
                named |= {path for path in (Path(text),) if path.is_file()}
    digest = hashlib.sha256()
    for file in dict.fromkeys([*files, *sorted(named)]):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size}\n".encode())
        # What is very large is told by its date.
        digest.update(file.read_bytes() if status.st_size <= _MOST else str(status.st_mtime_ns).encode())
    return digest.hexdigest()
