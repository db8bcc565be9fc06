"""RESM: TSV-Merge with weights for heavy tails and ranks by sparsity. A reconstruction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.matrix.tsvm import rank_share, task_singular_vectors
from geomerge.methods.properties import BASE, PERMUTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.tile import Scan, Tile
    from geomerge.methods.walk import Walk


@register
@dataclass(frozen=True)
class Resm(Matrix):
    """TSV-Merge that looks at outliers and sparsity of the task vectors first. Experimental.

    The authors published neither code nor formulas that could be found; this follows the paper's words, each idea behind a
    switch of its own. With both off it is `tsvm`, bit for bit.

    `outlier_mode`: elements above mean + `kappa` standard deviations of |τₜ| are outliers. ``mass``: tasks are weighted by
    their outliers' share of all outliers' mass. ``winsor``: outliers are clipped.

    `rank_mode`: ``task``: the r directions of a weight are shared out by the task vectors' density, the share of elements
    that are not below `epsilon` of their root mean square. ``layer``: every task gets ⌊r/T⌋ in the model's densest weight and
    less in sparser ones, k = ⌊r/T · ((1 − z)/max(1 − z))^γ⌋, where z is the mean over the tasks of a weight's share of zeros.
    """

    name: ClassVar[str] = "resm"
    aliases: ClassVar[tuple[str, ...]] = ("r_tsvm",)
    title: ClassVar[str] = "RESM-style TSV-Merge (experimental)"
    paper: ClassVar[str] = "after Yang et al. 2025, Mix Data or Merge Models?, arXiv:2502.06876"
    formula: ClassVar[str] = (
        "TSV-Merge of ωₜτₜ with kₜ triplets each,  ωₜ = T·oₜ/Σ oₛ,  kₜ = ⌊r·(1−zₜ)/Σ (1−zₛ)⌋ or ⌊r/T·((1−z)/max(1−z))^γ⌋"
    )
    when: ClassVar[str] = "To experiment with. Take tsvm for a merge that others can reproduce."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, SCALE, SIGN})
    example: ClassVar[str] = """\
merge_method: resm
base_model: ./base
models: [{model: ./helpful}, {model: ./honest}, {model: ./harmless}]
parameters: {outlier_mode: mass, rank_mode: layer}
dtype: bfloat16
"""

    outlier_mode: str = parameter("mass", choices=("off", "mass", "winsor"), doc="what outliers of a task vector do")
    kappa: float = parameter(
        3.0, within=(0, 1e6), doc="standard deviations above the mean from which |τ| is an outlier"
    )
    rank_mode: str = parameter(
        "layer",
        choices=("off", "task", "layer"),
        doc="how the ranks are shared out: alike, among the tasks, among the weights",
    )
    epsilon: float = parameter(
        0.1, within=(0, 1e6), doc="share of the root mean square below which an element counts as zero"
    )
    gamma: float = parameter(1.0, within=(0, 100), doc="γ: how much less sparser weights get (`rank_mode: layer`)")

    @property
    def surveys(self) -> int:
        return 2 if self.rank_mode == "layer" else 0

    @property
    def surveyed_alike(self) -> float:
        return self.epsilon

    def survey(self, walk: Walk) -> dict[str, float]:
        """(1 − z)/max(1 − z) of each matrix."""
        squares = walk.over(lambda scan: scan.sums(lambda tile: [d.square_() for d in tile.task_vectors()]))
        totals = dict(zip(walk.names, squares, strict=True))

        def share(scan: Scan) -> float:
            """T·(1 − z): T falls out of the ratio."""
            roots = [math.sqrt(total / scan.numel) for total in totals[scan.name]]
            least = [self.epsilon * root if root else math.inf for root in roots]
            return sum(scan.over(lambda tiles: _dense(tiles, least))) / scan.numel

        shares = dict(zip(walk.names, walk.over(share), strict=True))
        most = max(shares.values(), default=0.0)
        return {name: found / most if most else 1.0 for name, found in shares.items()}

    def known_of(self, known: dict[str, float], name: str) -> float:
        return known.get(name, 1.0)

    def merge(self, deltas: Tensor) -> Tensor:
        # Density is measured before outliers are touched: neither switch changes what the other means.
        ranks = self._ranks(deltas) if self.rank_mode == "task" else [self._rank(deltas)] * len(deltas)
        if self.outlier_mode != "off":
            self._treat_outliers(deltas)
        return task_singular_vectors(deltas, ranks)

    def _rank(self, deltas: Tensor) -> int:
        """⌊r/T⌋, or what of it the weight's density leaves, at least 1."""
        most = rank_share(deltas)
        if self.rank_mode == "off" or self.known is None:
            return most
        share = math.pow(self.known, self.gamma)
        return max(1, math.floor(min(deltas.shape[1:]) / len(deltas) * share + 1e-9))

    def _ranks(self, deltas: Tensor) -> list[int]:
        """k_t = ⌊r·(1 − z_t)/Σ_s(1 − z_s)⌋, at least 1."""
        dense = []
        for delta in deltas:
            size = delta.square().mean().sqrt()
            # A task vector that is zero has nothing to give a rank to.
            dense.append(int((delta.abs() >= self.epsilon * size).sum()) if float(size) > 0 else 0)
        total, short = max(sum(dense), 1), min(deltas.shape[1:])
        return [max(1, short * d // total) for d in dense]

    def _treat_outliers(self, deltas: Tensor) -> None:
        masses = []
        for delta in deltas:
            size = delta.abs()
            bound = size.mean() + self.kappa * size.std(correction=0)
            masses.append(size[size > bound].sum())
            if self.outlier_mode == "winsor":
                delta.clamp_(-bound, bound)
        if self.outlier_mode == "mass":
            mass = torch.stack(masses)
            if float(mass.sum()) > 0:
                deltas.mul_((len(deltas) * mass / mass.sum())[:, None, None])


def _dense(tiles: Iterator[Tile], least: list[float]) -> int:
    """How many elements of all task vectors are not below their bound."""
    found = 0
    for tile in tiles:
        found += sum(int((d.abs_() >= bound).sum()) for d, bound in zip(tile.task_vectors(), least, strict=True))
    return found
