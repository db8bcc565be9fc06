"""What rounding to the output's dtypes loses, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from geomerge.checkpoint.dtypes import recipe_name

if TYPE_CHECKING:
    from geomerge.engine.plan import Node, Plan

WORTH_SAYING = 0.01
"""A smaller rounding loss is not mentioned to people."""


def rounding(plan: Plan, loss: float | None) -> str | None:
    """The rounding loss in a sentence, or `None` when there is nothing to say."""
    if loss is None or loss < WORTH_SAYING:
        return None
    dtypes = rounded(plan.output_nodes())
    if plan.stages[-1].rounding == "stochastic":
        return (
            f"stochastic rounding to {dtypes} adds noise of {loss * 100:.0f} % of the task vectors' norm, which averages out; "
            "`dtype: float32` adds none"
        )
    return (
        f"rounding to {dtypes} takes {loss * 100:.0f} % of the task vectors' norm: "
        "`dtype: float32` or `rounding: stochastic` keep it"
    )


def rounded(nodes: Iterable[Node]) -> str:
    """The dtypes that merged tensors are rounded to; what codes cost is said elsewhere."""
    return dtypes(n for n in nodes if n.method is not None and not n.scales)


def dtypes(nodes: Iterable[Node]) -> str:
    """The dtypes of some tensors."""
    return ", ".join(dict.fromkeys(recipe_name(n.dtype) for n in nodes)) or "nothing"
