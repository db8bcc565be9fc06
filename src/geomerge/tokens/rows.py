"""Row plans: where each row of a model's re-indexed embedding comes from, as arrays that an engine can stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geomerge.tokens.write import OutputTokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    IntArray = NDArray[np.int64]

MEAN = -2
"""The float64 mean of the rows of all models that have the token."""
ZERO = -3
"""A row of zeros."""
PAD = -4
"""Padding, or an id without a token: the float64 mean of all rows of the model's re-indexed matrix that are not PAD."""

OMP = -5
"""A sparse sum of the model's own rows, its coefficients found in a donor's matrix: the donor j has the code OMP − j."""


@dataclass(frozen=True, slots=True, eq=False)
class RowPlan:
    """The re-indexed embedding (or head) of one model, row by row.

    Attributes:
        model: Which input this is.
        source: int64, shape (rows,): the input to read each row from (`model` itself or another), or a code above.
        row: int64, shape (rows,): the row in that input's matrix; for OMP the row in the donor's; -1 for the other codes.
        owners: int64, shape (inputs, rows): each input's own row for the token, -1 where it lacks it. MEAN rows are the
            mean over the inputs with a row here.
    """

    model: int
    source: IntArray
    row: IntArray
    owners: IntArray

    def __len__(self) -> int:
        return len(self.source)

    @property
    def needs_pad(self) -> bool:
        """Whether any row is PAD, so that the mean over the whole matrix must be known first."""
        return bool((self.source == PAD).any())

    @property
    def donors(self) -> tuple[int, ...]:
        """The inputs that must be read, `model` itself included where it gives rows."""
        if self.pursued:
            return tuple(sorted({self.model, *self.pursued, *self._without_pursuit().donors}))
        plain = set(np.unique(self.source[self.source >= 0]).tolist())
        means = self.owners[:, self.source == MEAN]
        return tuple(sorted(plain | set(np.flatnonzero((means >= 0).any(axis=1)).tolist())))

    @property
    def pursued(self) -> tuple[int, ...]:
        """The donors in whose matrices sparse sums are found."""
        return tuple(sorted((OMP - np.unique(self.source[self.source <= OMP])).tolist()))

    def _without_pursuit(self) -> RowPlan:
        keep = self.source > OMP
        return RowPlan(self.model, self.source[keep], self.row[keep], self.owners[:, keep])

    def anchors(self, donor: int) -> IntArray:
        """The tokens that this model and a donor share: int64, shape (tokens, 2), their rows in the two matrices."""
        both = self.owners[[self.model, donor]]
        return both[:, (both >= 0).all(axis=0)].T.copy()

    def tile(self, start: int, stop: int) -> RowPlan:
        """The same for the rows `start` to `stop` (views, nothing is copied)."""
        return RowPlan(self.model, self.source[start:stop], self.row[start:stop], self.owners[:, start:stop])

    def runs(self) -> IntArray:
        """Maximal runs of rows that are contiguous where they come from.

        Returns:
            int64, shape (runs, 4): start, stop, source, first row. Runs of a code have first row -1.
        """
        if len(self) == 0:
            return np.empty((0, 4), np.int64)
        step = np.where(self.source[1:] >= 0, 1, 0)
        breaks = (self.source[1:] != self.source[:-1]) | (self.row[1:] - self.row[:-1] != step)
        start = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        stop = np.append(start[1:], len(self))
        return np.stack((start, stop, self.source[start], self.row[start]), axis=1).astype(np.int64)

    def apply(self, matrices: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Re-index in memory.

        Args:
            matrices: Every input's matrix, shape (its rows, ...), the vocabulary along the first axis. Inputs that are
                not in `donors` are only looked at for the model's own shape and dtype.

        Returns:
            Shape (len(self), ...) in the dtype of the model's own matrix.

        Raises:
            ValueError: Rows are sparse sums, which `geomerge.engine.mixtures` finds.
        """
        if self.pursued:
            raise ValueError("sparse sums of rows are not made here")
        own = matrices[self.model]
        out = np.zeros((len(self), *own.shape[1:]), own.dtype)
        for k in np.unique(self.source[self.source >= 0]).tolist():
            rows = np.flatnonzero(self.source == k)
            out[rows] = matrices[k][self.row[rows]]
        averaged = np.flatnonzero(self.source == MEAN)
        if len(averaged):
            out[averaged] = self._means(averaged, matrices)
        padded = self.source == PAD
        if padded.any() and not padded.all():
            out[padded] = out[~padded].mean(axis=0, dtype=np.float64)
        return out

    def _means(self, rows: IntArray, matrices: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        total = np.zeros((len(rows), *matrices[self.model].shape[1:]), np.float64)
        for k, matrix in enumerate(matrices):
            has = self.owners[k, rows] >= 0
            total[has] += matrix[self.owners[k, rows[has]]]
        count = (self.owners[:, rows] >= 0).sum(axis=0)
        total /= count.reshape(-1, *(1,) * (total.ndim - 1))
        return total


@dataclass(frozen=True, slots=True, eq=False)
class TokenPlan:
    """What happens to the vocabulary in a merge.

    Attributes:
        size: Rows of the output's embedding and head.
        identity: Every input already has these rows in this order: nothing to re-index.
        models: The inputs' names, in their order.
        names: Shape (size,): each row's token; None for padding and for ids without a token.
        row_maps: int64, shape (inputs, size): each input's own row, -1 where the fallback is used.
        owner_rows: The same before rules with `force`: -1 only where the input lacks the token.
        fallback: int64, shape (size,): what an input without the token uses: another input's index, MEAN, ZERO, PAD or OMP − j.
        fallback_row: int64, shape (size,): the row in that input, or in OMP's donor; -1 for the other codes.
        tokenizer: The output's tokenizer, for `geomerge.tokens.write`.
        notes: What the user should know: rows cut or kept, tokens added or removed.
    """

    size: int
    identity: bool
    models: tuple[str, ...]
    names: tuple[str | None, ...]
    row_maps: IntArray
    owner_rows: IntArray
    fallback: IntArray
    fallback_row: IntArray
    tokenizer: OutputTokenizer
    notes: tuple[str, ...]

    def rows_for(self, k: int) -> RowPlan:
        """The row plan of input `k`."""
        own = self.row_maps[k]
        has = own >= 0
        return RowPlan(
            model=k,
            source=np.where(has, k, self.fallback),
            row=np.where(has, own, self.fallback_row),
            owners=self.owner_rows,
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Per input: how many rows are its own, borrowed from another input, means, zeros, sparse sums and padding."""
        table = {}
        nameless = np.array([name is None for name in self.names], dtype=bool)
        for k, name in enumerate(self.models):
            source = self.rows_for(k).source
            own = int((source == k).sum())
            pad = source == PAD
            table[name] = {
                "own": own,
                "borrowed": int((source >= 0).sum()) - own,
                "mean": int((source == MEAN).sum()) + int((pad & ~nameless).sum()),
                "zero": int((source == ZERO).sum()),
                "sum": int((source <= OMP).sum()),
                "padding": int((pad & nameless).sum()),
            }
        return table
