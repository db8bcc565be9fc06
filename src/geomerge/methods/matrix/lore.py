"""LoRE-Merging: a base that nobody gave, and experts that differ from it by little rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import BaseUse, Matrix, parameter
from geomerge.methods.combine import added
from geomerge.methods.linalg import joint_range, shrink
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, ROTATION, SIGN, SINGLE
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Lore(Matrix):
    """Find the base and the low-rank changes that explain the experts best, and add all changes to that base.

    θ̂₀ and δₜ minimise Σ ‖θ̂₀ + δₜ − θₜ‖² + μ‖δₜ‖_* (nuclear norms). In turn θ̂₀ becomes the mean of θₜ − δₜ, and δₜ
    becomes θₜ − θ̂₀ with its singular values lowered by μ/2; each step is the exact minimum in its variable. It ends when
    neither changes by more than `tolerance` of the changes' size.

    No base is needed: for experts whose common base is lost (Liu et al. 2025; the authors' code is not public, μ is from the
    paper). With a large μ it is the average. λ = 1/T averages the changes instead of adding them.
    """

    name: ClassVar[str] = "lore"
    aliases: ClassVar[tuple[str, ...]] = ("lore_merging",)
    title: ClassVar[str] = "LoRE-Merging (low-rank estimation)"
    paper: ClassVar[str] = "Liu et al. 2025, LoRE-Merging, arXiv:2502.10749"
    formula: ClassVar[str] = "θ = θ̂₀ + λ Σ δₜ,  (θ̂₀, δ) = argmin Σ ‖θ̂₀ + δₜ − θₜ‖² + μ‖δₜ‖_*"
    when: ClassVar[str] = (
        "Several fine-tunes of a base that is not at hand. With the base, TSV-Merge or Iso-C know more."
    )
    models: ClassVar[tuple[int, int | None]] = (1, None)
    base_use: ClassVar[BaseUse] = "ignored"
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: lore
models: [{model: ./chat}, {model: ./math}]
parameters: {mu: 0.01}
dtype: bfloat16
"""

    mu: float = parameter(0.01, within=(0, math.inf), doc="the price of a unit of nuclear norm")
    sweeps: int = parameter(50, within=(1, 10000), doc="rounds at most")
    tolerance: float = parameter(1e-4, within=(0, 1), doc="relative change at which it ends")
    lambda_: float = parameter(1.0, doc="factor of the summed changes")
    rest: str = parameter("mean", choices=("mean",), doc="tensors that are no weight matrices: the mean of the models")

    @property
    def factor(self) -> float:
        return 1.0

    def workspace(self, count: int) -> int:
        return 3 * count + 14

    def merge(self, deltas: Tensor) -> Tensor:
        # Relative to the first expert, so that what all have in common costs no digits: identical ones stay identical.
        origin = deltas[0].clone()
        deltas.sub_(origin)
        flat = origin.shape[0] <= origin.shape[1]
        tall = deltas[1:].mT if flat else deltas[1:]
        short, joint = tall.shape[2], tall.shape[0] * tall.shape[2]
        if 0 < _NARROW * joint <= tall.shape[1] and self.sweeps >= _ROUNDS * len(deltas):
            # Every round commutes with rotations: it is made in the directions that the experts have, if these are few.
            span = joint_range(tall)
            inside = torch.cat([deltas.new_zeros(1, joint, short), span.T @ tall])
            change = span @ self._change(inside)
            return origin.add_(change.T if flat else change)
        return origin.add_(self._change(deltas))

    def _change(self, experts: Tensor) -> Tensor:
        base, changes = low_rank_base(experts, self.mu, self.sweeps, self.tolerance)
        return base.add_(added(changes), alpha=self.lambda_)


_NARROW = 2
"""Weights so many times as long as all experts' shorter sides together are turned into the directions that the experts have."""
_ROUNDS = 4
"""For each expert; fewer do not bring in what the directions cost."""


def low_rank_base(experts: Tensor, mu: float, sweeps: int, tolerance: float) -> tuple[Tensor, list[Tensor]]:
    """θ̂₀ and the δₜ."""
    changes: list[Tensor] = []
    mean = experts.mean(0)
    base, moved = mean, 0.0
    for sweep in range(sweeps):
        if sweep:
            before, base = base, added(changes).div_(-len(experts)).add_(mean)
            moved = len(experts) * _square(before - base)
        for t, expert in enumerate(experts):
            found = shrink(expert - base, mu / 2)
            if sweep:
                moved += _square(changes[t].sub_(found))
                changes[t] = found
            else:
                changes.append(found)
        if sweep and moved <= tolerance**2 * sum(map(_square, changes)):
            break
    return base, changes


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2
