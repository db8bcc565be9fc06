"""Task vectors of low rank, added to the base: compression, and the first step before any other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix, parameter, per_model
from geomerge.methods.linalg import truncate
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class SvdCompress(Matrix):
    """Replace each task vector by the nearest one of lower rank, and add them up.

    How low is said by one of three parameters: `rank` (so many singular triplets), `ratio` (that share of the shorter side,
    the default: a tenth) or `energy` (as few as hold that share of the squared singular values).

    Before any other method it is a step of the same name among the recipe's `steps`; with one expert and a name it makes a
    compressed parent for the next document of a pipeline.
    """

    name: ClassVar[str] = "svd_compress"
    aliases: ClassVar[tuple[str, ...]] = ("tsv_compress",)
    title: ClassVar[str] = "SVD compression of task vectors"
    paper: ClassVar[str] = (
        "Eckart & Young 1936; of task vectors: Gargiulo et al. 2025, Task Singular Vectors, arXiv:2412.00081"
    )
    formula: ClassVar[str] = "θ = θ₀ + λ Σ wₜ·Uₜ Σₜ Vₜᵀ,  UₜΣₜVₜᵀ the k largest singular triplets of τₜ"
    when: ClassVar[str] = (
        "To see how much of a fine-tune fits into few directions, or to drop the noise of its weak ones before another merge."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: svd_compress
base_model: ./base
models: [{model: ./cars}]
parameters: {ratio: 0.1}
dtype: float32
"""

    weight: tuple[float, ...] = per_model(1.0, doc="the compressed task vector's factor")
    rank: int | None = parameter(None, within=(0, 1e9), doc="singular triplets that are kept")
    ratio: float | None = parameter(
        None, within=(0, 1), doc="share of the shorter side that is kept (0.1 if nothing is said)"
    )
    energy: float | None = parameter(None, within=(0, 1), doc="share of the squared singular values that is kept")
    rest: str = parameter(
        "sum", choices=("sum", "base"), doc="tensors that are no matrices: whole task vectors, or the base"
    )

    def check(self, count: int, compat: str | None = None) -> None:
        given = [n for n in ("rank", "ratio", "energy") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of rank, ratio and energy, not {' and '.join(given)}")

    def rest_weights(self, count: int) -> tuple[float, ...]:
        return tuple(self.lambda_ * w if self.rest == "sum" else 0.0 for w in self.weight)

    def merge(self, deltas: Tensor) -> Tensor:
        ratio = 0.1 if self.rank is None and self.energy is None and self.ratio is None else self.ratio
        total = torch.zeros_like(deltas[0])
        for w, delta in zip(self.weight, deltas, strict=True):
            if w:
                total.add_(truncate(delta, rank=self.rank, ratio=ratio, energy=self.energy), alpha=w)
        return total
