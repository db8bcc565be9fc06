"""Experts lined up with their base where no recipe does it: for `compress` and `continue`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.engine.plan import Plan
from geomerge.engine.planner import make_plan
from geomerge.errors import UsageError
from geomerge.recipe import loads
from geomerge.tokens.compare import one_vocabulary


def plan_experts(
    base: str | Path, experts: Iterable[str | Path], *, allow_pickle: bool = False
) -> tuple[Plan, list[Checkpoint]]:
    """The plan of the sum of their task vectors, and the opened models.

    Args:
        base: What all were trained from: a path or a hub id.
        experts: Likewise.
        allow_pickle: Read pickled weights (weights only).

    Raises:
        UsageError: An expert is the base.
        ModelError: A model cannot be used, or they do not fit.
    """
    root, places = _absolute(base), [_absolute(expert) for expert in experts]
    if root in places:
        raise UsageError(
            f"{base} is the base and one of the experts", hint="leave it out: its task vector is zero everywhere"
        )
    models = [{"model": place, "parameters": {"weight": 1.0}} for place in places]
    recipe = {"merge_method": "task_arithmetic", "base_model": root, "models": models}
    with one_vocabulary():
        return make_plan(loads(json.dumps(recipe, ensure_ascii=False), ""), allow_pickle=allow_pickle)


def _absolute(reference: str | Path) -> str:
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.exists() else str(reference)
