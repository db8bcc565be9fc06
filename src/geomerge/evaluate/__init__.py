"""Scores of models on tasks, with their uncertainty, beside those of the parents.

    from geomerge.evaluate import evaluate

    scores = evaluate("merged/", "skills,perplexity:text.txt", parents=["a/", "b/"])
    scores.value("merged", "arithmetic")
    scores.write("scores.json")

`Scores`, `compare` and `synergy` are cheap to import: torch is imported by what loads models. The package can be called,
too, so that ``geomerge.evaluate(...)`` is the verb and ``geomerge.evaluate.Scores`` the class.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geomerge.evaluate.scores import Scores
from geomerge.verbs import call_as

if TYPE_CHECKING:
    from geomerge.evaluate.run import Interrupted, Progress, evaluate
    from geomerge.evaluate.samples import Samples
    from geomerge.evaluate.statistics import compare, mcnemar, normalised, synergy
    from geomerge.evaluate.task import Settings, Task

__all__ = [
    "Interrupted",
    "Progress",
    "Samples",
    "Scores",
    "Settings",
    "Task",
    "compare",
    "evaluate",
    "mcnemar",
    "normalised",
    "synergy",
]

_HOMES = {
    "Interrupted": "run",
    "Progress": "run",
    "evaluate": "run",
    "Samples": "samples",
    "compare": "statistics",
    "mcnemar": "statistics",
    "normalised": "statistics",
    "synergy": "statistics",
    "Settings": "task",
    "Task": "task",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"geomerge.evaluate.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'geomerge.evaluate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


call_as(__name__, "run")
