"""Orthogonal matching pursuit: vectors as sums of at most k rows of a dictionary, found greedily.

    k times:  j = argmax |⟨r, dⱼ⟩| / ‖dⱼ‖,  S ← S ∪ {j}
             c = argmin ‖t − Σ_{i∈S} cᵢ·dᵢ‖,  r = t − Σ_{i∈S} cᵢ·dᵢ

The least squares go by QR: each new row is made orthogonal to those before it (twice, so that rows that are nearly
dependent do no harm), and the coefficients come from the triangular factor at the end. All of that is float64.

**Cost.** The products ⟨r, dⱼ⟩, n·m·d·k multiplications for n vectors and m rows of width d, are nearly all of it; everything
else is n·k²·d. So the products are made in float32 and only say where to look. A float32 score of unit vectors is off by little
more than (d + 4)·2⁻²⁴ (each factor is rounded once, and so is each of d sums), so the row that is best in float64 stands in a
group whose float32 maximum is within twice that of the best group's. Those few groups, mostly one, are scored in float64, and
that decides. The choice is that of a pursuit in float64 at half its time.

Targets are taken in blocks whose size follows from k and the width alone, products over fixed blocks of the dictionary, each
by one thread: the bits do not depend on how many threads there are.

References:
    Pati, Rezaiifar, Krishnaprasad 1993, Orthogonal matching pursuit.
    Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1: the error of an inner product.
    Goddard, Fernandes Neto 2025, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit, arXiv:2506.06607: the
    coefficients of a token that one model lacks are found in another's embedding and used in its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch

from geomerge.late import also_alone, torch_alone

if TYPE_CHECKING:
    from torch import Tensor


_HELD = 1 << 25
"""Elements of orthogonal rows that are held at once: 256 MB."""

_AT_ONCE = 1 << 22
"""Elements of the dictionary that one product takes."""

_TARGETS, _ROWS = 1 << 10, 1 << 12
"""The most targets and rows of one product, whose scores then take 16 MB in each thread."""

_GROUP = 16
"""Rows whose scores are looked at together."""

_PAIRS = 1 << 17
"""The most pairs of a target and a group that are scored at once."""

_TOGETHER = 64
"""Targets, or groups of rows, that one thread works on in float64: as many as stay in its caches."""

EXACT = 1e-12
"""A residual of this share of its vector is rounding: the sum is exact."""

_DEPENDENT = 1e-10
"""A row of which less than this share is new adds nothing."""

_ORDINARY = (1e-15, 1e15)
"""Lengths of rows whose products with unit vectors neither overflow nor vanish in float32."""


class Sums(NamedTuple):
    """Sparse sums.

    Attributes:
        rows: Which rows of the dictionary: int64, shape ``(n, k)``; 0 where fewer were needed.
        coefficients: float64, shape ``(n, k)``; 0 where fewer were needed.
    """

    rows: Tensor
    coefficients: Tensor


def pursue(
    targets: Callable[[int, int], Tensor],
    count: int,
    atoms: Tensor,
    sparsity: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> Sums:
    """Approximate vectors by sparse sums.

    Args:
        targets: Gives the vectors from one number to another: shape ``(stop − start, d)``, float64.
        count: How many there are.
        atoms: The dictionary, shape ``(m, d)``, in any dtype; it is widened a block at a time.
        sparsity: k. No more than m or d rows are taken, whatever it is.
        advance: Told how many rows were taken since the last call, k for each vector in all.
    """
    k = max(min(sparsity, *atoms.shape), 0)
    rows = torch.zeros(count, k, dtype=torch.int64)
    coefficients = torch.zeros(count, k, dtype=torch.float64)
    width = atoms.shape[1]
    step = min(max(_HELD // max(k * width, 1), 1), _TARGETS)
    with (
        torch_alone(),
        _plain_products(),
        torch.inference_mode(),
        ThreadPoolExecutor(_threads(), "geomerge-align", also_alone) as pool,
    ):
        dictionary = _Dictionary(atoms, pool)
        for first in range(0, count if k else 0, step):
            last = min(first + step, count)
            block = _Block(targets(first, last), dictionary, k)
            for s in range(k):
                block.take(s, pool)
                advance(last - first)
            rows[first:last], coefficients[first:last] = block.solved()
    return Sums(rows, coefficients)


class _Dictionary:
    """The rows with their lengths, and the search among them."""

    def __init__(self, atoms: Tensor, pool: ThreadPoolExecutor) -> None:
        self.atoms, self._pool = atoms, pool
        step = min(max(_AT_ONCE // max(atoms.shape[1], 1), _GROUP), _ROWS)
        self._step = step // _GROUP * _GROUP
        self._firsts = range(0, len(atoms), self._step)
        self.norms = torch.cat([atoms[f : f + step].double().norm(dim=1) for f in range(0, len(atoms), step)])
        lengths = self.norms[self.norms > 0]
        ordinary = bool(((lengths > _ORDINARY[0]) & (lengths < _ORDINARY[1])).all())
        self._screen = torch.float32 if ordinary else torch.float64
        self._slack = 2 * (1.01 * atoms.shape[1] + 8) * (2.0**-24 if ordinary else 2.0**-53)
        self._inverse = torch.where(self.norms > 0, 1.0 / self.norms, 0.0).to(self._screen)

    def best(self, residuals: Tensor, chosen: Tensor) -> Tensor:
        """The row that each residual is most along: int64, shape ``(n,)``; of equals the lowest; −1 where there is none.

        Args:
            residuals: Shape ``(n, d)``.
            chosen: Rows that are taken already, shape ``(n, s)``; −1 is none.
        """
        size = residuals.norm(dim=1, keepdim=True)
        units = (residuals / torch.where(size > 0, size, 1.0)).to(self._screen)
        groups = list(self._pool.map(lambda first: self._maxima(first, units), self._firsts))
        maxima = torch.cat(groups, dim=1)
        near = maxima >= maxima.amax(dim=1, keepdim=True) - self._slack
        target, group = near.nonzero(as_tuple=True)
        if len(target) > _PAIRS and len(residuals) > 1:
            # What is left of these is along no row: everything is near everything.
            half = len(residuals) // 2
            return torch.cat([self.best(residuals[mine], chosen[mine]) for mine in (slice(half), slice(half, None))])
        # The rows of a group stand a stride apart, so that its maximum is taken over whole vectors.
        strides = torch.cat([torch.full((g.shape[1],), g.shape[1]) for g in groups])
        starts = torch.cat([f + torch.arange(g.shape[1]) for f, g in zip(self._firsts, groups, strict=True)])
        rows = starts[group].unsqueeze(1) + strides[group].unsqueeze(1) * torch.arange(_GROUP)
        pieces = range(0, len(rows), _TOGETHER)

        def weigh(first: int) -> Tensor:
            mine = slice(first, first + _TOGETHER)
            return self._scores(rows[mine], residuals[target[mine]], chosen[target[mine]])

        scores = torch.cat(list(self._pool.map(weigh, pieces)))
        which = target.unsqueeze(1).expand_as(rows).reshape(-1)
        top = torch.full((len(residuals),), -1.0, dtype=torch.float64).scatter_reduce(
            0, which, scores.reshape(-1), "amax"
        )
        none = len(self.atoms)
        index = torch.where(scores == top[target].unsqueeze(1), rows, none).reshape(-1)
        lowest = torch.full((len(residuals),), none).scatter_reduce(0, which, index, "amin")
        return torch.where(top > 0, lowest, -1)

    def _maxima(self, first: int, units: Tensor) -> Tensor:
        """The largest score of each group of a block of the dictionary: shape ``(n, groups)``."""
        with torch.inference_mode():
            block = self.atoms[first : first + self._step].to(self._screen)
            inverse = self._inverse[first : first + self._step]
            score = (units @ block.T).abs_().mul_(inverse)
            short = -len(block) % _GROUP
            if short:
                score = torch.nn.functional.pad(score, (0, short))
            return score.view(len(units), _GROUP, -1).amax(dim=1)

    def _scores(self, rows: Tensor, residuals: Tensor, chosen: Tensor) -> Tensor:
        """|⟨r, dⱼ⟩| / ‖dⱼ‖ of the rows of some groups; −1 of those that are taken, or are beyond the last."""
        with torch.inference_mode():
            there = rows.clamp(max=len(self.atoms) - 1)
            norms = self.norms[there]
            products = torch.bmm(self.atoms[there].double(), residuals.unsqueeze(2)).squeeze(2)
            score = products.abs_().div_(torch.where(norms > 0, norms, torch.inf))
            taken = (rows.unsqueeze(2) == chosen.unsqueeze(1)).any(dim=2) | (rows >= len(self.atoms))
            return score.masked_fill_(taken, -1.0)


class _Block:
    """Some targets and what has been taken for them.

    Args:
        targets: Shape ``(n, d)``.
        dictionary: The rows.
        k: The most rows.

    Attributes:
        active: The targets that still want a row.
    """

    def __init__(self, targets: Tensor, dictionary: _Dictionary, k: int) -> None:
        n, width = targets.shape
        self._dictionary = dictionary
        self._size = targets.norm(dim=1)
        self._residual = targets.clone()
        self._basis = torch.zeros(n, k, width, dtype=torch.float64)
        self._upper = torch.eye(k, dtype=torch.float64).repeat(n, 1, 1)
        self._along = torch.zeros(n, k, dtype=torch.float64)
        self._chosen = torch.full((n, k), -1, dtype=torch.int64)
        self.active = self._size > 0

    def take(self, s: int, pool: ThreadPoolExecutor) -> None:
        """Take the s-th row of every target that wants one."""
        wanting = self.active.nonzero().squeeze(1)
        if not len(wanting):
            return
        best = torch.full((len(self.active),), -1)
        best[wanting] = self._dictionary.best(self._residual[wanting], self._chosen[wanting, :s])
        pieces = range(0, len(best), _TOGETHER)
        list(pool.map(lambda first: self._add(slice(first, first + _TOGETHER), s, best), pieces))

    def _add(self, mine: slice, s: int, best: Tensor) -> None:
        with torch.inference_mode():
            dictionary, basis, residual = self._dictionary, self._basis[mine], self._residual[mine]
            found = best[mine]
            at = found.clamp(min=0)
            row = dictionary.atoms[at].double()
            parts = torch.zeros(len(row), s, dtype=torch.float64)
            for _ in range(2):
                part = torch.bmm(basis[:, :s], row.unsqueeze(2)).squeeze(2)
                row = row - torch.bmm(part.unsqueeze(1), basis[:, :s]).squeeze(1)
                parts += part
            length = row.norm(dim=1)
            active = self.active[mine] & (found >= 0) & (length > _DEPENDENT * dictionary.norms[at])
            keep = active.unsqueeze(1)
            basis[:, s] = torch.where(keep, row / torch.where(active, length, 1.0).unsqueeze(1), 0.0)
            self._upper[mine, :s, s] = torch.where(keep, parts, 0.0)
            self._upper[mine, s, s] = torch.where(active, length, 1.0)
            along = (basis[:, s] * residual).sum(dim=1)
            residual -= along.unsqueeze(1) * basis[:, s]
            self._along[mine, s] = along
            self._chosen[mine, s] = torch.where(active, found, -1)
            self.active[mine] = active & (residual.norm(dim=1) > EXACT * self._size[mine])

    def solved(self) -> tuple[Tensor, Tensor]:
        """The rows and their coefficients: see `Sums`."""
        solved = torch.linalg.solve_triangular(self._upper, self._along.unsqueeze(2), upper=True).squeeze(2)
        return self._chosen.clamp(min=0), torch.where(self._chosen >= 0, solved, 0.0)


@contextlib.contextmanager
def _plain_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the process has allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
