"""Whether a merge can work, before it is made: how far the parents stand apart, what differs, what to do.

    from geomerge.diagnose import diagnose

    found = diagnose("./chat", "./code")
    print(found.decision)               # what to do, and why
    found.recipe()                      # YAML that `geomerge merge` runs

`guard.check` is the same measurement in small, for the engine: a sample of a plan's tensors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geomerge.verbs import call_as

if TYPE_CHECKING:
    from geomerge.diagnose.decision import Decision, Step
    from geomerge.diagnose.diagnosis import Diagnosis, Pair
    from geomerge.diagnose.guard import Guard, check, make_global
    from geomerge.diagnose.run import diagnose
    from geomerge.diagnose.score import Score
    from geomerge.diagnose.thresholds import Thresholds

__all__ = [
    "Decision",
    "Diagnosis",
    "Guard",
    "Pair",
    "Score",
    "Step",
    "Thresholds",
    "check",
    "diagnose",
    "make_global",
]

_HOMES = {
    "Decision": "decision",
    "Diagnosis": "diagnosis",
    "Guard": "guard",
    "Pair": "diagnosis",
    "Score": "score",
    "Step": "decision",
    "Thresholds": "thresholds",
    "check": "guard",
    "diagnose": "run",
    "make_global": "guard",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"geomerge.diagnose.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'geomerge.diagnose' has no attribute {name!r}")


call_as(__name__, "run")
