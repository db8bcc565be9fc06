"""Iso-C: the sum of the task vectors with all its directions equally strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.linalg import polar, svd
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class IsoC(Matrix):
    """Give all singular directions of the summed task vectors the same strength, the mean of their singular values.

    A sum of task vectors is strong where they agree and weak where only one of them has something to say; what only one
    says is drowned out. With a flat spectrum no task's directions are (Marczak et al. 2025).

    Only directions that exist are made strong: those whose singular value is above 10⁻⁶ of the largest. The published code
    takes all, and when the sum has a lower rank than the weight, as with low-rank adapters, fills it up with arbitrary ones.
    """

    name: ClassVar[str] = "iso_c"
    title: ClassVar[str] = "Iso-C (isotropic merging in the common subspace)"
    paper: ClassVar[str] = "Marczak et al. 2025, No Task Left Behind, arXiv:2502.04959"
    formula: ClassVar[str] = "θ = θ₀ + λ·σ̄·UVᵀ,  Σ τₜ = UΣVᵀ,  σ̄ = mean of the singular values"
    when: ClassVar[str] = (
        "Many fine-tunes of one base on different tasks, especially of vision models; search λ in 0.5 to 2."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: iso_c
base_model: ./base
models: [{model: ./cars}, {model: ./digits}, {model: ./textures}]
parameters: {lambda: 1.0}
dtype: bfloat16
"""

    support_only: bool = parameter(True, doc="leave out directions that the sum does not have (false: as published)")

    def merge(self, deltas: Tensor) -> Tensor:
        total = deltas.sum(0)
        if self.support_only:
            return isotropic(total)
        found = svd(total)
        return (found.u @ found.vh).mul_(found.s.mean())


def isotropic(total: Tensor) -> Tensor:
    """σ̄·UVᵀ of UΣVᵀ, over the singular values that count."""
    made = polar(total)
    # All its own are 1, so their squares' sum is their number; ⟨UVᵀ, UΣVᵀ⟩ is the sum of the others.
    rank = round(float(torch.linalg.vector_norm(made)) ** 2)
    return made.mul_(torch.dot(made.flatten(), total.flatten()) / max(rank, 1))
