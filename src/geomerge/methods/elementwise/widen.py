"""WIDEN: weights for every column of every expert, by how much its magnitude and its direction have changed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from geomerge.methods import gram, native
from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.combine import added
from geomerge.methods.functions import exp
from geomerge.methods.gram import Gram
from geomerge.methods.properties import BASE, PERMUTATION, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_TOKENS = re.compile(r"(?:^|\.)(?:embed_tokens\w*|(?:word|tok|token)_embeddings?|wte|embed_in|shared)\.weight$")
"""Matrices whose rows are tokens."""


@dataclass(frozen=True)
class Scores:
    """What was measured of a tensor.

    Attributes:
        weights: w of each expert and slice, shape ``(T, slices)``; `None` for a tensor that is no matrix.
        run: Elements that follow each other and belong to one slice: 1, where slices are columns.
        averages: For a tensor that is no matrix: the mean of |τ| of each expert.
    """

    weights: NDArray[np.float64] | None = None
    run: int = 1
    averages: tuple[float, ...] = ()


@register
@dataclass(frozen=True)
class Widen(Elementwise):
    """Disentangle each column into magnitude and direction, and weigh the experts by the ranks of their changes.

    A column W_j (an input feature; a token in an embedding) changes by ΔM_j = |‖W_tj‖ − ‖W_0j‖| and ΔD_j = 1 − cos(W_tj, W_0j).
    Within each expert the columns are ranked by either, R = rank/n from 0 to (n − 1)/n, and across the experts R goes through a
    softmax. A column whose R is above `above_average_ratio` times the mean gets `score_calibration` instead. Its weight is the
    mean of its two scores. The weights of a column add up to anything between 1 and the number of experts: two that matter
    there are both heard in full. Vectors (and whatever else is no matrix) are scored element by element, by |τ| itself, so
    that they alone do not scale with the models.

    In the authors' code rounding decides whether the column in the very middle is above the mean; here it is not. A column of
    zeros has changed its direction by 0. Angles come from the differences to the base, so that small ones are not noise.
    """

    name: ClassVar[str] = "widen"
    title: ClassVar[str] = "WIDEN (weight disentanglement)"
    paper: ClassVar[str] = (
        "Yu et al. 2024, Extend Model Merging from Fine-Tuned to Pre-Trained LLMs via Weight Disentanglement, arXiv:2408.03092"
    )
    formula: ClassVar[str] = "θ_j = θ₀_j + Σ_t ½(S^M_tj + S^D_tj) τ_tj,  S = softmax_t(R), or s where R > t·mean R"
    when: ClassVar[str] = (
        "A model that was trained far from the base (continued pre-training, another language) with fine-tunes of the base. "
        "All models need the same vocabulary: see the recipe's `tokenizer`."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE})
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: widen
base_model: ./base
models: [{model: ./chat}, {model: ./sailor}]
parameters: {above_average_ratio: 1.0, score_calibration: 1.0}
dtype: bfloat16
"""

    above_average_ratio: float = parameter(
        1.0, within=(0, math.inf), doc="t: how far above the mean a change must rank"
    )
    score_calibration: float = parameter(1.0, doc="s: the score of a change that ranks above")
    slices: str = parameter(
        "auto",
        choices=("auto", "columns", "rows"),
        doc="what is weighed in a matrix; auto: rows (the tokens) in token embeddings, columns in all others",
    )

    @property
    def rows(self) -> bool:
        return True

    def measure(self, scan: Scan) -> Scores:
        if len(scan.shape) != 2 or not scan.numel:
            totals = (
                scan.sums(lambda tile: [d.abs_() for d in tile.task_vectors()], recorded=True)
                if scan.numel
                else [0.0] * scan.experts
            )
            return Scores(averages=tuple(total / max(scan.numel, 1) for total in totals))
        rows = self.slices == "rows" or (self.slices == "auto" and _TOKENS.search(scan.name) is not None)
        measured = gram.by_rows(scan) if rows else gram.measure(scan, "column")
        experts = range(1, measured.count)
        magnitude = self._scores(np.stack([_change_of_norm(measured, t) for t in experts]))
        direction = self._scores(np.stack([measured.angle(0, t) for t in experts]))
        return Scores((magnitude + direction) / 2, max(scan.shape[1], 1) if rows else 1)

    def _scores(self, changes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scores of changes: shape ``(T, slices)`` → ``(T, slices)``."""
        n = changes.shape[1]
        ranks = np.stack([_ranks(row) for row in changes])
        powers = np.exp(ranks / n)
        scores = powers / powers.sum(0)
        # R's mean is (n − 1)/2n: compared as whole numbers, the middle one is not above it.
        above = 2 * ranks > self.above_average_ratio * (n - 1)
        return np.where(above, self.score_calibration, scores)

    def blend(self, tile: Tile, stats: Scores) -> Tensor:
        deltas = tile.task_vectors()
        if stats.weights is None:
            return self._blend_elements(tile, deltas, stats.averages)
        for weights, delta in zip(stats.weights, deltas, strict=True):
            tile.base.addcmul_(delta, tile.along(weights, stats.run))
        return tile.base

    def _blend_elements(self, tile: Tile, deltas: tuple[Tensor, ...], averages: tuple[float, ...]) -> Tensor:
        sizes = [delta.abs() for delta in deltas]
        largest = sizes[0]
        for size in sizes[1:]:
            largest = largest.maximum(size)
        powers = [exp(size - largest) for size in sizes]
        total = added(powers)
        for power, size, average, delta in zip(powers, sizes, averages, deltas, strict=True):
            above = size.gt(self.above_average_ratio * average)
            tile.base.addcmul_(delta, (power / total).masked_fill(above, self.score_calibration))
        return tile.base


def _ranks(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Places in ascending order, equal values by index: shape ``(n,)`` → ``(n,)``."""
    if native.available():
        return native.ranks(values)
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


def _change_of_norm(measured: Gram, t: int) -> NDArray[np.float64]:
    """|‖x_t‖ − ‖x₀‖| of every slice, from ‖x_t‖² − ‖x₀‖² = 2⟨x₀, δ⟩ + ‖δ‖², which keeps small changes exact."""
    both = measured.norm(0) + measured.norm(t)
    squares = np.abs(2 * measured.centred[:, 0, t] + measured.centred[:, t, t])
    return np.asarray(np.divide(squares, both, out=np.zeros_like(both), where=both > 0))
