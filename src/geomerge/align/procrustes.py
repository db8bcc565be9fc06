"""Orthogonal Procrustes: the rotation that brings one set of vectors closest to another.

    Q = argmin ‖X₂·Q − X₁‖_F over QᵀQ = I  =  U·Vᵀ,  where U·Σ·Vᵀ = svd(X₂ᵀ·X₁)

The vectors are streamed: only the d×d product is kept. Products are taken over fixed blocks and fixed panels of columns, each
by one thread, so the bits of Q do not depend on how many threads there are.

Reference:
    Schönemann 1966, A generalized solution of the orthogonal Procrustes problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from geomerge.late import also_alone, torch_alone

if TYPE_CHECKING:
    from torch import Tensor


PANELS = 8
"""Into how many panels of columns the product is cut, at most."""

DETERMINED = 1e-9
"""Singular values above this share of the largest count as determined by the vectors."""


class Block(NamedTuple):
    """A few pairs of vectors.

    Attributes:
        moving: The vectors that will be rotated: shape ``(n, d)``, float64.
        fixed: Those that they shall meet: the same shape.
        weight: The pairs' weights, shape ``(n,)``; `None`: all 1.
    """

    moving: Tensor
    fixed: Tensor
    weight: Tensor | None = None


Blocks = Callable[[], Iterable[Block]]
"""Starts a walk over all pairs; it may be called more than once."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What Procrustes found.

    Attributes:
        rotation: Q, shape ``(d, d)``: orthogonal, float64.
        determined: How many of the d dimensions the vectors determine; in the others Q is arbitrary.
    """

    rotation: Tensor
    determined: int


def cross_product(blocks: Blocks, width: int, *, centre: bool = False, normalise: bool = False) -> Tensor:
    """X₂ᵀ·diag(w)·X₁, streamed.

    Args:
        blocks: The pairs.
        width: d.
        centre: Subtract from the vectors of each side their (weighted) mean.
        normalise: Then scale each vector to length 1; zero vectors stay.

    Returns:
        Shape ``(d, d)``, float64.
    """
    product = torch.zeros(width, width, dtype=torch.float64)
    panel = -(-width // PANELS)
    panels = range(0, width, panel)
    with torch_alone(), torch.inference_mode(), ThreadPoolExecutor(_threads(), "geomerge-align", also_alone) as pool:
        means = _means(blocks, width) if centre else None
        for block in blocks():
            moving, fixed = block.moving, block.fixed
            if means is not None:
                moving, fixed = moving - means[0], fixed - means[1]
            if normalise:
                moving, fixed = _unit(moving), _unit(fixed)
            if block.weight is not None:
                moving = moving * block.weight.unsqueeze(1)

            def add(first: int, moving: Tensor = moving, fixed: Tensor = fixed) -> None:
                with torch.inference_mode():
                    product[:, first : first + panel].addmm_(moving.T, fixed[:, first : first + panel])

            list(pool.map(add, panels))
    return product


def solve(product: Tensor) -> Solution:
    """The orthogonal matrix nearest to a product of `cross_product` (or to a sum of several)."""
    with torch_alone(), torch.inference_mode():
        u, s, vt = torch.linalg.svd(product)
        rotation = u @ vt
    # A tensor of inference mode could not be saved for a backward pass of a live merge.
    largest = float(s[0]) if s.numel() else 0.0
    return Solution(rotation.clone(), int((s > DETERMINED * largest).sum()) if largest > 0 else 0)


def _means(blocks: Blocks, width: int) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(2, width, dtype=torch.float64)
    total = 0.0
    for block in blocks():
        weight = torch.ones(len(block.moving), dtype=torch.float64) if block.weight is None else block.weight
        sums[0] += weight @ block.moving
        sums[1] += weight @ block.fixed
        total += float(weight.sum())
    sums /= max(total, 1e-300)
    return sums[0], sums[1]


def _unit(vectors: Tensor) -> Tensor:
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, 1.0)


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, PANELS)
