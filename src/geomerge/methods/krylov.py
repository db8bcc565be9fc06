"""The largest eigenvalues of a positive semidefinite matrix, for less than all of them cost, and certified.

LAPACK's `eigh` first makes the matrix tridiagonal, half of which are products with a vector, and then turns all n vectors back:
about seven products of two n×n matrices. Where the n/8 largest are wanted and the spectrum falls off, a Krylov space does it
for two or three.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


NOISE = 1e-13
"""Eigenvalues below this share of the largest are zero but for rounding."""

_SMALL = 512
"""Of matrices with fewer rows than this, `eigh` is as fast."""
_SHARE = 8
"""At most one in so many eigenvectors is looked for: with more, the space would be too large to pay."""
_DENSE = 0.25
"""With an effective rank (Σλ)²/Σλ² above this share of the rows, as of noise, the spectrum is too dense."""
_SPACE = 0.55
"""The space grows to this share of the rows at most; from there on it costs what `eigh` does."""
_HOPELESS = 0.1
"""With residuals above this share of the smallest eigenvalue wanted in the first space, it is, too."""
_RESIDUAL = 1e-11
"""‖Gx − θx‖ relative to the smallest eigenvalue wanted: what a vector may have outside of its place."""
_ROUNDING = 4e-16
"""The same relative to the largest eigenvalue: more is not to be had in float64."""
_TIE = 1e-10
"""Eigenvalues whose relative distance is less are the same."""


class Leading(NamedTuple):
    """Eigenpairs, the largest first.

    Attributes:
        values: Shape ``(k,)``.
        vectors: Orthonormal, shape ``(n, k)``.
    """

    values: Tensor
    vectors: Tensor


def leading(matrix: Tensor, k: int, floor: float = 0.0) -> Leading | None:
    """The k largest eigenpairs; fewer if the others are zero; `None` where `eigh` is the better way.

    Block Lanczos from a fixed random block, all blocks kept orthonormal by two rounds of Gram–Schmidt and QR, and Rayleigh–Ritz
    in the space of dimension m that they span (Golub & Underwood 1977; Saad 2011, Numerical Methods for Large Eigenvalue
    Problems, chapter 6). Residuals are checked at dimensions that the progress so far suggests. In units of a product of two
    n×n matrices that costs m/n for the products with the matrix, (m/n)² for keeping the blocks orthogonal, 7(m/n)³ for each
    small eigenvalue problem, and one half for the certificate.

    The certificate: small residuals say that these are eigenpairs, not that they are the largest ones; a block of b vectors
    sees an eigenvalue b times at most. All others are below θ_k if and only if θ_k·I − (G − XΘXᵀ) is positive definite, which
    is if and only if it has a Cholesky factor. Without one there is no result.

    Args:
        matrix: G, symmetric and positive semidefinite, shape ``(n, n)``.
        k: At least 1.
        floor: When one of them is below this share of the largest, there is no result.
    """
    rows = len(matrix)
    if rows < _SMALL or k * _SHARE > rows:
        return None
    space = _Space(matrix, block=max(16, rows // 32), limit=int(_SPACE * rows))
    if space.trace**2 > _DENSE * rows * float(matrix.square().sum()):
        return None
    found = _search(space, k, floor)
    return found if found is not None and _certified(matrix, found, k, space.trace) else None


class _Space:
    """A Krylov space that grows by a block at a time."""

    def __init__(self, matrix: Tensor, block: int, limit: int) -> None:
        rows = len(matrix)
        self.matrix, self.block, self.limit = matrix, block, limit
        self.trace = float(matrix.diagonal().sum())
        self.size = 0
        self._basis = matrix.new_empty(rows, limit + block)
        self._projected = matrix.new_zeros(limit + block, limit + block)
        # One fixed start: the same bits in every process, on every device.
        drawn = torch.randn(rows, block, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
        self._rest = matrix @ drawn.to(matrix.device)

    @property
    def basis(self) -> Tensor:
        """Q, shape ``(n, m)``."""
        return self._basis[:, : self.size]

    @property
    def closed(self) -> bool:
        """Whether the matrix does not lead out of the space any more."""
        return float(self._rest.norm()) <= NOISE * self.trace

    def grow(self) -> None:
        """One block more."""
        block = _orthonormal(self._rest)
        if self.size:
            # Where little is left, QR blows its rounding errors up to full length: hence the second round.
            block = _orthonormal(block - self.basis @ (self.basis.T @ block))
        first, self.size = self.size, self.size + self.block
        self._basis[:, first : self.size] = block
        image = self.matrix @ block
        # It leads into this block, the one before and the next; the blocks before are removed from that in its second round.
        near = slice(max(first - self.block, 0), self.size)
        coordinates = self._basis[:, near].T @ image
        self._projected[near, first : self.size] = coordinates
        self._projected[first : self.size, near] = coordinates.T
        self._rest = image.addmm_(self._basis[:, near], coordinates, alpha=-1)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of QᵀGQ, the largest first, and its vectors."""
        values, vectors = torch.linalg.eigh(self._projected[: self.size, : self.size])
        return values.flip(0), vectors.flip(1)

    def residual(self, vectors: Tensor) -> float:
        """The largest ‖GQy − θQy‖ of eigenvectors y of QᵀGQ: only the last block leads out of the space."""
        return float(torch.linalg.vector_norm(self._rest @ vectors[-self.block :], dim=0).max())


def _search(space: _Space, k: int, floor: float) -> Leading | None:
    """Ritz pairs with small residuals, the k largest or all that are not zero; `None` if that takes too large a space."""
    check, before = float(max(2 * k, 4 * space.block)), None
    while space.size < space.limit:
        space.grow()
        if space.size < check and not space.closed:
            continue
        values, vectors = space.ritz()
        if space.closed:
            k = min(k, int((values > NOISE * space.trace).sum()))
        values, vectors = values[:k], vectors[:, :k]
        if not k:
            return Leading(values, space.basis @ vectors)
        smallest = float(values[-1])
        if smallest < floor * float(values[0]):
            return None
        if space.closed:
            return Leading(values, space.basis @ vectors)
        residual = space.residual(vectors)
        wanted = max(_RESIDUAL * smallest, _ROUNDING * float(values[0]))
        if residual <= wanted:
            return Leading(values, space.basis @ vectors)
        if before is None and residual > _HOPELESS * smallest:
            return None
        check = _forecast(space.size, residual, wanted, before)
        if check > 1.4 * space.limit:
            return None
        check, before = min(check, 1.25 * space.size), (space.size, residual)
    return None


def _forecast(size: int, residual: float, wanted: float, before: tuple[int, float] | None) -> float:
    """The dimension at which the residual is as small as wanted, if it goes on falling as fast; it will fall faster."""
    if before is None:
        return 1.25 * size
    if residual >= before[1]:
        return math.inf
    return size + (size - before[0]) * math.log(residual / wanted) / math.log(before[1] / residual)


def _certified(matrix: Tensor, found: Leading, k: int, trace: float) -> bool:
    """Whether no other eigenvalue is larger than the smallest found, or, when fewer than k were found, than zero."""
    values, vectors = found
    if not len(values):
        return not trace > 0.0
    bound = float(values[-1]) * (1 + _TIE) if len(values) == k else 0.0
    rest = torch.addmm(matrix, vectors * values, vectors.T, beta=-1)
    rest.diagonal().add_(bound + NOISE * trace)
    return not int(torch.linalg.cholesky_ex(rest).info)


def _orthonormal(block: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(block).Q
    return q
