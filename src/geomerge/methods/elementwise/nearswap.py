"""nearswap: move the base towards another model by at most t."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from geomerge.methods import native
from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.properties import BASE, IDENTICAL, SIGN
from geomerge.methods.registry import register
from geomerge.methods.tile import Loop, Scan, Tile
from geomerge.methods.watched import watched

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR, _MOST = 1e-6, 1e30
"""The smallest t that the formula's floor leaves as it is, and the largest that float32 is asked to hold."""


@register
@dataclass(frozen=True)
class NearSwap(Elementwise):
    """Swap in the other model's value where it is near, and move by t towards it where it is not."""

    name: ClassVar[str] = "nearswap"
    title: ClassVar[str] = "nearswap"
    paper: ClassVar[str] = "alchemonaut 2024, QuartetAnemoi (mergekit)"
    formula: ClassVar[str] = "θ = θ₀ + w (θ₁ − θ₀),  w = min(1, t/max(|θ₁ − θ₀|, 10⁻⁶))"
    when: ClassVar[str] = "To flavour one model with another without changing any weight by more than t."
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    interpolates: ClassVar[bool] = True
    properties: ClassVar[frozenset[str]] = frozenset({BASE, IDENTICAL, SIGN})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: nearswap
base_model: ./chat
models: [{model: ./chat}, {model: ./code}]
parameters: {t: 0.0001}
dtype: bfloat16
"""

    t: float = parameter(
        within=(0, 1e6), extrapolates=True, doc="largest change of a weight, in its own units; 0.0001 is typical"
    )

    def blend(self, tile: Tile, stats: None) -> Tensor:
        (delta,) = tile.task_vectors()
        if self.t >= _FLOOR:  # the same without a division
            return tile.base.add_(delta.clamp_(-self.t, self.t))
        share = delta.abs().clamp_(min=_FLOOR).reciprocal_().mul_(self.t).clamp_(0.0, 1.0)
        return tile.base.addcmul_(share, delta)

    def compiled(self, scan: Scan, stats: None) -> Loop | None:
        narrow = scan.compiled and {source.dtype for source in scan.sources} == {"BF16"}
        if not narrow or not _FLOOR <= self.t <= _MOST:
            return None

        return watched(scan, lambda inputs, _, *where: native.near(inputs, self.t, *where, check=scan.checks))
