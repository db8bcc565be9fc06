"""TSV-Merge: the strongest singular vectors of each task, made orthogonal to those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix
from geomerge.methods.linalg import Triplets, largest, polar
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class TsvMerge(Matrix):
    """Keep the ⌊r/T⌋ strongest singular triplets of each task vector and take away what they have in common.

    The singular vectors of all tasks side by side are replaced by the nearest orthonormal ones (their polar factor), so that
    no task writes into another's directions (Gargiulo et al. 2025).

    Singular values below 10⁻⁶ of a task vector's largest do not count, and neither do directions below 10⁻⁶ in the polar
    factors. The published code has no such rules; for task vectors of full rank they change nothing, but for low-rank ones
    (adapters, identical experts) it fills the missing ranks with arbitrary directions.
    """

    name: ClassVar[str] = "tsvm"
    aliases: ClassVar[tuple[str, ...]] = ("tsv_m", "tsv_merge", "tsv")
    title: ClassVar[str] = "TSV-Merge (task singular vectors)"
    paper: ClassVar[str] = "Gargiulo et al. 2025, Task Singular Vectors, arXiv:2412.00081"
    formula: ClassVar[str] = (
        "θ = θ₀ + λ·U⊥ Σ V⊥ᵀ,  U = [U₁ … U_T], V = [V₁ … V_T] of the ⌊r/T⌋ largest triplets of each τₜ"
    )
    when: ClassVar[str] = (
        "Many fine-tunes of one base on different tasks; λ = 1 rarely needs a search. Not for experts of one task, whose "
        "common directions it counts once only."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: tsvm
base_model: ./base
models: [{model: ./cars}, {model: ./digits}, {model: ./textures}]
parameters: {lambda: 1.0}
dtype: bfloat16
"""

    def merge(self, deltas: Tensor) -> Tensor:
        return task_singular_vectors(deltas, [rank_share(deltas)] * len(deltas))


def rank_share(deltas: Tensor) -> int:
    """⌊r/T⌋, at least 1."""
    return max(1, min(deltas.shape[1:]) // len(deltas))


def task_singular_vectors(deltas: Tensor, ranks: Sequence[int]) -> Tensor:
    """U⊥ Σ V⊥ᵀ of the largest triplets of each task vector, as many as `ranks` says."""
    if len(deltas) == 1 and ranks[0] >= min(deltas.shape[1:]):
        return deltas[0]
    return orthogonal_sum([largest(delta, k) for delta, k in zip(deltas, ranks, strict=True)])


def orthogonal_sum(parts: Sequence[Triplets]) -> Tensor:
    """U⊥ Σ V⊥ᵀ, where U⊥ and V⊥ are the polar factors of all parts' vectors side by side."""
    u, s, vh = torch.cat([p.u for p in parts], 1), torch.cat([p.s for p in parts]), torch.cat([p.vh for p in parts])
    if not len(s):
        return u @ vh
    return Triplets(polar(u), s, polar(vh)).matrix()
