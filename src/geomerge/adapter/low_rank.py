"""Matrices that are kept as B·A: sums, inner products and truncation without ever making the matrix.

The sum Σ cₖ·BₖAₖ has the factors [c₁B₁ … c_TB_T] and [A₁; …; A_T]. With B = Q_B R_B and Aᵀ = Q_A R_A its singular values are
those of the small R_B R_Aᵀ, so truncation is as exact as an SVD of the whole matrix, at the cost of two thin QRs. (A weighted
sum of the A's times a weighted sum of the B's is another matrix altogether.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The matrix b·a.

    Attributes:
        b: Shape ``(rows, rank)``, float64.
        a: Shape ``(rank, columns)``, float64.
    """

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of b; the matrix may have a lower rank."""
        return self.b.shape[1]


@dataclass(frozen=True)
class Truncated:
    """A matrix of lower rank, and what it leaves out.

    Attributes:
        factors: The matrix.
        norm: ‖·‖ of the original.
        error: ‖original − matrix‖.
    """

    factors: Factors
    norm: float
    error: float


@dataclass(frozen=True)
class Budget:
    """How much of a matrix is kept.

    Attributes:
        rank: At most so many directions; `None`: as many as it has.
        energy: The fewest directions that hold this share of ‖·‖²; `None`: all that `rank` allows.
    """

    rank: int | None = None
    energy: float | None = None

    def choose(self, squares: Sequence[float], total: float) -> int:
        """How many directions to keep, at least one.

        Args:
            squares: The squared singular values, largest first.
            total: Their sum over the whole matrix.
        """
        most = len(squares) if self.rank is None else min(self.rank, len(squares))
        if self.energy is not None:
            kept = 0.0
            for i, square in enumerate(squares[:most]):
                if kept >= self.energy * total:
                    return max(i, 1)
                kept += square
        return max(most, 1)


def combination(terms: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Σ cₖ·bₖaₖ, exactly: the factors side by side. What has rank or coefficient 0 is left out, unless nothing would remain."""
    used = [(f, c) for f, c in zip(terms, coefficients, strict=True) if c != 0.0 and f.rank]
    used = used or [(next(f for f in terms if f.rank), 0.0)]
    return Factors(torch.cat([f.b if c == 1.0 else f.b * c for f, c in used], 1), torch.cat([f.a for f, _ in used], 0))


def inner(x: Factors, y: Factors) -> float:
    """⟨x, y⟩ = tr((b_xᵀb_y)(a_y a_xᵀ))."""
    return float(((x.b.T @ y.b) * (x.a @ y.a.T)).sum())


def truncate(matrix: Factors, budget: Budget) -> Truncated:
    """The best approximation in the Frobenius norm within a budget.

    A matrix that fits as it is keeps its very factors.
    """
    q_b, r_b = torch.linalg.qr(matrix.b)
    q_a, r_a = torch.linalg.qr(matrix.a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    squares = s.square().tolist()
    total = math.fsum(squares)
    rank = budget.choose(squares, total)
    if rank >= matrix.rank:
        return Truncated(matrix, math.sqrt(total), 0.0)
    root = s[:rank].sqrt()
    kept = Factors(q_b @ (u[:, :rank] * root), (root.unsqueeze(1) * vh[:rank]) @ q_a.T)
    return Truncated(kept, math.sqrt(total), math.sqrt(math.fsum(squares[rank:])))
