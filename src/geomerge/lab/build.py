"""Building a suite: the base, then its experts side by side, then the table that says whether they are worth merging.

Every finished model stands under its own name in the cache, so an interrupted build goes on with what is there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from geomerge.errors import RunError, UsageError
from geomerge.lab.cache import FORMAT, locked, make_directory, suite_place, write_json
from geomerge.lab.kinds import LabTask, Requirement, SuiteKind, Tick, check_size, get_kind
from geomerge.lab.suite import FILE, Suite, read_suite
from geomerge.lab.training import reproducible
from geomerge.version import __version__

if TYPE_CHECKING:
    from torch import nn

Scores = Mapping[str, Mapping[str, float]]

AVERAGE = "average"
"""The row of the score table that is no model of the suite: the plain mean of all experts."""


class Progress(Protocol):
    """Watches a build, in training steps (scoring a model counts as a few). Called by one thread at a time."""

    def start(self, total: int, done: int) -> None:
        """The build begins: steps in all, and steps that an earlier build has made."""

    def advance(self, steps: int) -> None:
        """So many more steps were made."""

    def finish(self) -> None:
        """The build is over."""


class NotWorthMerging(RunError):
    """The suite's score table does not show what it has to.

    Attributes:
        scores: The table.
        experts: The tasks that have an expert.
    """

    scores: Scores = {}  # noqa: RUF012 - an error's attributes, set by `build`
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """One model to be trained: what it is called in its kind, and where it belongs."""

    role: str
    name: str
    place: Path


def build(
    suite: str,
    size: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
    workers: int = 2,
    force: bool = False,
) -> Suite:
    """Build a suite, or find it where it was built before.

    Args:
        suite: Its name.
        size: By default its smallest.
        seed: The same seed gives the same models on the same machine with the same versions.
        out: Copy the suite into this directory; otherwise it stays in the cache.
        progress: Told how far the build is.
        workers: How many experts are trained at the same time.
        force: Replace another suite at `out`.

    Raises:
        UsageError: There is no such suite or size, or `out` is taken.
        NotWorthMerging: The experts are not what a suite's experts have to be.
        RunError: A model could not be trained or written.
    """
    kind = get_kind(suite)
    size = size or kind.sizes[0]
    check_size(kind, size)
    if seed < 0:
        raise UsageError(f"a seed is 0 or more, not {seed}")
    if out is not None:
        _check_out(Path(out), force)
    place = suite_place(kind.name, size, seed, kind.settings(size))
    try:
        with locked(place):
            if not (place / FILE).is_file():
                _Build(kind, size, seed, place, progress, workers).run()
            built = read_suite(place)
        return built if out is None else _copy(built, Path(out))
    except OSError as error:
        raise RunError(f"the suite cannot be written: {error.strerror or error}", where=error.filename) from None


class _Build:
    """One build under its lock."""

    def __init__(
        self, kind: SuiteKind, size: str, seed: int, place: Path, progress: Progress | None, workers: int
    ) -> None:
        self.kind, self.size, self.seed, self.place = kind, size, seed, place
        self.workers = max(workers, 1)
        self.progress = progress
        self.tasks = tuple(kind.tasks(size, seed))
        self.steps = kind.steps(size)
        self.base = place / "base"
        self.experts = {task: place / "experts" / task for task in self.tasks}
        self.others = {name: place / name for name in kind.others}
        self.heads = {task: place / "heads" / f"{task}.safetensors" for task in self.tasks if kind.has_heads}
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self) -> None:
        models = 2 + len(self.experts) + len(self.others)
        scoring = max(sum(self.steps.values()) // 200, 1)
        jobs = [_Job("expert", task, path) for task, path in self.experts.items()]
        jobs += [_Job("other", name, path) for name, path in self.others.items()]
        done = sum(self.steps[job.name] for job in jobs if job.place.exists())
        done += self.steps["base"] if self.base.exists() else 0
        if self.progress is not None:
            self.progress.start(sum(self.steps.values()) + scoring * models, done)
        try:
            with reproducible(self.seed, None):
                self._train([_Job("base", "base", self.base)])
                if self.kind.has_heads:
                    make_directory(self.place / "heads", self._make_heads)
                self._train(jobs)
                scores = measure(
                    self.kind,
                    self.kind.tasks(self.size, self.seed, self.heads),
                    base=self.base,
                    experts=self.experts,
                    others=self.others,
                    after=lambda: self._tick(scoring),
                )
        finally:
            if self.progress is not None:
                self.progress.finish()
        wrong = failures(scores, self.tasks, self.kind.requirement(self.size))
        if wrong:
            error = NotWorthMerging("; ".join(wrong), where=f"{self.kind.name}-{self.size}, seed {self.seed}")
            error.scores, error.experts = scores, self.tasks
            raise error
        self._describe(scores)

    def _describe(self, scores: Scores) -> None:
        import torch

        write_json(
            self.place / FILE,
            {
                "format": FORMAT,
                "suite": self.kind.name,
                "size": self.size,
                "seed": self.seed,
                "kind": self.kind.kind,
                "base": "base",
                "experts": {task: f"experts/{task}" for task in self.experts},
                "others": {name: name for name in self.others},
                "heads": {task: f"heads/{task}.safetensors" for task in self.heads},
                "scores": {m: {t: round(v, 6) for t, v in row.items()} for m, row in scores.items()},
                "settings": self.kind.settings(self.size),
                "made_with": {"geomerge": __version__, "torch": torch.__version__},
            },
        )

    def _tick(self, steps: int) -> None:
        if self.progress is not None:
            with self._lock:
                self.progress.advance(steps)

    def _make_heads(self, place: Path) -> None:
        self.kind.make_heads(self.base, self.size, self.seed, place)

    def _train(self, jobs: list[_Job]) -> None:
        """Train what is not there yet."""
        jobs = [job for job in jobs if not job.place.exists()]
        if not jobs:
            return
        if self.kind.in_process:
            for job in jobs:
                train_one(self.kind, self._order(job), self._tick)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            running = [pool.submit(self._in_a_process, job) for job in jobs]
            try:
                wait(running, return_when=FIRST_EXCEPTION)
            finally:
                with self._lock:
                    self._stopped = True
                    for process in self._running:
                        process.kill()
        for future in running:
            future.result()
        self._stopped = False

    def _order(self, job: _Job) -> dict[str, Any]:
        """What a worker has to know, as JSON data."""
        head = self.heads.get(job.name) if job.role == "expert" else None
        return {
            "suite": self.kind.name,
            "size": self.size,
            "seed": self.seed,
            "role": job.role,
            "name": job.name,
            "base": str(self.base),
            "head": None if head is None else str(head),
            "out": str(job.place),
        }

    def _in_a_process(self, job: _Job) -> None:
        """Train one model in a process of its own, which ends when this one does: it watches its standard input."""
        with self._lock:
            if self._stopped:
                return
            process = subprocess.Popen(
                [sys.executable, "-m", "geomerge.lab.worker", json.dumps(self._order(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="backslashreplace",
            )
            self._running.add(process)
        said: list[str] = []
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                word, _, number = line.partition(" ")
                if word == "steps" and number.strip().isdigit():
                    self._tick(int(number))
                else:
                    said = [*said[-20:], line.rstrip()]
        with self._lock:
            self._running.discard(process)
            stopped = self._stopped
        if process.returncode and not stopped:
            last = next((line for line in reversed(said) if line), f"exit code {process.returncode}")
            raise RunError(f"training failed: {last}", where=f"{self.kind.name}: {job.name}")


def train_one(kind: SuiteKind, order: Mapping[str, Any], tick: Tick) -> None:
    """Train the model that an order (see `_Build._order`) describes; it appears whole or not at all."""
    size, seed, base = order["size"], order["seed"], Path(order["base"])

    def fill(place: Path) -> None:
        if order["role"] == "base":
            kind.train_base(size, seed, place, tick)
        elif order["role"] == "expert":
            head = None if order["head"] is None else Path(order["head"])
            kind.train_expert(base, order["name"], size, seed, place, tick, head)
        else:
            kind.train_other(base, order["name"], size, seed, place, tick)

    make_directory(Path(order["out"]), fill)


# -- the score table ---------------------------------------------------------------------------------------------------


def measure(
    kind: SuiteKind,
    tasks: Mapping[str, LabTask],
    *,
    base: Path,
    experts: Mapping[str, Path],
    others: Mapping[str, Path],
    after: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """The accuracy of every model and of the experts' plain mean on every task's test split.

    Args:
        kind, tasks: Of the suite.
        base, experts, others: Model directories.
        after: Called after each model.
    """

    def row(model: nn.Module) -> dict[str, float]:
        found = {name: float(task.correct(model, "test").mean()) for name, task in tasks.items()}
        after()
        return found

    scores = {"base": row(kind.load_model(base))}
    loaded = {name: kind.load_model(path) for name, path in experts.items()}
    scores |= {name: row(model) for name, model in loaded.items()}
    scores |= {name: row(kind.load_model(path)) for name, path in others.items()}
    scores[AVERAGE] = row(plain_mean(list(loaded.values())))
    return scores


def plain_mean(models: list[nn.Module]) -> nn.Module:
    """The mean of several models' weights, computed in float64, in a copy of the first."""
    import copy

    import torch

    mean = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, value in mean.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    return mean


def mean(row: Mapping[str, float]) -> float:
    """The mean over all tasks of one model's scores."""
    return sum(row.values()) / len(row)


def experts_mean(scores: Scores, tasks: tuple[str, ...]) -> float:
    """The mean of every expert's score on its own task."""
    return sum(scores[task][task] for task in tasks) / len(tasks)


def failures(scores: Scores, tasks: tuple[str, ...], requirement: Requirement) -> list[str]:
    """What a score table lacks, one sentence each; empty when the experts are worth merging.

    Args:
        scores: Model, then task.
        tasks: Those that have an expert of the same name.
        requirement: What is asked for.
    """
    tiny = 1e-9
    found = []
    for task in tasks:
        gain = scores[task][task] - scores["base"][task]
        if gain < requirement.gain - tiny:
            found.append(
                f"the expert of {task!r} is {100 * gain:.1f} points better than the base on its task; "
                f"{100 * requirement.gain:g} are required"
            )
    own, average = experts_mean(scores, tasks), mean(scores[AVERAGE])
    if own - average < requirement.gap - tiny:
        found.append(
            f"the plain average ({100 * average:.1f}) is {100 * (own - average):.1f} points below the experts "
            f"({100 * own:.1f}); {100 * requirement.gap:g} are required"
        )
    return found


# -- a copy for the user -----------------------------------------------------------------------------------------------


def _check_out(out: Path, force: bool) -> None:
    if "\0" in str(out):
        raise UsageError(f"{str(out)!r} is not a path")
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        replaceable = (out / FILE).is_file() and not out.is_symlink()
    except OSError as error:
        raise UsageError(f"the output's place cannot be used: {error.strerror}", where=str(out)) from None
    if not replaceable:
        raise UsageError("something else is there already", where=str(out), hint="name a directory that does not exist")
    if not force:
        raise UsageError("a suite is there already", where=str(out), hint="--force replaces it")


def _copy(suite: Suite, out: Path) -> Suite:
    """Copy a suite out of the cache; the copy appears whole or not at all."""
    unfinished = out.absolute().with_name(f"{out.absolute().name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(suite.root, unfinished, ignore=shutil.ignore_patterns("lock", "*.partial"))
    if out.exists():
        shutil.rmtree(out)
    unfinished.rename(out.absolute())
    return read_suite(out)
