"""EMR-Merging: one unified task vector, and for each task a mask and a factor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.combine import added, elected_sign
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, SCALE, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.tile import Scan, Tile
from geomerge.methods.walk import Walk

if TYPE_CHECKING:
    from torch import Tensor


def unified(deltas: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The elected signs, − where the task vectors cancel exactly, and the largest magnitudes that agree with them.

    Returns:
        Sign and magnitude, shaped as the task vectors, which stay as they are.
    """
    sign = elected_sign(added(deltas), tie=-1.0)
    most = (deltas[0] * sign).clamp_(min=0.0)
    for delta in deltas[1:]:
        most = most.maximum(delta * sign)
    return sign, most


@register
@dataclass(frozen=True)
class Emr(Elementwise):
    """Elect one sign and the largest magnitude for every element; a task's own model takes those that agree with it, rescaled.

    The factor of a task makes the L1 norm of what it takes that of its task vector. (The authors' code adds up means of tensors
    instead, ``rescale: tensor_mean``, which differs by a few per cent.)
    """

    name: ClassVar[str] = "emr"
    aliases: ClassVar[tuple[str, ...]] = ("emr_merging",)
    title: ClassVar[str] = "EMR-Merging (elect, mask, rescale)"
    paper: ClassVar[str] = "Huang et al. 2024, EMR-Merging, arXiv:2405.17461"
    formula: ClassVar[str] = (
        "θ = θ₀ + τ,  τ = s · max{|τₜ| : sgn τₜ = s},  s = sgn Σ τₜ (− for 0);  of task t: θ₀ + λₜ · [τₜ·s > 0] ⊙ τ"
    )
    when: ClassVar[str] = (
        "All experts are to be kept in little room: `geomerge compress` stores the unified vector and one bit an element and "
        "task. `task: k` gives the k-th expert's own model; without it the unified vector is added as it is."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: emr
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {task: 2}
dtype: bfloat16
"""

    task: int = parameter(
        0, within=(0, 10_000), expert=True, doc="whose own model: 1 is the first expert's; 0: the unified one"
    )
    rescale: str = parameter("l1", choices=("l1", "tensor_mean"), doc="what the factor of a task keeps")

    @property
    def surveys(self) -> int:
        return int(self.task > 0)

    def check(self, count: int, compat: str | None = None) -> None:
        if self.task > count:
            choice = f"give one of 1 to {count}, or 0 for the unified one"
            raise ValueError(f"task is {self.task}, but there are {count} experts: {choice}")

    def survey(self, walk: Walk) -> float:
        """λ of the task."""
        norms = [row for row in walk.over(self._norms) if row]
        if not norms:
            return 1.0
        own, taken = (math.fsum(column) for column in zip(*norms, strict=True))
        return own / taken if taken > 0 else 1.0

    def _norms(self, scan: Scan) -> list[float]:
        """‖τₜ‖₁ and ‖Mₜ ⊙ τ‖₁ of one tensor."""
        if not scan.numel:
            return []

        def quantities(tile: Tile) -> list[Tensor]:
            deltas = tile.task_vectors()
            sign, most = unified(deltas)
            own = deltas[self.task - 1]
            return [own.abs(), most.mul_((own * sign).gt_(0.0))]

        share = scan.numel if self.rescale == "tensor_mean" else 1
        return [total / share for total in scan.sums(quantities, recorded=True)]

    def measure(self, scan: Scan) -> Any:
        return self.known

    def blend(self, tile: Tile, stats: float) -> Tensor:
        deltas = tile.task_vectors()
        sign, most = unified(deltas)
        if self.task:
            most.mul_((deltas[self.task - 1] * sign).gt_(0.0))
        return tile.base.addcmul_(most, sign, value=stats if self.task else 1.0)
