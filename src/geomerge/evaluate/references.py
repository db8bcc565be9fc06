"""From what the user calls tasks to tasks.

skills   skills/arithmetic   lab:glyphs:small:3   a suite's directory      a lab suite, or one task of it
leaderboard   leaderboard/bbh                                              the Open LLM Leaderboard's six, or one
perplexity:FILE                                                            a text
classification:DIR                                                         images in a folder for each class
FILE.py:FUNCTION                                                           the user's own
NAME   NAME@METRIC                                                         a task, group or tag of lm-eval
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomerge.errors import UsageError, did_you_mean
from geomerge.evaluate import callable as own
from geomerge.evaluate import classification, lab, leaderboard, lm_eval_tasks, perplexity
from geomerge.evaluate.task import Task
from geomerge.lab.kinds import KINDS

TasksLike = Any
"""A reference, several separated by commas, a `Task`, a function, or a sequence of these."""


def find_tasks(tasks: TasksLike, include: Sequence[str | Path] = ()) -> list[Task]:
    """All tasks of an evaluation, each once, under names of which no two are the same.

    Args:
        tasks: See `TasksLike`.
        include: Directories of lm-eval's YAML files.

    Raises:
        UsageError: There is none, or a reference is wrong.
        DataError: A file or directory that one names is not there.
    """
    found: list[Task] = []
    for one in _flat(tasks):
        for task in _find(one, include) if isinstance(one, str) else [_given(one)]:
            if all(task != other for other in found):
                found.append(task)
    if not found:
        raise UsageError("no task was given", hint="--tasks skills, for example")
    names = [task.name for task in found]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        sources = sorted({task.source for task in found if task.name == twice})
        raise UsageError(
            f"two tasks are called {twice!r} ({', '.join(sources)})", hint="evaluate them one after the other"
        )
    return found


def of_harness(tasks: str | Sequence[str]) -> list[str]:
    """Which of several references are for lm-eval, whose list of tasks takes seconds to read."""
    known = (perplexity.PREFIX, classification.PREFIX, f"{leaderboard.NAME}/")
    return [
        one
        for one in _flat(tasks)
        if not (
            one.startswith(known) or one == leaderboard.NAME or ".py" in one or lab.is_lab(one) or _suite_meant(one)
        )
    ]


def _suite_meant(reference: str) -> str | None:
    """A hint where a lab suite's name before a slash is misspelt; lm-eval's own tasks have no slash in their names."""
    suite, slash, _ = reference.partition("/")
    hint = did_you_mean(suite, KINDS) if slash else None
    return hint if hint is not None and hint.startswith("did") else None


def _flat(tasks: TasksLike) -> list[Any]:
    """References apart from each other; commas inside of an existing path do not separate."""
    if isinstance(tasks, Path):
        return [str(tasks)]
    if isinstance(tasks, str):
        if not tasks.strip():
            return []
        if Path(tasks.partition(":")[2] or tasks).exists():
            return [tasks]
        return [part.strip() for part in tasks.split(",") if part.strip()]
    if isinstance(tasks, Sequence):
        return [one for some in tasks for one in _flat(some)]
    return [tasks]


def _given(task: Any) -> Task:
    """A task that was given as an object."""
    if hasattr(task, "score") and hasattr(task, "prepare"):
        made: Task = task
        return made
    if callable(task):
        return own.CallableTask(task, getattr(task, "__name__", type(task).__name__))
    raise UsageError(f"a task is a reference, a function or a Task, not {type(task).__name__}")


def _find(reference: str, include: Sequence[str | Path]) -> list[Task]:
    if "\0" in reference:
        raise UsageError(f"{reference!r} is not the name of a task")
    if reference.startswith(perplexity.PREFIX):
        return [perplexity.perplexity_task(reference)]
    if reference.startswith(classification.PREFIX):
        rest = reference.removeprefix(classification.PREFIX)
        if not Path(rest).expanduser().is_dir() and lab.is_lab(rest):
            return list(lab.lab_tasks(rest))
        return [classification.classification_task(reference)]
    if reference.endswith(".py"):
        raise UsageError(f"{reference} names no function", hint=f"a task of your own is named {reference}:FUNCTION")
    if own.is_callable(reference):
        return [own.callable_task(reference)]
    if lab.is_lab(reference):
        return list(lab.lab_tasks(reference))
    if reference == leaderboard.NAME or reference.startswith(f"{leaderboard.NAME}/"):
        return list(leaderboard.leaderboard_tasks(reference))
    close = _suite_meant(reference)
    if close is not None and not include:
        raise UsageError(f"there is no lab suite {reference.partition('/')[0]!r}", hint=close)
    return [lm_eval_tasks.lm_eval_task(reference, include)]
