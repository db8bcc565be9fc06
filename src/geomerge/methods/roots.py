"""The inverse square root of a Gram matrix, by a rational function of its tridiagonal form: eigenvectors are not needed.

On an interval, x^(−1/2) ≈ Σ wₜ/(x + t), with an error that falls exponentially with the number of terms (Hale, Higham and
Trefethen 2008, Computing A^α, log(A), and related matrix functions by contour integrals, method 3). With A = QTQᵀ,
A^(−1/2) ≈ QSQᵀ with S = Σ wₜ (T + t)⁻¹. The inverse of a tridiagonal matrix is, on each side of the diagonal, of rank one. So a
block of S beside the diagonal is a product of two matrices with a column for each t, of which there are about thirty; S costs
next to nothing, and QSQᵀ what making a matrix tridiagonal costs, the other way round: with Q = H₁H₂…, the reflections H that
leave the first rows alone are made first, of a matrix that has only the last ones.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from geomerge.methods.native import call
from geomerge.methods.native.resolvents import resolvents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from geomerge.methods.eigen import Tridiagonal

_ERROR = 1e-7
"""Where rounding may cost more than this, which is what float32 holds, there is no root."""
_LOST = 29.0
"""Of x^(−1/2), the share e to this power negative may be wrong: 10⁻¹² and a little."""
_BLOCK = 64
"""Reflections that are made together."""


def inverse_root(form: Tridiagonal) -> Tensor | None:
    """A^(−1/2) of a positive definite matrix A, as its upper triangle: what lies below it is undefined.

    An error E in A is one of E/(σᵢ(σᵢ + σⱼ)) in the isometry A^(−1/2)B, B Bᵀ = A with the singular values σ. With rounding's
    E ≈ ε‖A‖ that is up to ε‖A‖·tr(A⁻¹)/√(2n) of its norm.

    Args:
        form: A's tridiagonal form.

    Returns:
        Shape ``(n, n)``, or `None` where rounding may cost more than 10⁻⁷, or A has no inverse.
    """
    diagonal, beside = form.diagonal, form.beside
    trace, largest = _trace_of_inverse(diagonal.tolist(), beside.tolist()), _bound(diagonal, beside)
    n = len(diagonal)
    if not torch.finfo(torch.float64).eps * largest * trace <= _ERROR * math.sqrt(2 * n):
        return None
    # The smallest eigenvalue is at least 1/tr(A⁻¹).
    shifts, weights = _partial_fractions(1 / trace, largest)
    edges = [0, *range(1, n, _BLOCK), n]
    made = diagonal.new_empty(n, n)
    starts, ends = _resolvents(diagonal, beside, diagonal.new_tensor(shifts), diagonal.new_tensor(weights), edges, made)
    for first, end in reversed(list(itertools.pairwise(edges))):
        # What is below `first` is turned already, with the rows of `starts`, which have to begin a block higher up.
        torch.mm(ends[:, first:end].T, starts[:, end:], out=made[first:end, end:])
        starts[:, end:] *= starts[:, end - 1 : end]
        if first:
            form.turn(made, starts, first, end)
    return made


def _trace_of_inverse(diagonal: list[float], beside: list[float]) -> float:
    """tr(T⁻¹) from the pivots of T from below (see native/resolvents.h); infinite where T is not positive definite."""
    hops: list[float] = []
    pivot, found, total = diagonal[-1], 0.0, 0.0
    pivots = [pivot]
    for d, b in zip(reversed(diagonal[:-1]), reversed(beside), strict=True):
        if not pivot > 0.0:
            return math.inf
        hops.append(b / pivot)
        pivot = d - hops[-1] * b
        pivots.append(pivot)
    if not pivot > 0.0:
        return math.inf
    for pivot, hop in zip(reversed(pivots), [0.0, *reversed(hops)], strict=True):
        found = 1 / pivot + hop * hop * found
        total += found
    return total


def _bound(diagonal: Tensor, beside: Tensor) -> float:
    """The largest sum of a row's sizes: no eigenvalue is larger."""
    sums = diagonal.abs()
    sums[1:] += beside.abs()
    sums[:-1] += beside.abs()
    return float(sums.max())


def _partial_fractions(least: float, most: float) -> tuple[list[float], list[float]]:
    """t and w of x^(−1/2) ≈ Σ wⱼ/(x + tⱼ) on an interval."""
    from scipy.special import ellipj, ellipkm1

    # Both k² and 1 − k² are wanted, and have to be of the same k.
    other = 1 - least / most
    share = 1 - other
    least = share * most
    count = math.ceil(_LOST * (3 - math.log(share)) / (2 * math.pi**2))
    period = float(ellipkm1(share))
    # Jacobi's functions of i·u with the modulus k, k² = share: i·sn/cn, 1/cn and dn/cn of u with √(1 − k²).
    sn, cn, dn, _ = ellipj([(j + 0.5) * period / count for j in range(count)], other)
    factor = 2 * period * math.sqrt(least) / (math.pi * count)
    return (least * (sn / cn) ** 2).tolist(), (factor * dn / cn**2).tolist()


def _resolvents(
    diagonal: Tensor, beside: Tensor, shifts: Tensor, weights: Tensor, edges: Sequence[int], out: Tensor
) -> tuple[Tensor, Tensor]:
    """Blocks on the diagonal of Σ wₜ (T + t)⁻¹, and what the rest is made of: see native/resolvents.h.

    Args:
        diagonal, beside: T.
        shifts, weights: t and w.
        edges: Where blocks begin, and n.
        out: Shape ``(n, n)``; the upper triangles of the blocks are set.

    Returns:
        `starts` and `ends`, a row for each shift: for a column j of one block and a row i of the next one, the sum's element is
        Σₜ starts[t, i]·ends[t, j]. Each block between them comes in with the last of its `starts` as one more factor.
    """
    if call.available():
        return resolvents(diagonal, beside, shifts, weights, edges, out)
    n = len(diagonal)
    hops, ends = diagonal.new_zeros(len(shifts), n), diagonal.new_empty(len(shifts), n)
    pivot = diagonal[-1] + shifts
    for i in range(n - 1, 0, -1):
        hops[:, i] = -beside[i - 1] / pivot
        ends[:, i] = 1 / pivot
        pivot = diagonal[i - 1] + shifts + hops[:, i] * beside[i - 1]
    ends[:, 0] = 1 / pivot
    for i in range(1, n):
        ends[:, i] += hops[:, i] * hops[:, i] * ends[:, i - 1]
    ends *= weights[:, None]
    for first, end in itertools.pairwise(edges):
        for i in range(first, end):
            ends[:, first:i] *= hops[:, i, None]
            out[first : i + 1, i] = ends[:, first : i + 1].cumsum(0)[-1]
        for i in range(first + 1, end):
            hops[:, i] *= hops[:, i - 1]
    return hops, ends
