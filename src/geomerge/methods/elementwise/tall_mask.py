"""TALL-masks: which elements of a merged task vector belong to a task."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.combine import Surveyed, added, elected_sign, majority
from geomerge.methods.properties import BASE, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.selection import Selection
from geomerge.methods.sparsify import TOP_K, Magnitude
from geomerge.methods.tile import Scan, Tile
from geomerge.methods.walk import Walk

if TYPE_CHECKING:
    from torch import Tensor


def tall_mask(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """1.0 where |τₜ| > λₜ·|τ_MTL − τₜ|, else 0.0."""
    return (total - delta).abs_().mul_(threshold).lt(delta.abs()).to(delta.dtype)


@dataclass(frozen=True)
class TiesSum(Elementwise):
    """What can look at the merged vector of TIES, added up."""

    findings: ClassVar[tuple[type, ...]] = (Surveyed, Selection)

    density: float = parameter(0.2, within=(0, 1), above=0, doc="share of each task vector that is kept")
    scope: str = parameter(
        "global",
        choices=("global", "tensor"),
        doc="what density is a share of: the model, whose majority's sign is elected where votes cancel, or each tensor (+)",
    )
    top_k: str = parameter(
        "kth_inclusive",
        choices=TOP_K,
        doc="what density keeps exactly: as in the paper's code, that share and one more, with all equals; or see `ties`",
    )

    @property
    def surveys(self) -> int:
        return 0 if self.scope == "tensor" else 2 if self.density < 1 else 1

    @property
    def surveyed_alike(self) -> Hashable:
        return self.density, self.top_k

    def trim(self, experts: int) -> Magnitude:
        known = None if self.known is None else self.known.selections
        return Magnitude((self.density,) * experts, top_k=self.top_k, known=known)

    def survey(self, walk: Walk) -> Surveyed:
        step = self.trim(walk.experts)
        found = Surveyed(step.survey(walk))
        step = replace(step, known=found.selections)

        def voting(scan: Scan) -> Callable[[Tile], Tensor]:
            selections = step.measure(scan)
            return lambda tile: added(
                [step.keep_(delta, k, tile, selections) for k, delta in enumerate(tile.task_vectors())]
            )

        return found._replace(majority=majority(walk, voting))

    def disjoint_sum(self, tile: Tile, deltas: Sequence[Tensor], selections: list[Selection]) -> Tensor:
        """Σ{τ̂ₛ : sgn τ̂ₛ = sgn Σ τ̂}."""
        step = self.trim(len(deltas))
        trimmed = [step.keep_(delta.clone(), k, tile, selections) for k, delta in enumerate(deltas)]
        sign = elected_sign(added(trimmed), 1.0 if self.known is None else self.known.majority)
        return added([delta.mul_(sign).clamp_(min=0.0) for delta in trimmed]).mul_(sign)


@register
@dataclass(frozen=True)
class TallMask(TiesSum):
    """Give a task back from the sum of all task vectors: the elements in which it outweighs the others.

    `merged: ties` takes the merged vector of TIES (trimmed by `density`, signs elected, added up) in place of the sum.
    """

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

    merged: str = parameter(
        "sum", choices=("sum", "ties"), doc="the merged vector: the sum of the task vectors, or TIES of them, added up"
    )

    @property
    def looks(self) -> bool:
        return self.merged == "ties"

    @property
    def surveys(self) -> int:
        return super().surveys if self.merged == "ties" else 0

    def check(self, count: int, compat: str | None = None) -> None:
        if self.task > count:
            raise ValueError(f"task is {self.task}, but there are {count} experts: give one of 1 to {count}")

    def measure(self, scan: Scan) -> list[Selection]:
        return self.trim(scan.experts).measure(scan) if self.merged == "ties" else []

    def blend(self, tile: Tile, stats: list[Selection]) -> Tensor:
        deltas = tile.task_vectors()
        total = self.disjoint_sum(tile, deltas, stats) if self.merged == "ties" else added(deltas)
        mask = tall_mask(deltas[self.task - 1], total, self.threshold)
        return tile.base.addcmul_(total, mask)
