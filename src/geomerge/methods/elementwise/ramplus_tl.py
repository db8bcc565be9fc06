"""RAM+: RAM whose unshared changes are strengthened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.elementwise.ram import activity
from geomerge.methods.properties import BASE, PERMUTATION, SIGN
from geomerge.methods.registry import register
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class RamPlusTl(Elementwise):
    """RAM whose unshared changes are strengthened in experts that share much with others."""

    name: ClassVar[str] = "ramplus_tl"
    title: ClassVar[str] = "RAM+ (tensor level)"
    paper: ClassVar[str] = "Reinforced agent merging, 2026 (mergekit)"
    formula: ClassVar[str] = "as RAM; unshared δₖ are multiplied by 1 + r·clip(sharedₖ/uniqueₖ, 0, α)"
    when: ClassVar[str] = "As RAM, when averaging the shared changes weakens the experts."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SIGN})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: ramplus_tl
base_model: ./base
models: [{model: ./agent1}, {model: ./agent2}]
parameters: {r: 0.1, alpha: 0.2}
dtype: bfloat16
"""

    r: float = parameter(0.1, doc="strength of the amplification")
    alpha: float = parameter(0.2, within=(0, 1e6), doc="largest ratio of shared to unshared changes that counts")
    epsilon: float = parameter(1e-5, within=(0, 1e6), doc="changes up to this count as none")

    def measure(self, scan: Scan) -> list[float]:
        def counts(tile: Tile) -> list[Tensor]:
            masks, number = activity(tile.task_vectors(), self.epsilon)
            alone = number.eq(1.0).to(number.dtype)
            return [*(m * alone for m in masks), *masks]

        if not scan.numel:
            return [1.0] * scan.experts
        sums = scan.sums(counts, recorded=True)
        unique, active = sums[: scan.experts], sums[scan.experts :]
        pairs = zip(unique, active, strict=True)
        ratios = [(a - u) / max(u, self.epsilon) if max(u, self.epsilon) > 0 else 0.0 for u, a in pairs]
        return [1 + self.r * min(max(ratio, 0.0), self.alpha) for ratio in ratios]

    def blend(self, tile: Tile, stats: list[float]) -> Tensor:
        deltas = tile.task_vectors()
        masks, number = activity(deltas, self.epsilon)
        alone = number.eq(1.0).to(number.dtype)
        shared = alone.mul(-1.0).add_(1.0).div_(number.clamp(min=1.0))
        total = number.zero_()
        for factor, mask, d in zip(stats, masks, deltas, strict=True):
            total.addcmul_(d.mul_(mask), shared.add(alone, alpha=factor))
        return tile.base.add_(total)
