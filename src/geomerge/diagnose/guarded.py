"""Plans with guardrails: what `merge` and `plan` make of a recipe, and what happens where the parents do not suit each other.

`warn` (the default) says so in the notes; `enforce` changes the plan: one coefficient everywhere for parents that stand far
apart or are small, the embeddings aligned first where the vocabularies differ; `off` does not look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.engine.plan import Plan
from geomerge.engine.planner import make_plan
from geomerge.recipe.values import AlignSpec, Pipeline

if TYPE_CHECKING:
    from geomerge.diagnose.guard import Guard


def guarded_plan(
    pipeline: Pipeline, *, models: Mapping[str, Checkpoint] | None = None, allow_pickle: bool = False
) -> tuple[Plan, list[Checkpoint]]:
    """Resolve a recipe, and ask the guardrails about the result where it is an interpolation of two models.

    Arguments, result and errors are those of `geomerge.engine.planner.make_plan`. The plan's `guardrails` holds what was
    found and done, for the manifest.
    """
    policy = pipeline.output.guardrails or "warn"
    plan, opened = make_plan(pipeline, models=models, allow_pickle=allow_pickle)
    if policy == "off" or not any(node.interpolates for node in plan.output_nodes()):
        return plan, opened
    from geomerge.diagnose.guard import check, make_global

    try:
        guard = check(plan, opened)
        if guard is None:
            return plan, opened
        if policy == "enforce" and guard.aligns and pipeline.output.align is None:
            changed = _aligned(pipeline)
            aligned, again = make_plan(changed, models=models, allow_pickle=allow_pickle)
            _close(opened)
            opened = again
            return _noted(aligned, guard, policy, "the embeddings are aligned on the shared tokens first"), opened
    except BaseException:
        _close(opened)
        raise
    if policy == "enforce" and guard.falls_back:
        action = f"one coefficient everywhere, t = {guard.t:.3g}"
        return _noted(make_global(plan, guard.t), guard, policy, action), opened
    return _noted(plan, guard, policy, None), opened


def _aligned(pipeline: Pipeline) -> Pipeline:
    """The same recipe with its embeddings aligned."""
    output = pipeline.output
    return replace(
        pipeline,
        recipes=(*pipeline.recipes[:-1], replace(output, align=AlignSpec("embedding", where=output.at("guardrails")))),
    )


def _noted(plan: Plan, guard: Guard, policy: str, action: str | None) -> Plan:
    """The plan with what the guardrails said and did."""
    facts: dict[str, Any] = guard.to_manifest(policy) | {"action": action}
    notes = list(guard.messages)
    if action is not None:
        notes = [f"guardrails: enforce ({guard.verdict}, mean angle {guard.omega_bar:.2g} rad): {action}"]
    return replace(plan, notes=(*plan.notes, *notes), guardrails=facts, _hash=[])


def _close(opened: Sequence[Checkpoint]) -> None:
    for checkpoint in opened:
        checkpoint.close()
