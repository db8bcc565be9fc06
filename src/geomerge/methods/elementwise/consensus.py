"""Consensus Merging: of a merged task vector keep what several tasks need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from geomerge.methods.base import Elementwise, parameter, per_model
from geomerge.methods.combine import added
from geomerge.methods.elementwise.tall_mask import TallMask, TiesSum, tall_mask
from geomerge.methods.properties import BASE, PERMUTATION, SCALE, SIGN
from geomerge.methods.registry import register
from geomerge.methods.selection import Selection
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from torch import Tensor


FEW = 0.05
"""Share of a model's elements below which what Consensus keeps of the merged vector is worth a warning."""


@dataclass(frozen=True)
class _Consensus(Elementwise):
    """θ₀ + λ · [Σ mₜ ≥ k] ⊙ τ_MTL."""

    threshold: tuple[float, ...] = per_model(0.4, within=(0, 100), doc="λ of the expert's mask; larger is sparser")
    k: int = parameter(2, within=(0, 10_000), doc="how many masks an element must be in")
    lambda_: float = parameter(0.3, doc="factor of the merged task vector")

    def check(self, count: int, compat: str | None = None) -> None:
        if self.k > count:
            there = "is 1 expert" if count == 1 else f"are {count} experts"
            raise ValueError(
                f"k is {self.k}, but there {there}: nothing would be left but the base; give at most {count}"
            )

    def warning(self, told: Sequence[tuple[int, Mapping[str, Any]]]) -> str | None:
        numel = sum(n for n, found in told if "kept" in found)
        kept = sum(found.get("kept", 0) for _, found in told)
        if not numel or kept >= FEW * numel:
            return None
        loosest = max(self.threshold)
        looser = [f"k (is {self.k})"] * (self.k > 1) + [f"threshold (is {loosest:g})"] * (loosest > 0)
        return (
            f"{self.name} keeps {100 * kept / numel:.2g} % of the elements: nearly all of the output is the base; "
            + (f"lower {' or '.join(looser)}, or " if looser else "")
            + "take another method for experts that share little"
        )

    def shared(self, tile: Tile, deltas: Sequence[Tensor], total: Tensor, kept: list[int]) -> Tensor:
        """The merged vector, cut down to what enough tasks need; how much that is goes into a list."""
        mask = added([tall_mask(d, total, t) for d, t in zip(deltas, self.threshold, strict=True)]).ge_(self.k)
        tile.count(mask, kept.append)
        return total.mul_(mask)


@register
@dataclass(frozen=True)
class Consensus(_Consensus):
    """Of the sum of all task vectors keep the elements that at least k tasks need: no selfish ones, none that nobody needs."""

    name: ClassVar[str] = "consensus"
    aliases: ClassVar[tuple[str, ...]] = ("consensus_ta",)
    title: ClassVar[str] = "Consensus Merging (task arithmetic)"
    paper: ClassVar[str] = TallMask.paper
    formula: ClassVar[str] = "θ = θ₀ + λ · [Σ mₜ ≥ k] ⊙ Σ τₛ"
    when: ClassVar[str] = (
        "Many experts. With k = 2 experts of disjoint changes give back the base, so it is wrong for few that share nothing."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: consensus
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {k: 2, threshold: 0.4, lambda: 0.3}
dtype: bfloat16
"""

    @property
    def looks(self) -> bool:
        return False

    def measure(self, scan: Scan) -> list[int]:
        return []

    def blend(self, tile: Tile, stats: list[int]) -> Tensor:
        deltas = tile.task_vectors()
        return tile.base.add_(self.shared(tile, deltas, added(deltas), stats), alpha=self.lambda_)

    def tell(self, stats: list[int]) -> dict[str, int]:
        return {"kept": sum(stats)}


@register
@dataclass(frozen=True)
class ConsensusTies(_Consensus, TiesSum):
    """Consensus over the merged vector of TIES (trimmed, sign elected, added up)."""

    name: ClassVar[str] = "consensus_ties"
    title: ClassVar[str] = "Consensus Merging (TIES)"
    paper: ClassVar[str] = TallMask.paper
    formula: ClassVar[str] = "θ = θ₀ + λ · [Σ mₜ ≥ k] ⊙ Σ{τ̂ₛ : sgn τ̂ₛ = sgn Σ τ̂}"
    when: ClassVar[str] = "As consensus, where signs conflict."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: consensus_ties
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {density: 0.2, k: 2, lambda: 0.3}
dtype: bfloat16
"""

    def measure(self, scan: Scan) -> tuple[list[Selection], list[int]]:
        return self.trim(scan.experts).measure(scan), []

    def tell(self, stats: tuple[list[Selection], list[int]]) -> dict[str, int]:
        return {"kept": sum(stats[1])}

    def blend(self, tile: Tile, stats: tuple[list[Selection], list[int]]) -> Tensor:
        deltas = tile.task_vectors()
        selections, kept = stats
        total = self.disjoint_sum(tile, deltas, selections)
        return tile.base.add_(self.shared(tile, deltas, total, kept), alpha=self.lambda_)
