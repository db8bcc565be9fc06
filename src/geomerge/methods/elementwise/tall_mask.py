"""TALL-masks: which elements of a merged task vector belong to a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.combine import added
from geomerge.methods.properties import BASE, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.tile import Tile

if TYPE_CHECKING:
    from torch import Tensor


def tall_mask(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """1.0 where |τₜ| > λₜ·|τ_MTL − τₜ|, else 0.0."""
    return (total - delta).abs_().mul_(threshold).lt(delta.abs()).to(delta.dtype)


@register
@dataclass(frozen=True)
class TallMask(Elementwise):
    """Give a task back from the sum of all task vectors: the elements in which it outweighs the others."""

    name: ClassVar[str] = "tall_mask"
    aliases: ClassVar[tuple[str, ...]] = ("tall_masks", "tall")
    title: ClassVar[str] = "TALL-masks"
    paper: ClassVar[str] = (
        "Wang et al. 2024, Localizing Task Information for Improved Model Merging and Compression, arXiv:2405.07813"
    )
    formula: ClassVar[str] = "θ = θ₀ + mₜ ⊙ Σ τₛ,  mₜ = [|τₜ| > λₜ·|Σ τₛ − τₜ|]"
    when: ClassVar[str] = (
        "To see how much of an expert survives in a sum of task vectors. `geomerge compress` stores the sum and all experts' "
        "masks, `geomerge extract` gives one back."
    )
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SINGLE, SCALE, SIGN})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: tall_mask
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {task: 1, threshold: 0.4}
dtype: bfloat16
"""

    task: int = parameter(1, within=(1, 10_000), expert=True, doc="whose model: 1 is the first expert's")
    threshold: float = parameter(
        0.4, within=(0, 100), doc="λ of the mask; larger is sparser. The paper chooses from 0.2 to 0.6"
    )

    def check(self, count: int, compat: str | None = None) -> None:
        if self.task > count:
            raise ValueError(f"task is {self.task}, but there are {count} experts: give one of 1 to {count}")

    def blend(self, tile: Tile, stats: Any) -> Tensor:
        deltas = tile.task_vectors()
        total = added(deltas)
        mask = tall_mask(deltas[self.task - 1], total, self.threshold)
        return tile.base.addcmul_(total, mask)
