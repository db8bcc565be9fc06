"""Iso-CTS: Iso-C's common subspace, and beside it room for what only one task needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.linalg import RANK, Triplets, complement, largest, largest_outside, polar
from geomerge.methods.matrix.iso_c import isotropic
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class IsoCts(Matrix):
    """The c strongest directions of the summed task vectors, and p directions of each task that these leave out.

    Of the r directions of a weight the share `common_space_fraction` is common; the others go to the tasks in equal parts.
    A task's directions are the strongest ones of its residual τₜ − U_c U_cᵀ τₜ. All are made orthonormal and equally strong
    (Marczak et al. 2025). With nothing left for the tasks it is Iso-C.

    Directions below 10⁻⁶ of the strongest, or of a residual below 10⁻⁶ of its task vector, do not count.
    """

    name: ClassVar[str] = "iso_cts"
    title: ClassVar[str] = "Iso-CTS (isotropic merging in common and task-specific subspaces)"
    paper: ClassVar[str] = "Marczak et al. 2025, No Task Left Behind, arXiv:2502.04959"
    formula: ClassVar[str] = (
        "θ = θ₀ + λ·σ̄·U⊥V⊥ᵀ,  U = [U₁ … U_T, U_c],  V = [V₁ … V_T, V_c],  σ̄ = mean of their singular values"
    )
    when: ClassVar[str] = "As Iso-C, for many tasks (ten and more) that have little in common."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: iso_cts
base_model: ./base
models: [{model: ./cars}, {model: ./digits}, {model: ./textures}]
parameters: {lambda: 1.0, common_space_fraction: 0.8}
dtype: bfloat16
"""

    common_space_fraction: float = parameter(
        0.8, within=(0, 1), doc="share of a weight's rank that is common to all tasks"
    )

    def workspace(self, count: int) -> int:
        return 16

    def merge(self, deltas: Tensor) -> Tensor:
        count, short = len(deltas), min(deltas.shape[1:])
        # Python rounds half to even, as the published code does.
        each = min(round((short - int(short * self.common_space_fraction)) / count), short // count)
        if not each:
            return isotropic(deltas.sum(0))
        common = largest(deltas.sum(0), short - each * count)
        parts = [*_specific(deltas, common.u, each), common]
        s = torch.cat([p.s for p in parts])
        if not len(s):
            return torch.zeros_like(deltas[0])
        u, v = polar(torch.cat([p.u for p in parts], 1)), polar(torch.cat([p.vh for p in parts]))
        return (u @ v).mul_(s.mean())


def _specific(deltas: Tensor, common: Tensor, each: int) -> Iterator[Triplets]:
    """The strongest directions of each τₜ − U_c U_cᵀ τₜ."""
    wide = deltas.shape[1] <= deltas.shape[2]
    # Few rows are left of a wide residual when it is written in a basis of what U_c leaves out.
    basis = complement(common) if wide else None
    for delta in deltas:
        floor = RANK * float(torch.linalg.matrix_norm(delta))
        if basis is None:
            yield largest_outside(delta, common, each, floor)
        else:
            found = largest(basis.T @ delta, each, floor=floor)
            yield found._replace(u=basis @ found.u)
