"""Linear algebra of whole weights, in float64 and on one thread.

LAPACK's blocked algorithms split their work by the number of threads, and with it the order of their sums: the same matrix
decomposed by two threads has other last bits than by one. So a matrix is always decomposed by one; the parallelism is over
tensors (`geomerge.engine.execute`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from geomerge.methods.eigen import Tridiagonal, eigh, gram, symmetric_product, tridiagonal
from geomerge.methods.roots import inverse_root

if TYPE_CHECKING:
    from torch import Tensor


RANK = 1e-6
"""Singular values below this share of the largest do not count: a matrix in 16 or 32 bits does not hold such."""

_WEAK = 3e-3
"""Singular values below this share of the largest are not taken from a Gram matrix."""

_NOISE = 1e-13
"""Eigenvalues of a Gram matrix below this share of the largest are zero but for rounding."""


class _Alone:
    """One thread for torch, its BLAS and its LAPACK: each thread that enters has such a number of its own, and sets it.

    What the first one finds is set by each that leaves. A thread may enter several times.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 1
        self._own = threading.local()

    def __enter__(self) -> None:
        self._own.depth = getattr(self._own, "depth", 0) + 1
        if self._own.depth == 1:
            with self._lock:
                if not self._inside:
                    self._before = torch.get_num_threads()
                self._inside += 1
                torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        self._own.depth -= 1
        if not self._own.depth:
            with self._lock:
                self._inside -= 1
                torch.set_num_threads(self._before)


_alone = _Alone()


def one_thread() -> _Alone:
    """Within, torch, BLAS and LAPACK use one thread."""
    return _alone


# -- the shorter side --------------------------------------------------------------------------------------------------


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose, so that it has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


class _Left(NamedTuple):
    """The largest left singular vectors and values of a wide matrix; for the weakest ones the right vectors, too.

    Attributes:
        u: Shape ``(rows, k)``.
        s: The values, descending; none below 10⁻⁶ of the first.
        tail: The right vectors of the last ones, as rows. Those of the others are uᵀA/s.
    """

    u: Tensor
    s: Tensor
    tail: Tensor

    @property
    def head(self) -> int:
        """How many have no right vector here."""
        return len(self.s) - len(self.tail)


class _Square(NamedTuple):
    """AAᵀ of a wide matrix, its upper triangle, and its tridiagonal form."""

    product: Tensor
    form: Tridiagonal | None

    @classmethod
    def of(cls, wide: Tensor) -> _Square:
        product = gram(wide, upper=True)
        return cls(product, tridiagonal(product))


def _left(wide: Tensor, k: int, floor: float = 0.0, square: _Square | None = None) -> _Left:
    """The k largest, from the eigenvectors of AAᵀ: several times faster than a decomposition of A.

    That squares the condition: an error ε·σ₁² in AAᵀ mixes directions i and j by ε·σ₁²/(σᵢσⱼ), as good as nothing for strong
    ones and everything for weak ones. So the weak ones, σ < `_WEAK`·σ₁, are only taken as a subspace: what A does in it, a few
    rows, is decomposed itself. Where most are weak, all of A is.

    Values below `floor` are not wanted: where all weak ones are such, none is looked for.
    """
    product, form = square or _Square.of(wide)
    rows = len(product)
    values, vectors = eigh(product, k, form)
    first = float(values[0])
    lost = max(_NOISE * first, floor * floor)

    def strong_and_weak() -> tuple[int, bool]:
        strong = min(k, int((values >= _WEAK**2 * first).sum())) if first > 0.0 else 0
        return strong, strong < k and bool((values[strong:] > lost).any())

    strong, weak = strong_and_weak()
    if weak and k < rows:
        values, vectors = eigh(product)
        strong, weak = strong_and_weak()
    u, s, tail = vectors[:, :strong], values[:strong].sqrt(), wide[:0]
    if (weak and 2 * strong < rows) or math.isnan(first):  # NaN: the products overflowed
        u, s, tail = (x[:, :k] if i == 0 else x[:k] for i, x in enumerate(svd(wide)))
    elif weak:
        found = svd(vectors[:, strong:].T @ wide).first(k - strong)
        u, s, tail = torch.cat([u, vectors[:, strong:] @ found.u], 1), torch.cat([s, found.s]), found.vh
    kept = int((s > RANK * s[0]).sum()) if len(s) else 0
    return _Left(u[:, :kept], s[:kept], tail[: max(kept - len(s) + len(tail), 0)])


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
    """
    if k < 1:
        return Triplets(matrix[:, :0], matrix.new_zeros(0), matrix[:0])
    wide = _wide(matrix)
    left = _left(wide, min(k, wide.shape[0]))
    right = left.u[:, : left.head].T @ wide
    strong = torch.linalg.vector_norm(right, dim=1)
    s, vh = torch.cat([strong, left.s[left.head :]]), torch.cat([right / strong[:, None], left.tail])
    kept = int((s > floor).sum())
    found = Triplets(left.u, s, vh) if wide is matrix else Triplets(vh.T, s, left.u.T)
    return found.first(kept)


def largest_outside(matrix: Tensor, basis: Tensor, k: int, floor: float = 0.0) -> Triplets:
    """`largest` of what is left of a matrix with at least as many rows as columns outside of a subspace, A − BBᵀA.

    Its Gram matrix is AᵀA − (BᵀA)ᵀBᵀA, so that what is left need not be made: as good, unless next to nothing is left.

    Args:
        matrix: A.
        basis: B, orthonormal columns.
        k, floor: As for `largest`.
    """
    inside = basis.T @ matrix
    whole = gram(matrix.T, upper=True)
    values, vectors = eigh(whole - gram(inside.T, upper=True), k)
    if not float(values[-1]) > _WEAK**2 * float(whole.trace()):
        return largest(matrix - basis @ inside, k, floor)
    u = matrix @ vectors
    u -= basis @ (basis.T @ u)
    s = torch.linalg.vector_norm(u, dim=0)
    return Triplets(u / s, s, vectors.T).first(int((s > floor).sum()))


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
    total = float(matrix.square().sum())
    if energy >= 1.0 or not total > 0.0:
        return matrix
    found = largest(matrix, min(matrix.shape))
    # As many as it takes to reach the share, which rounding errors of the sums alone must not raise.
    k = int((found.s.square().cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1
    return found.first(k).matrix()


def joint_range(matrices: Tensor) -> Tensor:
    """Orthonormal columns that span those of all matrices of a stack, and as many as these.

    Args:
        matrices: Shape ``(number, rows, columns)``, with no more columns together than rows.
    """
    q: Tensor = torch.linalg.qr(torch.cat(list(matrices), 1)).Q
    return q


def complement(vectors: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to some orthonormal columns: shape ``(rows, rows − columns)``."""
    q: Tensor = torch.linalg.qr(vectors, mode="complete").Q
    return q[:, vectors.shape[1] :]


# -- functions of the singular values ----------------------------------------------------------------------------------


def polar(matrix: Tensor) -> Tensor:
    """UVᵀ of A = UΣVᵀ over the singular values above 10⁻⁶ of the largest: the nearest (partial) isometry."""
    wide = _wide(matrix)
    square = _Square.of(wide)
    root = inverse_root(square.form) if square.form else None
    if root is None:
        return scaled(matrix, lambda s: 1.0 / s, square=square)
    return symmetric_product(root, matrix, first=wide is matrix)


def shrink(matrix: Tensor, threshold: float) -> Tensor:
    """Singular value thresholding: UΣ'Vᵀ with σ' = max(σ − threshold, 0)."""
    if float(torch.linalg.matrix_norm(matrix)) <= threshold:
        return torch.zeros_like(matrix)
    return scaled(matrix, lambda s: (1.0 - threshold / s).clamp_(min=0.0), floor=threshold)


def scaled(
    matrix: Tensor, factor: Callable[[Tensor], Tensor], floor: float = 0.0, square: _Square | None = None
) -> Tensor:
    """Σ f(σᵢ)·σᵢ·uᵢvᵢᵀ over σᵢ > floor that are above 10⁻⁶ of the largest: for the strong ones as U f(Σ) Uᵀ·A.

    Args:
        matrix: A.
        factor: f ≥ 0 of all those singular values, the largest first.
        floor: Smaller ones are left out.
        square: The product of A's shorter side with itself, if that is known.
    """
    wide = _wide(matrix)
    square, k = square or _Square.of(wide), wide.shape[0]
    if floor and square.form:
        k = max(square.form.above(floor * floor), 1)
    left = _left(wide, k, floor, square)
    kept = int((left.s > floor).sum())
    head = min(left.head, kept)
    f = factor(left.s[:kept])
    u = left.u[:, :kept]
    # As A lies: a transposed result would be slow for whoever adds it to something.
    flat = wide is matrix
    if 2 * head <= len(wide):
        strong, weighed = u[:, :head], u[:, :head] * f[:head]
        made = weighed @ (strong.T @ matrix) if flat else (matrix @ strong) @ weighed.T
    else:
        whole = gram(u[:, :head] * f[:head].sqrt())
        made = whole @ matrix if flat else matrix @ whole
    if kept > head:
        weak, tail = u[:, head:] * (f * left.s[:kept])[head:], left.tail[: kept - head]
        made.addmm_(weak, tail) if flat else made.addmm_(tail.T, weak.T)
    return made
