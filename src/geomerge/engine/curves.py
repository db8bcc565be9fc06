"""Interpolation coefficients over depth, read off a plan, for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomerge import anatomy

if TYPE_CHECKING:
    from geomerge.engine.plan import Plan


@dataclass(frozen=True)
class Curves:
    """The coefficient `t` of a plan's output.

    Attributes:
        blocks: Blocks of the largest stack.
        roles: Role → block → t, the mean where a block's tensors of that role differ.
        outside: Role → t of what stands before or after the blocks.
    """

    blocks: int
    roles: Mapping[str, Mapping[int, float]]
    outside: Mapping[str, float]

    @property
    def constant(self) -> bool:
        """Whether one number says it all."""
        values = {v for curve in self.roles.values() for v in curve.values()} | set(self.outside.values())
        return len(values) <= 1


def curves(plan: Plan) -> Curves | None:
    """The coefficients over depth and role; `None` when the method does not interpolate or there are no blocks."""
    found = {
        node.name: float(t)
        for node in plan.output_nodes()
        if node.method is not None and isinstance(t := getattr(node.method, "t", None), float | int)
    }
    if not found:
        return None
    parts = anatomy.read({n.name: n.shape for n in plan.output_nodes()}, plan.config).parts
    inside: dict[str, dict[int, list[float]]] = {}
    outside: dict[str, list[float]] = {}
    for name, t in found.items():
        part = parts[name]
        if part.block is None:
            outside.setdefault(part.role, []).append(t)
        else:
            inside.setdefault(part.role, {}).setdefault(part.block, []).append(t)
    if not inside:
        return None
    return Curves(
        blocks=1 + max(block for curve in inside.values() for block in curve),
        roles={role: {b: sum(v) / len(v) for b, v in sorted(c.items())} for role, c in inside.items()},
        outside={role: sum(v) / len(v) for role, v in outside.items()},
    )
