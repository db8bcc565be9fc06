"""DOGE-TA: shift all task vectors by one that lessens their conflicts, outside of the subspace that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.linalg import largest
from geomerge.methods.matrix.quadratic import adam, norms
from geomerge.methods.order import nth_smallest_of_all
from geomerge.methods.properties import BASE, PERMUTATION, SIGN
from geomerge.methods.registry import register
from geomerge.methods.sparsify import magnitudes
from geomerge.methods.walk import Walk

if TYPE_CHECKING:
    from torch import Tensor

_TIE = 1e-10
"""How much more the leading directions of a task weigh in the shared subspace: nothing where the tasks decide, and what
decides where they do not (a single task, or tasks whose column spaces are equal or orthogonal)."""


@register
@dataclass(frozen=True)
class DogeTa(Matrix):
    """Task arithmetic with a shared correction Δ, found by projected gradient descent, on each task's largest elements.

    1. λ_t = η/‖τ_t‖, 0 for a task vector of zeros.
    2. P = QQᵀ, where Q holds the first ⌊r/subspace⌋ left singular vectors of the tasks' own first ⌊r/T⌋ side by side.
    3. Δ from 0 by Adam on Σ_t Σ_rows ⟨τ_t, τ_t − Σ_s λ_s(τ_s + Δ)⟩², its gradient replaced by (1 − P)∇.
    4. mask_t keeps the largest magnitudes of τ_t (not of τ_t + Δ), all that equal the smallest of them included.

    This is the authors' code. As there, the threshold of a mask runs over all weights of a task together, found exactly in two
    passes over the models before the first weight is merged; ``scope: tensor`` takes each weight on its own.
    """

    name: ClassVar[str] = "doge_ta"
    aliases: ClassVar[tuple[str, ...]] = ("doge",)
    title: ClassVar[str] = "DOGE-TA (adaptive projective gradient descent)"
    paper: ClassVar[str] = (
        "Wei et al. 2025, Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, arXiv:2501.01230"
    )
    formula: ClassVar[str] = "θ = θ₀ + λ·Σ_t λ_t (τ_t + Δ) ⊙ mask_t,  λ_t = η/‖τ_t‖_F"
    when: ClassVar[str] = (
        "Vision or text encoders fine-tuned on several tasks, without data. Embeddings, norms and heads stay as in the base."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SIGN})
    example: ClassVar[str] = """\
merge_method: doge_ta
base_model: ./base
models: [{model: ./cars}, {model: ./signs}, {model: ./digits}]
parameters: {eta: 0.07, density: 0.3}
dtype: float32
"""

    rest: str = parameter(
        "base",
        choices=("mean", "sum", "base", "scaled_sum"),
        doc="what becomes of tensors that are no weight matrices (norms, biases, embeddings, heads)",
    )
    eta: float = parameter(
        0.07, within=(0, math.inf), doc="η, the norm that each scaled task vector gets (0.05 to 0.1)"
    )
    subspace: int = parameter(6, within=(1, math.inf), doc="the shared subspace has ⌊min(m, n)/subspace⌋ dimensions")
    density: float = parameter(
        0.3, within=(0, 1), above=0, doc="share of a task vector's elements, the largest, that its mask keeps"
    )
    scope: str = parameter(
        "global", choices=("global", "tensor"), doc="what density is a share of: all weights together, or each weight"
    )
    lr: float = parameter(1e-4, within=(0, math.inf), doc="Adam's step size")
    steps: int = parameter(400, within=(0, 100_000), doc="steps of Adam")

    @property
    def surveys(self) -> int:
        return int(self.scope == "global")

    @property
    def surveyed_alike(self) -> float:
        return self.density

    def survey(self, walk: Walk) -> tuple[float, ...]:
        """The smallest magnitude that is kept of each task, over all weights."""
        rank = rank_of(walk.numel, self.density)
        if not rank:
            return (0.0,) * walk.experts
        return tuple(nth_smallest_of_all(walk, magnitudes, [rank - 1] * walk.experts))

    def merge(self, deltas: Tensor) -> Tensor:
        thresholds = self.known if self.known is not None else [threshold(delta, self.density) for delta in deltas]
        return self.merge_above(deltas, thresholds)

    def merge_above(self, deltas: Tensor, thresholds: Sequence[float]) -> Tensor:
        """The merge for given thresholds of the masks, wherever they come from.

        Args:
            deltas: Shape ``(T, rows, columns)``.
            thresholds: For each task the smallest magnitude that its mask keeps.
        """
        size = norms(deltas)
        scales = torch.where(size > 0, self.eta / torch.where(size > 0, size, 1.0), 0.0)
        shift = self._shift(deltas, scales)
        merged = torch.zeros_like(deltas[0])
        for scale, delta, least in zip(scales, deltas, thresholds, strict=True):
            merged += (delta + shift) * (delta.abs() >= least) * scale
        return merged

    def _shift(self, deltas: Tensor, scales: Tensor) -> Tensor:
        """Δ: shape ``(rows, columns)``."""
        total = scales.sum()
        shift = torch.zeros_like(deltas[0])
        if total == 0:
            return shift
        q = self._shared(deltas)
        tasks = deltas.transpose(0, 1).contiguous()  # rows, tasks, columns
        merged = torch.einsum("t,itj->ij", scales, tasks)
        # ⟨τ_t, τ_t − Σ λ_sτ_s⟩ of every row, from which Δ takes Σλ_s ⟨τ_t, Δ⟩.
        fixed = torch.linalg.vecdot(tasks, tasks - merged.unsqueeze(1)).unsqueeze(2)

        def gradient(now: Tensor) -> Tensor:
            residual = fixed - total * torch.bmm(tasks, now.unsqueeze(2))
            slope = torch.bmm((-2.0 * total * residual).transpose(1, 2), tasks).squeeze(1)
            return slope.sub_(q @ (q.T @ slope))

        return adam(shift, gradient, self.lr, self.steps)

    def _shared(self, deltas: Tensor) -> Tensor:
        """Q, an orthonormal basis of the shared subspace: shape ``(rows, ⌊r/subspace⌋)``."""
        rank = min(deltas.shape[1:])
        bases = []
        for delta in deltas:
            found = largest(delta, rank // len(deltas))
            bases.append(found.u * (1 + _TIE * found.s / found.s[:1]))
        side_by_side = torch.cat(bases, 1)
        return largest(side_by_side, min(rank // self.subspace, side_by_side.shape[1])).u


def rank_of(n: int, density: float) -> int:
    """d − ⌊density·d⌋: which magnitude in ascending order, from 1, is the smallest that a mask keeps; 0 where all are kept."""
    return n - math.floor(density * n + 1e-9)


def threshold(delta: Tensor, density: float) -> float:
    """The smallest magnitude that the mask of a weight on its own keeps; 0 where all are to be kept."""
    rank = rank_of(delta.numel(), density)
    return delta.abs().flatten().kthvalue(rank).values.item() if rank else 0.0
