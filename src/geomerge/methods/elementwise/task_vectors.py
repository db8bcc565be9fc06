"""The common course of TIES, DARE, DELLA and Breadcrumbs: thin each task vector, combine them, scale, add to the base."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from geomerge.methods.base import Elementwise, parameter, per_model
from geomerge.methods.combine import cancelled, disjoint_merge, exactly, weighted_sum
from geomerge.methods.sparsify import MagPrune, Rescale, Sparsifier, measure
from geomerge.methods.tile import Scan, Tile


@dataclass(frozen=True)
class TaskVectors(Elementwise):
    """θ = θ₀ + λ·combine(sparsify(θₖ − θ₀), wₖ). Subclasses say how to sparsify, and whether signs are elected.

    Class attributes beside those of `Method`:
        elect: Whether signs are elected.
        chain: The same as a step and a method, as a recipe's `steps` write them.
    """

    elect: ClassVar[bool]
    chain: ClassVar[str]

    weight: tuple[float, ...] = per_model(doc="the task vector's factor")
    density: tuple[float, ...] = per_model(1.0, within=(0, 1), above=0, doc="share of the elements that is kept")
    normalize: bool = parameter(False, doc="divide by the weights that took part")
    rescale: bool = parameter(False, doc="make up for what was dropped")
    rescale_norm: str = parameter(
        "inverse", choices=("inverse", "l1"), doc="how: divide by the kept share, or keep the L1 norm (mergekit)"
    )
    lambda_: float = parameter(1.0, doc="factor of the merged task vector")

    def sparsifier(self) -> Sparsifier:
        """The first step."""
        raise NotImplementedError

    def merging(self) -> dict[str, bool]:
        """How what agrees on the elected sign is merged: arguments of `disjoint_merge`."""
        return {"normalize": self.normalize}

    @property
    def rescaling(self) -> Rescale:
        """The step's rescaling as the parameters ask for it."""
        return ("l1" if self.rescale_norm == "l1" else "inverse") if self.rescale else "none"

    @property
    def rows(self) -> bool:
        return self.sparsifier().rows

    def check(self, count: int, compat: str | None = None) -> None:
        if compat is None and self.normalize and not self.elect and abs(sum(self.weight)) < 1e-8:
            raise ValueError(f"the weights {list(self.weight)} sum to zero; set normalize: false or change them")

    @property
    def single(self) -> bool:
        return not isinstance(self.sparsifier(), MagPrune)

    def measure(self, scan: Scan) -> Any:
        return measure(self.sparsifier(), scan)

    def blend(self, tile: Tile, stats: Any) -> Tensor:
        step = self.sparsifier()
        found, factors = stats
        for k, delta in enumerate(tile.task_vectors()):
            step.keep_(delta, k, tile, found)
        deltas = tile.stack[1:]
        exact, limit = functools.partial(exactly, tile), cancelled(tile)
        if self.elect:
            options = {"factors": factors, "lambda_": self.lambda_} | self.merging()
            return disjoint_merge(tile.base, deltas, self.weight, exact, limit, **options)
        divisor = sum(self.weight)
        scale = self.lambda_ / divisor if self.normalize and abs(divisor) >= 1e-8 else self.lambda_
        coefficients = [scale * w * f for w, f in zip(self.weight, factors, strict=True)]
        return weighted_sum(tile.base, deltas, coefficients, exact, limit)
