"""Row plans: where each row of a model's re-indexed embedding comes from, as arrays that an engine can stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from geomerge.tokens.write import OutputTokenizer

IntArray = npt.NDArray[np.int64]

MEAN = -2
"""The float64 mean of the rows of all models that have the token."""
ZERO = -3
"""A row of zeros."""
PAD = -4
"""Padding, or an id without a token: the float64 mean of all rows of the model's re-indexed matrix that are not PAD."""


@dataclass(frozen=True, slots=True, eq=False)
class RowPlan:
    """The re-indexed embedding (or head) of one model, row by row.

    Attributes:
        model: Which input this is.
        source: int64, shape (rows,): the input to read each row from (`model` itself or another), or MEAN, ZERO or PAD.
        row: int64, shape (rows,): the row in that input's matrix; -1 where `source` is a code.
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
        plain = set(np.unique(self.source[self.source >= 0]).tolist())
        means = self.owners[:, self.source == MEAN]
        return tuple(sorted(plain | set(np.flatnonzero((means >= 0).any(axis=1)).tolist())))

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

    def apply(self, matrices: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Re-index in memory.

        Args:
            matrices: Every input's matrix, shape (its rows, ...), the vocabulary along the first axis. Inputs that are
                not in `donors` are only looked at for the model's own shape and dtype.

        Returns:
            Shape (len(self), ...) in the dtype of the model's own matrix.
        """
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

    def _means(self, rows: IntArray, matrices: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
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
        fallback: int64, shape (size,): what an input without the token uses: another input's index, MEAN, ZERO or PAD.
        fallback_row: int64, shape (size,): the row in that input; -1 for the codes.
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
        """Per input: how many rows are its own, borrowed from another input, means, zeros and padding."""
        table = {}
        for k, name in enumerate(self.models):
            source = self.rows_for(k).source
            named = {"mean": MEAN, "zero": ZERO, "padding": PAD}
            own = int((source == k).sum())
            table[name] = {"own": own, "borrowed": int((source >= 0).sum()) - own}
            table[name] |= {word: int((source == code).sum()) for word, code in named.items()}
        return table
