"""Rows that a model lacks as sparse sums of rows that it has: the coefficients are found in a donor's matrix."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomerge.checkpoint.dtypes import to_torch
from geomerge.errors import NotFiniteError
from geomerge.tokens.rows import OMP, RowPlan

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.tile import Source
    from geomerge.tokens.rows import IntArray


class Mixtures:
    """The sparse sums of one re-ordered matrix.

    Only the coefficients are kept (k numbers a token) and, while they are found, the donor's rows of shared tokens in the dtype
    in which they are stored.

    Args:
        plan: The matrix's rows.
        donors: Each donor's matrix and its width.
        sparsity: The most rows in a sum.
    """

    def __init__(self, plan: RowPlan, donors: Mapping[int, tuple[Source, int]], sparsity: int) -> None:
        self._plan, self._donors, self._sparsity = plan, donors, sparsity
        self._lock = threading.Lock()
        self._found: dict[int, tuple[IntArray, list[float]]] | None = None

    def at(self, row: int) -> Iterator[tuple[int, float]]:
        """(row of the model's own matrix, coefficient) of an output row's sum.

        Raises:
            NotFiniteError: The donor holds NaN or Inf.
        """
        rows, coefficients = self.find()[row]
        return zip(rows.tolist(), coefficients, strict=True)

    @property
    def nbytes(self) -> int:
        """Bytes that a progress counts for `find`: those of the missing rows in float64, once for each row of their sums."""
        return sum(
            int((self._plan.source == OMP - donor).sum())
            * min(self._sparsity, width, len(self._plan.anchors(donor)))
            * width
            * 8
            for donor, (_, width) in self._donors.items()
        )

    def find(self, advance: Callable[[int], None] = lambda nbytes: None) -> Mapping[int, tuple[IntArray, list[float]]]:
        """Find the sums, once.

        Args:
            advance: Told of bytes, `nbytes` in all.

        Raises:
            NotFiniteError: The donor holds NaN or Inf.
        """
        with self._lock:
            if self._found is None:
                found: dict[int, tuple[IntArray, list[float]]] = {}
                for donor, (source, width) in self._donors.items():
                    found.update(self._find(donor, source, width, advance))
                self._found = found
            return self._found

    def _find(
        self, donor: int, source: Source, width: int, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, tuple[IntArray, list[float]]]]:
        from geomerge.align.pursuit import pursue

        wanted = np.flatnonzero(self._plan.source == OMP - donor)
        theirs = self._plan.row[wanted]
        anchors = self._plan.anchors(donor)
        atoms = _rows(source, width, anchors[:, 1], to_torch(source.dtype))
        sums = pursue(
            lambda first, last: _rows(source, width, theirs[first:last], torch.float64),
            len(wanted),
            atoms,
            self._sparsity,
            lambda rows: advance(rows * width * 8),
        )
        for i, out in enumerate(wanted.tolist()):
            used = torch.nonzero(sums.coefficients[i]).flatten()
            yield out, (anchors[sums.rows[i, used].numpy(), 0], sums.coefficients[i, used].tolist())


def _rows(source: Source, width: int, which: IntArray, dtype: torch.dtype) -> Tensor:
    """Some rows of a matrix, runs of them at once.

    Raises:
        NotFiniteError: One holds NaN or Inf.
    """
    out = torch.empty(len(which), width, dtype=dtype)
    starts = [0, *(np.flatnonzero(np.diff(which) != 1) + 1).tolist()] if len(which) else []
    for start, stop in zip(starts, [*starts[1:], len(which)], strict=True):
        source.read(int(which[start]) * width, out[start:stop].view(-1))
    if not bool(torch.isfinite(out).all()):
        raise NotFiniteError("holds NaN or Inf", where=source.label)
    return out
