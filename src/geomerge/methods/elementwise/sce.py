"""SCE: select by variance, calculate weights by energy, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from geomerge.methods import native
from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.combine import added, elected_sign
from geomerge.methods.order import largest
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, SCALE, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.selection import Selection, share
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.tile import Loop

_LEAST = 2.0**-60
"""A smaller weight may be none in float32."""


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """K² times the population variance over the K experts at each position: K Σe² − (Σe)² with e = δₖ − δ₁.

    Free of division, so that it is exactly zero where the experts agree, and that positions of equal variance on the coarse
    grid of bfloat16 differences stay equal, in whatever order the experts come.
    """
    if len(deltas) == 1:
        return deltas[0] * 0.0
    first, *others = (d - deltas[0] for d in deltas[1:])
    total, squares = first.clone(), first.square()
    for e in others:
        total.add_(e)
        squares.addcmul_(e, e)
    return squares.mul_(len(deltas)).addcmul_(total, total, value=-1.0).clamp_(min=0.0)


@register
@dataclass(frozen=True)
class Sce(Elementwise):
    """Merge the positions where the experts differ most, each expert weighted by the energy of its task vector."""

    name: ClassVar[str] = "sce"
    title: ClassVar[str] = "SCE (Select, Calculate, Erase)"
    paper: ClassVar[str] = "Wan et al. 2024, FuseChat, arXiv:2408.07990"
    formula: ClassVar[str] = (
        "θ = θ₀ + Σ cₖτₖmₖ / Σ cₖmₖ,  cₖ ∝ mean τₖ² on the positions of largest variance, m = sign agrees"
    )
    when: ClassVar[str] = "Fused chat models of one base, without any weights to choose."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE})
    mergekit: ClassVar[dict[str, Any]] = {"energy_floor": 1e-6, "divisor_floor": 1e-6, "counting": "binary"}
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: sce
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {select_topk: 0.5}
dtype: bfloat16
"""

    select_topk: float = parameter(
        1.0, within=(0, 1), doc="share of the positions with nonzero variance that is merged"
    )
    select_only_for_weights: bool = parameter(
        False, doc="let the selection decide the weights only and merge all positions (the released FuseChat code)"
    )
    energy_floor: float = parameter(0.0, within=(0, 1), doc="equal weights below this total energy (mergekit: 1e-6)")
    divisor_floor: float = parameter(0.0, within=(0, 1), doc="smallest divisor (mergekit: 1e-6)")
    counting: str = parameter(
        "decimal",
        choices=("decimal", "binary"),
        doc="what a share of n elements is: 0.29 of 100 is 29, or 28 as in mergekit, which cuts off binary fractions",
    )

    def check(self, count: int, compat: str | None = None) -> None:
        if self.select_topk < 1 and count < 2 and compat is None:
            raise ValueError("select_topk below 1 needs 2 experts at least: positions of one have no variance")

    def measure(self, scan: Scan) -> tuple[Selection | None, list[float]]:
        selection = None
        if self.select_topk < 1 and scan.numel:
            (nonzero,) = scan.sums(lambda tile: [_variance(tile.task_vectors()).ne_(0.0)], recorded=True)
            count = share(self.select_topk, int(nonzero), binary=self.counting == "binary")
            (selection,) = largest(scan, lambda tile: [_variance(tile.task_vectors())], [count], recorded=True)

        def energies(tile: Tile) -> list[Tensor]:
            deltas = tile.task_vectors()
            self._select(deltas, tile, selection, "energy")
            return [d.square_() for d in deltas]

        energy = scan.sums(energies, recorded=True) if scan.numel else [0.0] * scan.experts
        total = math.fsum(energy)
        if total == 0 or total / max(scan.numel, 1) < self.energy_floor:
            return selection, [1 / scan.experts] * scan.experts
        return selection, [each / total for each in energy]

    @staticmethod
    def _select(deltas: Sequence[Tensor], tile: Tile, selection: Selection | None, label: str) -> None:
        if selection is not None:
            mask = selection.shrink_(_variance(deltas), tile, label).ne_(0.0)
            for d in deltas:
                d.mul_(mask)

    def blend(self, tile: Tile, stats: tuple[Selection | None, list[float]]) -> Tensor:
        selection, weights = stats
        deltas = tile.task_vectors()
        if not self.select_only_for_weights:
            self._select(deltas, tile, selection, "blend")
        elected = elected_sign(added(deltas))
        agreeing = [d.mul_(elected).clamp_(min=0.0) for d in deltas]
        total = added(agreeing, weights)
        divisor = added([d.sign_() for d in agreeing], weights)
        if self.divisor_floor:
            divisor.clamp_(min=self.divisor_floor)
        divisor.add_((divisor == 0.0).to(divisor.dtype))
        return tile.base.addcdiv_(total.mul_(elected), divisor)

    def compiled(self, scan: Scan, stats: tuple[Selection | None, list[float]]) -> Loop | None:
        selection, weights = stats
        whole = selection is None or self.select_only_for_weights
        narrow = scan.compiled and {source.dtype for source in scan.sources} == {"BF16"}
        if not (whole and narrow and len(weights) <= native.AGREEING):
            return None
        rule = native.Agreement(floor=self.divisor_floor)
        rule.weight[: len(weights)] = weights
        given = [w for w in weights if w]
        rule.quick = min(given, default=0.0) >= max(_LEAST, self.divisor_floor)
        # What was measured has been looked at.
        return lambda place, *where: native.agreement(scan.stored(place.start, place.numel), rule, *where)
