"""Linear algebra of whole weights, in float64 and on one thread.

LAPACK's blocked algorithms split their work by the number of threads, and with it the order of their sums: the same matrix
decomposed by two threads has other last bits than by one. So a matrix is always decomposed by one; the parallelism is over
tensors (`geomerge.engine.execute`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from geomerge.methods.krylov import NOISE, leading

if TYPE_CHECKING:
    from torch import Tensor


RANK = 1e-6
"""Singular values below this share of the largest do not count: a matrix in 16 or 32 bits does not hold such."""

_PANEL = 256
_WEAK = 3e-3
"""Singular values below this share of the largest are not taken from a Gram matrix."""


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
    """Let torch, BLAS and LAPACK use one thread.

    Several threads may be inside at a time: the setting is the process's, so only the last that leaves restores it.
    """
    _threads.enter()
    try:
        yield
    finally:
        _threads.leave()


# -- the shorter side --------------------------------------------------------------------------------------------------


def gram(matrix: Tensor) -> Tensor:
    """AAᵀ."""
    return symmetric_product(matrix, matrix.T)


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """LR, which is known to be symmetric: by panels down to the diagonal, for half the work of a product."""
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


def _left(wide: Tensor, k: int, floor: float = 0.0) -> _Left:
    """The k largest, from the eigenvectors of AAᵀ: several times faster than a decomposition of A.

    That squares the condition: an error ε·σ₁² in AAᵀ mixes directions i and j by ε·σ₁²/(σᵢσⱼ), as good as nothing for strong
    ones and everything for weak ones. So the weak ones, σ < `_WEAK`·σ₁, are only taken as a subspace: what A does in it, a few
    rows, is decomposed itself. Where most are weak, all of A is.

    Few strong ones come from a Krylov space, if that is cheaper (`leading`). Values below `floor` are not wanted: where all
    weak ones are such, none is looked for.
    """
    product = gram(wide)
    few = leading(product, k, floor=_WEAK**2)
    if few is not None:
        return _Left(few.vectors, few.values.sqrt(), wide[:0])
    values, vectors = torch.linalg.eigh(product)
    values, vectors = values.flip(0).clamp_(min=0.0), vectors.flip(1)
    rows, first = len(values), float(values[0])
    strong = min(k, int((values >= _WEAK**2 * first).sum())) if first > 0.0 else 0
    u, s, tail = vectors[:, :strong], values[:strong].sqrt(), wide[:0]
    if strong < k and bool((values[strong:] > max(NOISE * first, floor * floor)).any()):
        if 2 * (rows - strong) > rows:
            u, s, tail = (x[:, :k] if i == 0 else x[:k] for i, x in enumerate(svd(wide)))
        else:
            weak = vectors[:, strong:]
            found = svd(weak.T @ wide).first(k - strong)
            u, s, tail = torch.cat([u, weak @ found.u], 1), torch.cat([s, found.s]), found.vh
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


def complement(vectors: Tensor) -> Tensor:
    """An orthonormal basis of what is orthogonal to some orthonormal columns: shape ``(rows, rows − columns)``."""
    q: Tensor = torch.linalg.qr(vectors, mode="complete").Q
    return q[:, vectors.shape[1] :]


# -- functions of the singular values ----------------------------------------------------------------------------------


def polar(matrix: Tensor) -> Tensor:
    """UVᵀ of A = UΣVᵀ over the singular values above 10⁻⁶ of the largest: the nearest (partial) isometry."""
    return _scaled(matrix, lambda s: 1.0 / s)


def shrink(matrix: Tensor, threshold: float) -> Tensor:
    """Singular value thresholding: UΣ'Vᵀ with σ' = max(σ − threshold, 0)."""
    if float(torch.linalg.matrix_norm(matrix)) <= threshold:
        return torch.zeros_like(matrix)
    return _scaled(matrix, lambda s: (1.0 - threshold / s).clamp_(min=0.0), floor=threshold)


def _scaled(matrix: Tensor, factor: Callable[[Tensor], Tensor], floor: float = 0.0) -> Tensor:
    """Σ f(σᵢ)·σᵢ·uᵢvᵢᵀ over σᵢ > floor, for the strong ones as U f(Σ) Uᵀ·A."""
    wide = _wide(matrix)
    left = _left(wide, wide.shape[0], floor)
    kept = int((left.s > floor).sum())
    head = min(left.head, kept)
    f = factor(left.s[:kept])
    u = left.u[:, :kept]
    strong = u[:, :head] * f[:head]
    few = 2 * head <= len(wide)
    made = strong @ (u[:, :head].T @ wide) if few else symmetric_product(strong, u[:, :head].T) @ wide
    if kept > head:
        made.addmm_(u[:, head:] * (f * left.s[:kept])[head:], left.tail[: kept - head])
    return made if wide is matrix else made.T
