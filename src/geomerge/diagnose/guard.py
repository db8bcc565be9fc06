"""The guardrails within a merge: a sample of the plan's tensors says whether the pair is one that SLERP can blend.

Of at most `GROUPS` groups (a block's tensors of one role), spread evenly over them, `PIECES` pieces of `PIECE` elements of each
tensor are read from both parents; their products, scaled up to the tensor, stand for the tensor's. For two models of half a
billion parameters that is about 30 ms, and ω̄ differs from the full measurement in the third digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from geomerge import anatomy
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.diagnose.group import Group, group_of
from geomerge.diagnose.thresholds import Thresholds
from geomerge.engine.build import Builder
from geomerge.engine.plan import Node, Plan
from geomerge.methods.base import Method
from geomerge.methods.gram import Gram
from geomerge.methods.tile import elements

GROUPS = 48
PIECES = 4
PIECE = 2048

Verdict = Literal["fine", "near_duplicate", "divergent", "small", "vocabulary"]


@dataclass(frozen=True)
class Guard:
    """What the guardrails say of a plan.

    Attributes:
        verdict: ``fine``; ``near_duplicate``: little to gain; ``divergent``: ω̄ > τ_ω, guardrail (i); ``vocabulary``: O < τ_O,
            guardrail (ii); ``small``: a layer-adaptive merge below 1B parameters, guardrail (iii).
        omega_bar: ω̄ in radians, estimated.
        overlap: O by token strings, when the plan re-orders vocabularies; else `None`.
        groups: How many groups the estimate rests on.
        messages: Sentences for the user; empty when all is fine.
        t: The one coefficient to use when the guardrails are enforced: the mean of the plan's, weighted by elements.
    """

    verdict: Verdict
    omega_bar: float
    overlap: float | None
    groups: int
    messages: tuple[str, ...]
    t: float

    @property
    def falls_back(self) -> bool:
        """Whether enforcing means one coefficient everywhere."""
        return self.verdict in ("divergent", "small")

    @property
    def aligns(self) -> bool:
        """Whether enforcing means to align the embeddings first."""
        return self.verdict == "vocabulary"

    def to_manifest(self, policy: str) -> dict[str, Any]:
        """What the manifest says.

        Args:
            policy: ``warn``, ``enforce`` or ``off``.
        """
        return {
            "policy": policy,
            "verdict": self.verdict,
            "omega_bar": round(self.omega_bar, 6),
            "overlap": None if self.overlap is None else round(self.overlap, 6),
            "groups_sampled": self.groups,
            "messages": list(self.messages),
        }


def check(plan: Plan, inputs: Sequence[Checkpoint], thresholds: Thresholds | None = None) -> Guard | None:
    """Ask the guardrails about a plan.

    Args:
        plan: The plan.
        inputs: Its opened inputs, in its order.
        thresholds: The limits.

    Returns:
        `None` when the plan is no interpolation of two models on the sphere: the guardrails are about nothing else.
    """
    nodes = [n for n in plan.output_nodes() if n.interpolates]
    if not nodes:
        return None
    limits = thresholds or Thresholds()
    parts = anatomy.read({n.name: n.shape for n in plan.output_nodes()}, plan.config).parts
    groups: dict[Group, list[Node]] = {}
    for node in nodes:
        groups.setdefault(group_of(parts[node.name]), []).append(node)
    chosen = _spread(list(groups.values()), GROUPS)
    builder = Builder(plan, inputs)
    angles = [angle for group in chosen if (angle := _angle(builder, group)) is not None]
    omega = math.fsum(angles) / len(angles) if angles else 0.0
    elements = sum(n.numel for n in nodes)
    t = math.fsum(_t(n) * n.numel for n in nodes) / max(elements, 1)
    overlap = _overlap(plan)
    adaptive = len({_t(n) for n in nodes}) > 1
    verdict, messages = _judge(omega, overlap, elements, limits, adaptive=adaptive)
    return Guard(verdict, omega, overlap, len(angles), messages, min(max(t, 0.0), 1.0))


def make_global(plan: Plan, t: float) -> Plan:
    """The same plan with one coefficient everywhere.

    Args:
        plan: A plan of a SLERP.
        t: The coefficient.
    """
    nodes = tuple(_with(n, t) if n.stage == len(plan.stages) - 1 and n.interpolates else n for n in plan.nodes)
    return replace(plan, nodes=nodes, _hash=[])


def _with(node: Node, t: float) -> Node:
    assert node.method is not None
    changed: Method = replace(node.method, t=t)  # type: ignore[call-arg]
    return replace(node, method=changed)


def _t(node: Node) -> float:
    return float(getattr(node.method, "t"))  # noqa: B009 - a parameter of these methods only


def _spread(groups: list[list[Node]], most: int) -> list[list[Node]]:
    if len(groups) <= most:
        return groups
    return [groups[i] for i in sorted({round(v) for v in np.linspace(0, len(groups) - 1, most)})]


def _angle(builder: Builder, group: Sequence[Node]) -> float | None:
    """The angle of a group, from samples of its tensors."""
    total = np.zeros((2, 2))
    for node in group:
        if node.numel:
            total += _sampled(builder, node)
    if not np.isfinite(total).all():
        return None  # the merge itself will find it, and name it
    gram = Gram(total)
    norms = float(gram.norm(0)), float(gram.norm(1))
    return float(gram.angle(0, 1)) if all(norms) else None


def _sampled(builder: Builder, node: Node) -> np.ndarray:
    """A tensor's centred Gram matrix, estimated."""
    size = min(PIECE, node.numel)
    number = min(PIECES, max(node.numel // size, 1))
    starts = np.linspace(0, node.numel - size, number).astype(np.int64).tolist()
    stack = np.empty((2, number, size))
    for k, operand in enumerate(node.operands):
        if operand.rows >= 0:
            return np.zeros((2, 2))  # rows in another order are read one by one: too slow for a look
        source = builder.source(operand, node)
        for i, start in enumerate(starts):
            stack[k, i] = elements(source, start, size)
    x, d = stack[0], stack[1] - stack[0]
    # Sums of products, not x @ x: the BLAS would wake its threads for a few microseconds of work.
    xx, xd, dd = (float((u * v).sum()) for u, v in ((x, x), (x, d), (d, d)))
    return np.array([[xx, xd], [xd, dd]]) * (node.numel / (number * size))


def _overlap(plan: Plan) -> float | None:
    """O of the two models whose rows are re-ordered: the share of the tokens of either that both have."""
    for rows in plan.rows:
        owners = rows.plan.owners
        if len(owners) == 2:
            either = int(((owners >= 0).any(0)).sum())
            return float(((owners >= 0).all(0)).sum() / either) if either else 1.0
    return None


def _judge(
    omega: float, overlap: float | None, elements: int, limits: Thresholds, *, adaptive: bool
) -> tuple[Verdict, tuple[str, ...]]:
    if omega > limits.angle:
        said = (
            f"the parents stand far apart: a mean angle of {omega:.2f} rad, above {limits.angle:g}; what lies between them may "
            "be no model. `geomerge diagnose` says whether it is a rotation, which `align: residual` undoes; "
            "`guardrails: enforce` falls back to one coefficient"
        )
        return "divergent", (said,)
    if overlap is not None and overlap < limits.overlap:
        said = (
            f"only {100 * overlap:.0f} % of the tokens are common (below {100 * limits.overlap:g} %): align the embeddings "
            "first (`align: {scope: embedding}`). `geomerge diagnose` says more"
        )
        return "vocabulary", (said,)
    if omega < limits.near_duplicate:
        said = f"the parents are near-duplicates: a mean angle of {omega:.2g} rad; a merge of them changes little"
        return "near_duplicate", (said,)
    if adaptive and limits.size_class(elements) == "<1B":
        said = (
            "below 1B parameters coefficients that change with depth lost to one coefficient in the paper's tests: score "
            "both. `guardrails: enforce` takes one"
        )
        return "small", (said,)
    return "fine", ()
