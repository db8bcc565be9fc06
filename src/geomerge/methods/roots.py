"""The inverse square root of a Gram matrix, by a rational function of its tridiagonal form: eigenvectors are not needed.

On an interval, x^(−1/2) ≈ Σ wⱼ/(x + tⱼ), with an error that falls exponentially with the number of terms (Hale, Higham and
Trefethen 2008, Computing A^α, log(A), and related matrix functions by contour integrals, method 3). With A = QTQᵀ,
A^(−1/2) ≈ Q (Σ wⱼ (T + tⱼ)⁻¹) Qᵀ, and systems with a tridiagonal matrix cost next to nothing: thirty of them take a third of
a product of two matrices, where the eigenvectors of T take one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from geomerge.methods.native import call
from geomerge.methods.native.resolvents import resolvents

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.eigen import Tridiagonal

_ERROR = 1e-7
"""Where rounding may cost more than this, which is what float32 holds, there is no root."""
_LOST = 29.0
"""Of x^(−1/2), the share e to this power negative may be wrong: 10⁻¹² and a little."""
_PANEL = 192
"""Rows of a symmetric product that are made at a time."""


def inverse_root(form: Tridiagonal) -> Tensor | None:
    """A^(−1/2) of a positive definite matrix A.

    An error E in A is one of E/(σᵢ(σᵢ + σⱼ)) in the isometry A^(−1/2)B, B Bᵀ = A with the singular values σ. With rounding's
    E ≈ ε‖A‖ that is up to ε‖A‖·tr(A⁻¹)/√(2n) of its norm.

    Args:
        form: A's tridiagonal form. It is used up, unless there is no root.

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
    basis = form.basis()
    found = _resolvents(diagonal, beside, diagonal.new_tensor(shifts), diagonal.new_tensor(weights), basis)
    made = torch.empty_like(found)
    for first in range(0, n, _PANEL):
        last = min(first + _PANEL, n)
        made[first:last, :last] = basis[:, first:last].T @ found[:, :last]
        made[:first, first:last] = made[first:last, :first].T
    return made


def _trace_of_inverse(diagonal: list[float], beside: list[float]) -> float:
    """tr(T⁻¹) from the pivots of T from above and from below; infinite where T is not positive definite."""
    above, total = [diagonal[0]], 0.0
    for d, b in zip(diagonal[1:], beside, strict=True):
        if not above[-1] > 0.0:
            return math.inf
        above.append(d - b / above[-1] * b)  # whose square may be too small
    below = math.inf
    for d, pivot, b in zip(reversed(diagonal), reversed(above), [0.0, *reversed(beside)], strict=True):
        below = d - b / below * b
        if not (below > 0.0 and pivot + below > d):
            return math.inf
        total += 1 / (pivot + below - d)
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


def _resolvents(diagonal: Tensor, beside: Tensor, shifts: Tensor, weights: Tensor, right: Tensor) -> Tensor:
    """Σ wⱼ (T + tⱼ)⁻¹ C, with T + tⱼ = LDLᵀ."""
    if call.available():
        return resolvents(diagonal, beside, shifts, weights, right)
    n, count = len(diagonal), len(shifts)
    beneath, pivots = diagonal.new_zeros(n, count), diagonal[:, None] + shifts
    for i in range(1, n):
        beneath[i] = beside[i - 1] / pivots[i - 1]
        pivots[i] -= beneath[i] * beside[i - 1]
    over, out = weights / pivots, torch.zeros_like(right)
    for first in range(0, right.shape[1], _PANEL):
        total = out[:, first : first + _PANEL]
        found = right[:, None, first : first + _PANEL].repeat(1, count, 1)
        for i in range(1, n):
            found[i] -= beneath[i][:, None] * found[i - 1]
        found[-1] *= over[-1][:, None]
        for i in range(n - 2, -1, -1):
            found[i] = found[i] * over[i][:, None] - beneath[i + 1][:, None] * found[i + 1]
        for term in found.unbind(1):
            total.add_(term)
    return out
