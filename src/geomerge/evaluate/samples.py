"""The per-sample outcomes of one model on one task: all that a score and its statistics are made from.

Every score here is built in one way: each column is a ratio of sums over the samples, is rescaled so that its baseline
becomes 0, and the columns' mean is the score (or the exponential of it):

    rᶜ = Σᵢ wᵢᶜ·vᵢᶜ / Σᵢ wᵢᶜ      sᶜ = max(0, (rᶜ − bᶜ) / (1 − bᶜ)) where bᶜ > 0, else rᶜ      score = link(meanᶜ sᶜ)

An accuracy is one column with weights 1; a perplexity one column of nats, weighted by tokens, with ``link="exp"``; BBH has
a column for each of its sub-tasks. Resampling the rows resamples the score.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from geomerge.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Link = Literal["mean", "exp"]


@dataclass(frozen=True, eq=False)
class Samples:
    """Outcomes of one model on one task.

    Attributes:
        values: ``(samples, columns)`` float64: each sample's outcome. In nats where `link` is ``"exp"``.
        weights: ``(samples, columns)`` float64: 0 where a sample does not belong to a column.
        strata: ``(samples,)``: the part of the task (a sub-task) that each sample belongs to; resampled each by itself.
        baselines: ``(columns,)``: what guessing gets, subtracted and rescaled; 0 leaves a column as it is.
        link: ``"mean"`` or ``"exp"``.
        hashes: One for each sample, of what the model was asked: two models' samples are paired only when these agree.
    """

    values: NDArray[np.float64]
    weights: NDArray[np.float64]
    strata: NDArray[np.int64]
    baselines: NDArray[np.float64]
    link: Link
    hashes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        values: ArrayLike,
        hashes: Iterable[str],
        *,
        weights: ArrayLike | None = None,
        strata: ArrayLike | None = None,
        baselines: Sequence[float] | None = None,
        link: Link = "mean",
    ) -> Samples:
        """Samples from anything like arrays; one column when `values` has one dimension.

        Raises:
            RunError: There are none, or the arrays do not fit each other.
        """
        made = np.asarray(values, np.float64)
        made = made[:, None] if made.ndim == 1 else made
        weight = np.ones_like(made) if weights is None else np.asarray(weights, np.float64).reshape(made.shape)
        parts = np.zeros(len(made), np.int64) if strata is None else np.asarray(strata, np.int64)
        base = np.zeros(made.shape[1]) if baselines is None else np.asarray(baselines, np.float64)
        names = tuple(hashes)
        if not len(made):
            raise RunError("the task has no samples")
        if not len(names) == len(parts) == len(made) or len(base) != made.shape[1]:
            raise RunError(f"{len(made)} values, {len(names)} hashes and {len(parts)} strata do not fit each other")
        return cls(made, weight, parts, base, link, names)

    def __len__(self) -> int:
        return len(self.values)

    @functools.cached_property
    def sample_hash(self) -> str:
        """One hash of all samples in their order."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()[:16]

    @functools.cached_property
    def binary(self) -> bool:
        """Whether this is a plain share of right answers: zeros and ones in one column, all counting the same.

        A single value is not: it may be the mean that a user's function returned.
        """
        plain = len(self) > 1 and self.values.shape[1] == 1 and self.link == "mean" and not self.baselines.any()
        return plain and bool((self.weights == 1).all() and np.isin(self.values, (0.0, 1.0)).all())

    @functools.cached_property
    def parts(self) -> tuple[NDArray[np.int64], ...]:
        """The rows of each stratum."""
        return tuple(np.flatnonzero(self.strata == part) for part in np.unique(self.strata))

    @functools.cached_property
    def _columns(self) -> tuple[NDArray[np.int64], ...]:
        """The columns that each stratum's samples count in."""
        return tuple(np.flatnonzero(self.weights[rows].any(axis=0)) for rows in self.parts)

    def score(self) -> float:
        """The score of all samples."""
        return float(self.resampled(self.parts))

    def resampled(self, rows: Sequence[NDArray[np.int64]]) -> Any:
        """The score of chosen samples.

        Args:
            rows: For each of `parts` the indices of rows, ``(..., chosen)``; the leading axes are resamples.

        Returns:
            An array of the leading axes' shape.
        """
        lead = rows[0].shape[:-1]
        sums = np.zeros((*lead, self.values.shape[1]))
        totals = np.zeros_like(sums)
        for chosen, columns in zip(rows, self._columns):
            for column in columns:
                weight = self.weights[:, column]
                sums[..., column] += (self.values[:, column] * weight)[chosen].sum(-1)
                totals[..., column] += weight[chosen].sum(-1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratio = sums / totals
            above = np.maximum((ratio - self.baselines) / (1 - self.baselines), 0)
            # A NaN stays one: maximum() hands it through.
            mean = np.where(self.baselines > 0, above, ratio).mean(-1)
            return np.exp(mean) if self.link == "exp" else mean


def hash_text(*texts: str) -> str:
    """A short hash of what a sample is."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]
