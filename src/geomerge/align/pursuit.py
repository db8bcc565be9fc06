"""Orthogonal matching pursuit: vectors as sums of at most k rows of a dictionary, found greedily.

    k times:  j = argmax |⟨r, dⱼ⟩| / ‖dⱼ‖,  S ← S ∪ {j}
             c = argmin ‖t − Σ_{i∈S} cᵢ·dᵢ‖,  r = t − Σ_{i∈S} cᵢ·dᵢ

The least squares go by QR: each new row is made orthogonal to those before it (twice, so that rows that are nearly
dependent do no harm), and the coefficients come from the triangular factor at the end. All in float64. Targets are taken in
blocks whose size follows from k and the width alone, products over fixed blocks of the dictionary, each by one thread: the
bits do not depend on how many threads there are.

References:
    Pati, Rezaiifar, Krishnaprasad 1993, Orthogonal matching pursuit.
    Goddard, Fernandes Neto 2025, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit, arXiv:2506.06607: the
    coefficients of a token that one model lacks are found in another's embedding and used in its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from geomerge.align.procrustes import one_thread

_HELD = 1 << 25
"""Elements of orthogonal rows that are held at once: 256 MB."""

_AT_ONCE = 1 << 21
"""Elements of the dictionary that one product takes."""

_TARGETS, _ROWS = 1 << 10, 1 << 12
"""The most targets and rows of one product, whose scores then take 32 MB in each thread."""

EXACT = 1e-12
"""A residual of this share of its vector is rounding: the sum is exact."""

_DEPENDENT = 1e-10
"""A row of which less than this share is new adds nothing."""


class Sums(NamedTuple):
    """Sparse sums.

    Attributes:
        rows: Which rows of the dictionary: int64, shape ``(n, k)``; 0 where fewer were needed.
        coefficients: float64, shape ``(n, k)``; 0 where fewer were needed.
    """

    rows: Tensor
    coefficients: Tensor


def pursue(targets: Callable[[int, int], Tensor], count: int, atoms: Tensor, sparsity: int) -> Sums:
    """Approximate vectors by sparse sums.

    Args:
        targets: Gives the vectors from one number to another: shape ``(stop − start, d)``, float64.
        count: How many there are.
        atoms: The dictionary, shape ``(m, d)``, in any dtype; it is widened a block at a time.
        sparsity: k. No more than m or d rows are taken, whatever it is.
    """
    k = max(min(sparsity, *atoms.shape), 0)
    rows = torch.zeros(count, k, dtype=torch.int64)
    coefficients = torch.zeros(count, k, dtype=torch.float64)
    width = atoms.shape[1]
    step = min(max(_HELD // max(k * width, 1), 1), _TARGETS)
    with one_thread(), torch.inference_mode(), ThreadPoolExecutor(_threads(), "geomerge-align") as pool:
        dictionary = _Dictionary(atoms, pool)
        for first in range(0, count if k else 0, step):
            last = min(first + step, count)
            rows[first:last], coefficients[first:last] = _block(targets(first, last), dictionary, k)
    return Sums(rows, coefficients)


class _Dictionary:
    """The rows with their lengths, and the search among them."""

    def __init__(self, atoms: Tensor, pool: ThreadPoolExecutor) -> None:
        self.atoms, self._pool = atoms, pool
        step = min(max(_AT_ONCE // max(atoms.shape[1], 1), 1), _ROWS)
        self._firsts = range(0, len(atoms), step)
        self._step = step
        self.norms = torch.cat([atoms[f : f + step].double().norm(dim=1) for f in self._firsts])

    def best(self, residuals: Tensor, chosen: Tensor) -> Tensor:
        """The row that each residual is most along: int64, shape ``(n,)``; of equals the lowest; −1 where there is none.

        Args:
            residuals: Shape ``(n, d)``.
            chosen: Rows that are taken already, shape ``(n, s)``; −1 is none.
        """
        found = list(self._pool.map(lambda first: self._search(first, residuals, chosen), self._firsts))
        score, index = found[0]
        for other, at in found[1:]:
            better = other > score
            score, index = torch.where(better, other, score), torch.where(better, at, index)
        return torch.where(score > 0, index, -1)

    def _search(self, first: int, residuals: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            block = self.atoms[first : first + self._step].double()
            norms = self.norms[first : first + len(block)]
            score = (residuals @ block.T).abs_().div_(torch.where(norms > 0, norms, torch.inf))
            token, place = ((chosen >= first) & (chosen < first + len(block))).nonzero(as_tuple=True)
            score[token, chosen[token, place] - first] = -1.0
            best, at = score.max(dim=1)
            return best, at + first


def _block(targets: Tensor, dictionary: _Dictionary, k: int) -> tuple[Tensor, Tensor]:
    n, width = targets.shape
    size = targets.norm(dim=1)
    residual = targets.clone()
    basis = torch.zeros(n, k, width, dtype=torch.float64)
    upper = torch.eye(k, dtype=torch.float64).repeat(n, 1, 1)
    along = torch.zeros(n, k, dtype=torch.float64)
    chosen = torch.full((n, k), -1, dtype=torch.int64)
    active = size > 0
    for s in range(k):
        if not bool(active.any()):
            break
        best = dictionary.best(residual, chosen[:, :s])
        row = dictionary.atoms[best.clamp(min=0)].double()
        parts = torch.zeros(n, s, dtype=torch.float64)
        for _ in range(2):
            part = torch.bmm(basis[:, :s], row.unsqueeze(2)).squeeze(2)
            row = row - torch.bmm(part.unsqueeze(1), basis[:, :s]).squeeze(1)
            parts += part
        length = row.norm(dim=1)
        active = active & (best >= 0) & (length > _DEPENDENT * dictionary.norms[best.clamp(min=0)])
        keep = active.unsqueeze(1)
        basis[:, s] = torch.where(keep, row / torch.where(active, length, 1.0).unsqueeze(1), 0.0)
        upper[:, :s, s] = torch.where(keep, parts, 0.0)
        upper[:, s, s] = torch.where(active, length, 1.0)
        along[:, s] = (basis[:, s] * residual).sum(dim=1)
        residual -= along[:, s].unsqueeze(1) * basis[:, s]
        chosen[:, s] = torch.where(active, best, -1)
        active = active & (residual.norm(dim=1) > EXACT * size)
    solved = torch.linalg.solve_triangular(upper, along.unsqueeze(2), upper=True).squeeze(2)
    return chosen.clamp(min=0), torch.where(chosen >= 0, solved, 0.0)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
