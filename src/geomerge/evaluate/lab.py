"""Tasks of a lab suite: ``skills``, ``skills:small:3``, ``skills/arithmetic``, a suite's directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from geomerge.errors import UsageError, did_you_mean
from geomerge.evaluate.models import Model
from geomerge.evaluate.samples import Samples, hash_text
from geomerge.evaluate.task import Settings, Tick
from geomerge.lab.kinds import KINDS, LabTask
from geomerge.lab.suite import FILE, Suite, load_suite

PREFIX = "lab:"
_BATCH = 256


@dataclass(frozen=True)
class LabSuiteTask:
    """One task of a suite, scored on its test split.

    Attributes:
        suite: The suite.
        task: The task.
        name: What it is called in the tables.
    """

    suite: Suite = field(repr=False)
    task: LabTask = field(repr=False)
    name: str

    metric = "accuracy"
    higher_is_better = True

    @property
    def source(self) -> str:
        return f"lab:{self.task.suite}"

    @property
    def version(self) -> str:
        return self.task.version

    @property
    def chance(self) -> float:
        return self.task.chance

    def prepare(self, settings: Settings) -> None:
        """Nothing: the data is made, not read."""

    def score(self, model: Model, settings: Settings, tick: Tick) -> Samples:
        """See `geomerge.evaluate.task.Task`."""
        module = model.of_suite(self.suite, settings)
        right = self.task.correct(module, "test", settings.limit, settings.batch(_BATCH))
        tick(1.0)
        # The data is a function of the version, so a sample is known by its place.
        return Samples.of(right, (hash_text(self.version, str(i)) for i in range(len(right))))


def is_lab(reference: str) -> bool:
    """Whether a task's reference names a suite or a task of one."""
    if reference.startswith(PREFIX):
        return True
    suite, task = _split(reference)
    first = suite.replace("-", ":").partition(":")[0]
    if first in KINDS and not Path(reference).is_file():
        return True
    return (Path(reference) / FILE).is_file() or (task is not None and (Path(suite) / FILE).is_file())


def lab_tasks(reference: str) -> list[LabSuiteTask]:
    """The tasks that a reference names: all of a suite, or one.

    Raises:
        UsageError: There is no such suite or task, or the suite has not been built.
        ModelError: The suite is damaged.
    """
    text = reference.removeprefix(PREFIX)
    suite_name, one = (text, None) if (Path(text) / FILE).is_file() else _split(text)
    suite = load_suite(suite_name)
    tasks = suite.tasks()
    if one is not None and one not in tasks:
        raise UsageError(f"the suite {suite_name!r} has no task {one!r}", hint=did_you_mean(one, tasks))
    return [LabSuiteTask(suite, task, name) for name, task in tasks.items() if one in (None, name)]


def _split(reference: str) -> tuple[str, str | None]:
    """A suite's reference and a task's name."""
    suite, slash, task = reference.rpartition("/")
    return (suite, task) if slash and suite else (reference, None)
