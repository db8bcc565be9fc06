"""Linear algebra of whole weights, in float64 and on one thread.

LAPACK's blocked algorithms split their work by the number of threads, and with it the order of their sums: the same matrix
decomposed by two threads has other last bits than by one. So a matrix is always decomposed by one; the parallelism is over
tensors (`geomerge.engine.execute`).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

RANK = 1e-6
"""Singular values below this share of the largest do not count: a matrix in 16 or 32 bits does not hold such."""

_PANEL = 256
_EPSILON = 2.0**-49
"""Relative error of a Gram matrix's eigenvalues, measured with a margin."""
_NOISE = 1e-13
"""Eigenvalues below this share of the largest are zero but for rounding."""
_SQUARED_CONDITION = 1e-7
_POLAR_ERROR = 1e-8


class _Threads:
    """How many threads torch, BLAS and LAPACK had before the first of those that want one entered."""

    def __init__(self) -> None:
        self._entering = threading.Lock()
        self._inside = 0
        self._before = 1

    def enter(self) -> None:
        with self._entering:
            if not self._inside:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def leave(self) -> None:
        with self._entering:
            self._inside -= 1
            if not self._inside:
                torch.set_num_threads(self._before)


_threads = _Threads()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch, BLAS and LAPACK use one thread; several threads may be inside at a time (the setting is the process's)."""
    _threads.enter()
    try:
        yield
    finally:
        _threads.leave()


# -- Gram matrices -----------------------------------------------------------------------------------------------------


def gram(matrix: Tensor) -> Tensor:
    """AAᵀ, by panels of which only those on and below the diagonal are computed: half the work of a product."""
    rows = matrix.shape[0]
    if rows <= _PANEL:
        return matrix @ matrix.T
    made = matrix.new_empty(rows, rows)
    for first in range(0, rows, _PANEL):
        last = min(first + _PANEL, rows)
        panel = matrix[first:last] @ matrix[:last].T
        made[first:last, :last] = panel
        made[:first, first:last] = panel[:, :first].T
    return made


def product_of_symmetric(left: Tensor, right: Tensor) -> Tensor:
    """LR of which it is known that it is symmetric."""
    rows = left.shape[0]
    if rows <= _PANEL:
        return left @ right
    made = left.new_empty(rows, rows)
    for first in range(0, rows, _PANEL):
        last = min(first + _PANEL, rows)
        panel = left[first:last] @ right[:, :last]
        made[first:last, :last] = panel
        made[:first, first:last] = panel[:, :first].T
    return made


def _spectrum(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, none negative) and eigenvectors (columns) of AAᵀ."""
    values, vectors = torch.linalg.eigh(gram(wide))
    return values.flip(0).clamp_(min=0.0), vectors.flip(1)


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, so that it has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


# -- singular triplets -------------------------------------------------------------------------------------------------


class Triplets(NamedTuple):
    """Singular triplets, the largest first: A ≈ u·diag(s)·vh."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def matrix(self) -> Tensor:
        """u·diag(s)·vh."""
        product: Tensor = (self.u * self.s) @ self.vh
        return product

    def first(self, k: int) -> Triplets:
        """The k largest."""
        return Triplets(self.u[:, :k], self.s[:k], self.vh[:k])


def svd(matrix: Tensor) -> Triplets:
    """All of the thin singular value decomposition."""
    return Triplets(*torch.linalg.svd(matrix, full_matrices=False))


def largest(matrix: Tensor, k: int, floor: float = 0.0) -> Triplets:
    """The k largest singular triplets, without those whose singular value is below 10⁻⁶ of the largest (or below `floor`).

    Such are what is left of a rank that the matrix does not have: their vectors are arbitrary.

    From the eigenvectors U of AAᵀ (the shorter side) and Uᵀ A, several times faster than a decomposition of A. That squares
    the condition: v_i is off by about ε·(σ₁/σᵢ)². When that could be more than 10⁻⁹, A itself is decomposed.
    """
    if k < 1:
        return Triplets(matrix[:, :0], matrix.new_zeros(0), matrix[:0])
    wide = _wide(matrix)
    values, vectors = _spectrum(wide)
    top = values[:k]
    if _clear(top, _SQUARED_CONDITION):
        kept = int((top > RANK**2 * top[0]).sum())
        u = vectors[:, :kept]
        right = u.T @ wide
        s = torch.linalg.vector_norm(right, dim=1)
        found = Triplets(u, s, right / s[:, None])
        if wide is not matrix:
            found = Triplets(found.vh.T, s, found.u.T)
    else:
        found = svd(matrix).first(k)
    kept = int((found.s > max(RANK * float(found.s[0]), floor)).sum()) if len(found.s) else 0
    return found.first(kept)


def _clear(values: Tensor, ratio: float) -> bool:
    """Whether each eigenvalue is either well above the noise of the largest or as good as zero."""
    first = float(values[0])
    if not first > 0.0:
        return True
    doubtful = (values < ratio * first) & (values > _NOISE * first)
    return not bool(doubtful.any())


def truncate(
    matrix: Tensor, *, rank: int | None = None, ratio: float | None = None, energy: float | None = None
) -> Tensor:
    """The nearest matrix of lower rank; its distance is √(Σ σᵢ²) over what is left out.

    Args:
        matrix: A.
        rank: So many singular triplets are kept;
        ratio: or this share of the shorter side (rounded down);
        energy: or as few as have this share of Σ σᵢ².
    """
    short = min(matrix.shape)
    if energy is not None:
        return _truncate_by_energy(matrix, energy)
    k = min(rank, short) if rank is not None else int((1.0 if ratio is None else ratio) * short + 1e-9)
    if k >= short:
        return matrix
    return largest(matrix, k).matrix() if k else torch.zeros_like(matrix)


def _truncate_by_energy(matrix: Tensor, energy: float) -> Tensor:
    found = svd(matrix)
    shares = (found.s * found.s).cumsum(0)
    if energy >= 1.0 or not float(shares[-1]) > 0.0:
        return matrix
    # As many as it takes to reach the share; a sum is never taken for smaller than itself because of its last bit.
    k = int((shares < energy * shares[-1] * (1 - 1e-12)).sum()) + 1
    return found.first(k).matrix()


# -- functions of the singular values ----------------------------------------------------------------------------------


def polar(matrix: Tensor) -> Tensor:
    """UVᵀ of A = UΣVᵀ over the singular values above 10⁻⁶ of the largest: the nearest (partial) isometry.

    As (AAᵀ)^(−½)·A over the shorter side, unless the eigenvalues say that it would be off by more than 10⁻⁸.
    """
    wide = _wide(matrix)
    values, vectors = _spectrum(wide)
    kept = int((values > RANK**2 * values[0]).sum()) if float(values[0]) > 0.0 else 0
    if not kept:
        return torch.zeros_like(matrix)
    sigma = values[:kept].sqrt()
    if _polar_error(sigma) > _POLAR_ERROR:
        found = svd(matrix)
        kept = int((found.s > RANK * found.s[0]).sum())
        exact: Tensor = found.u[:, :kept] @ found.vh[:kept]
        return exact
    u = vectors[:, :kept]
    root = product_of_symmetric(u / sigma, u.T)
    return root @ wide if wide is matrix else (root @ wide).T


def _polar_error(sigma: Tensor) -> float:
    """What a relative error ε of AAᵀ does to the polar factor, relative to its norm.

    An error E of the Gram matrix in its eigenvectors' coordinates changes the factor by E_ij/(σⱼ(σᵢ + σⱼ)): for one small
    singular value among large ones that is ε/σ², but only in one of its r directions, and ε/σ in the others.
    """
    s = sigma / sigma[0]
    spread = 1.0 / (s * (s[:, None] + s)).square_()
    return _EPSILON * math.sqrt(float(spread.sum()) / len(s))


def shrink(matrix: Tensor, threshold: float) -> Tensor:
    """Singular value thresholding: UΣ'Vᵀ with σ' = max(σ − threshold, 0).

    As a function of AAᵀ, f(λ) = max(1 − threshold/√λ, 0), where that is good to 10⁻⁸.
    """
    if float(torch.linalg.matrix_norm(matrix)) <= threshold:
        return torch.zeros_like(matrix)
    wide = _wide(matrix)
    values, vectors = _spectrum(wide)
    if threshold**2 < _SQUARED_CONDITION * float(values[0]):
        found = svd(matrix)
        return Triplets(found.u, (found.s - threshold).clamp_(min=0.0), found.vh).matrix()
    kept = int((values > threshold**2).sum())
    u = vectors[:, :kept]
    factor = product_of_symmetric(u * (1.0 - threshold / values[:kept].sqrt()), u.T)
    return factor @ wide if wide is matrix else (factor @ wide).T
