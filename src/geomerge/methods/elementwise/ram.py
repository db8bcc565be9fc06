"""RAM: sum what only one expert changed, average what several changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.combine import added
from geomerge.methods.properties import BASE, PERMUTATION, SIGN
from geomerge.methods.registry import register
from geomerge.methods.tile import Tile

if TYPE_CHECKING:
    from torch import Tensor


def activity(deltas: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """For each expert 1.0 where |δ| > ε, and how many experts are active at each position."""
    masks = [d.abs().gt_(epsilon) for d in deltas]
    return masks, added(masks)


@register
@dataclass(frozen=True)
class Ram(Elementwise):
    """Changes that one expert alone made are kept whole; shared ones are averaged over those that made them."""

    name: ClassVar[str] = "ram"
    title: ClassVar[str] = "RAM (reinforced agent merging)"
    paper: ClassVar[str] = "Reinforced agent merging, 2026 (mergekit)"
    formula: ClassVar[str] = "θ = θ₀ + Σ{δₖ : |δₖ| > ε} / max(1, #active)"
    when: ClassVar[str] = "Experts with sparse task vectors, such as those of reinforcement learning."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SIGN})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: ram
base_model: ./base
models: [{model: ./agent1}, {model: ./agent2}]
dtype: bfloat16
"""

    epsilon: float = parameter(1e-5, within=(0, 1e6), doc="changes up to this count as none")

    def blend(self, tile: Tile, stats: None) -> Tensor:
        deltas = tile.task_vectors()
        _, number = activity(deltas, self.epsilon)
        total = added([d.hardshrink(self.epsilon) for d in deltas])
        return tile.base.addcdiv_(total, number.clamp_(min=1.0))
