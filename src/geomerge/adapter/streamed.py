"""The leading singular directions of a matrix that is only ever seen in blocks of rows.

A randomised block Krylov iteration (Musco & Musco 2015, Randomized Block Krylov Methods, arXiv:1504.05477): from a random V₀
the spaces V₀, (DᵀD)V₀, (DᵀD)²V₀, … are made, each from one pass over D, and D is projected onto all of them. That is a
fraction of a percent from the best approximation even where the singular values hardly fall. The error is not estimated: one
more pass measures ‖D − B·A‖.

Memory: a block of D, and (rows + columns) numbers for each direction of the Krylov space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geomerge.adapter.low_rank import Budget, Factors, Truncated
from geomerge.methods.random import stream

BLOCK_ELEMENTS = 1 << 18
"""Elements in a block of rows: fixed by the shape, so that the sums do not depend on how the matrix is made; a block stays in
the caches from one product to the next."""

_OVERSAMPLED = 10
_PASSES = 3
_FIRST_RANK = 32
_NOTHING = 1e-9
"""Directions this much smaller than what a pass gave are rounding errors."""


@dataclass(frozen=True)
class Streamed:
    """A matrix as blocks of rows.

    Attributes:
        rows, columns: Its shape.
        blocks: Makes it anew: blocks of `height` rows in order, float64, each valid until the next is asked for.
    """

    rows: int
    columns: int
    blocks: Callable[[], Iterator[Tensor]]


def height(columns: int) -> int:
    """Rows in a block."""
    return max(BLOCK_ELEMENTS // max(columns, 1), 1)


def in_rows(pieces: Iterable[Tensor], rows: int, columns: int) -> Iterator[Tensor]:
    """Blocks of whole rows from flat pieces that follow each other."""
    block = torch.empty(min(height(columns), rows) * columns, dtype=torch.float64)
    filled, left = 0, rows * columns
    for piece in pieces:
        at = 0
        while at < piece.numel():
            count = min(block.numel() - filled, piece.numel() - at)
            block[filled : filled + count].copy_(piece[at : at + count])
            filled, at, left = filled + count, at + count, left - count
            if filled == block.numel() or left == 0:
                yield block[:filled].view(-1, columns)
                filled = 0


def truncate(matrix: Streamed, budget: Budget, key: str, seed: int = 0) -> Truncated:
    """An approximation of low rank.

    Args:
        matrix: The matrix.
        budget: Rank or energy. With an energy, ranks are tried in steps of two until one holds it.
        key: Names the matrix: random draws are keyed by it and the seed.
    """
    full = min(matrix.rows, matrix.columns)
    most = min(budget.rank or full, full)
    rank = most if budget.energy is None else min(_FIRST_RANK, most)
    while True:
        left, s, right, total = _leading(matrix, rank, key, seed)
        squares = s.square().tolist()
        chosen = min(budget.choose(squares, total), rank)
        held = math.fsum(squares[:chosen])
        if budget.energy is None or rank >= most or held >= budget.energy * total:
            break
        rank = min(2 * rank, most)
    root = s[:chosen].sqrt()
    kept = Factors(left[:, :chosen] * root, root.unsqueeze(1) * right[:, :chosen].T)
    return Truncated(kept, math.sqrt(total), _distance(matrix, kept))


def _leading(matrix: Streamed, rank: int, key: str, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Left vectors, singular values, right vectors of the projected matrix, and ‖D‖²."""
    width = min(rank + _OVERSAMPLED, matrix.columns)
    if (_PASSES + 1) * width >= matrix.columns:
        basis = torch.eye(matrix.columns, dtype=torch.float64)
    else:
        draws = np.random.Generator(stream(seed, f"krylov/{key}")).standard_normal((matrix.columns, width))
        basis = space = _orthonormal(torch.from_numpy(draws).clone(), None)
        for _ in range(_PASSES):
            found = torch.zeros(space.shape[1], matrix.columns, dtype=torch.float64)
            for block in matrix.blocks():
                found.addmm_((block @ space).T, block)
            space = _orthonormal(found.T, basis)
            if not space.shape[1]:
                break
            basis = torch.cat([basis, space], 1)
    projected = torch.empty(matrix.rows, basis.shape[1], dtype=torch.float64)
    energy, at = [], 0
    for block in matrix.blocks():
        energy.append(block.square().sum().item())
        torch.mm(block, basis, out=projected[at : at + len(block)])
        at += len(block)
    q, r = torch.linalg.qr(projected)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    return q @ u, s, basis @ vh.T, math.fsum(energy)


def _orthonormal(vectors: Tensor, known: Tensor | None) -> Tensor:
    """An orthonormal basis of what the columns add to a known space; directions that are rounding errors are dropped."""
    size = float(vectors.norm())
    for _ in range(2):  # once more, for what the first projection left
        if known is not None:
            vectors = vectors - known @ (known.T @ vectors)
        u, s, _ = torch.linalg.svd(vectors, full_matrices=False)
        vectors = u[:, s > _NOTHING * size]
        size = 1.0
        if not vectors.shape[1]:
            break
    return vectors


def _distance(matrix: Streamed, kept: Factors) -> float:
    """‖D − b·a‖."""
    squares, at = [], 0
    for block in matrix.blocks():
        squares.append((block - kept.b[at : at + len(block)] @ kept.a).square().sum().item())
        at += len(block)
    return math.sqrt(math.fsum(squares))
