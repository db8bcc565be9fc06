"""The common course of TIES, DARE, DELLA and Breadcrumbs: thin each task vector, combine them, scale, add to the base."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from geomerge.methods import native
from geomerge.methods.base import Elementwise, parameter, per_model
from geomerge.methods.combine import cancelled, disjoint_merge, exactly, weighted_sum
from geomerge.methods.rescaling import Rescaling
from geomerge.methods.sparsify import Magnitude, MagPrune, Outliers, Sparsifier, Thins, measure
from geomerge.methods.tile import Loop, Place, Scan, Tile
from geomerge.methods.watched import watched

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TaskVectors(Rescaling, Elementwise):
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
    rescale: bool = parameter(False, doc="make up for what was dropped; `l1`: with that as `rescale_norm`")
    rescale_norm: str = parameter(
        "inverse", choices=("inverse", "l1"), doc="how: divide by the kept share, or keep the L1 norm (mergekit)"
    )
    lambda_: float = parameter(1.0, doc="factor of the merged task vector")

    def sparsifier(self) -> Sparsifier:
        """The first step."""
        raise NotImplementedError

    def merging(self) -> dict[str, Any]:
        """How what agrees on the elected sign is merged: arguments of `disjoint_merge`."""
        return {"normalize": self.normalize}

    @property
    def rows(self) -> bool:
        return self.sparsifier().rows

    @property
    def loops(self) -> bool:
        merging = self.merging()
        return (
            isinstance(self.sparsifier(), Thins | MagPrune) and not merging.get("furthest") and merging.get("tie") != 0
        )

    def check(self, count: int, compat: str | None = None) -> None:
        if compat is None and self.normalize and not self.elect and abs(sum(self.weight)) < 1e-8:
            raise ValueError(f"the weights {list(self.weight)} sum to zero; set normalize: false or change them")

    @property
    def single(self) -> bool:
        return not self.sparsifier().rows

    @property
    def looks(self) -> bool:
        step = self.sparsifier()
        return isinstance(step, Magnitude | Outliers) or step.rescale == "l1"

    def measure(self, scan: Scan) -> Any:
        return measure(self.sparsifier(), scan)

    def blend(self, tile: Tile, stats: Any) -> Tensor:
        step = self.sparsifier()
        found, factors = stats
        for k, delta in enumerate(tile.task_vectors()):
            step.keep_(delta, k, tile, found)
        deltas = tile.stack[1:]
        exact, limit = functools.partial(exactly, tile), cancelled(tile.scan)
        if self.elect:
            options = {"factors": factors, "lambda_": self.lambda_} | self.merging()
            return disjoint_merge(tile.base, deltas, self.weight, exact, limit, **options)
        return weighted_sum(tile.base, deltas, self._coefficients(factors), exact, limit)

    def _coefficients(self, factors: Sequence[float]) -> list[float]:
        """Of the weighted sum."""
        divisor = sum(self.weight)
        scale = self.lambda_ / divisor if self.normalize and abs(divisor) >= 1e-8 else self.lambda_
        return [scale * w * f for w, f in zip(self.weight, factors, strict=True)]

    def compiled(self, scan: Scan, stats: Any) -> Loop | None:
        step, options = self.sparsifier(), self.merging()
        if not self.loops or (scan.columns or 0) > native.ROW:
            return None
        found, factors = stats
        coefficients = [w * f for w, f in zip(self.weight, factors, strict=True)]
        rule = native.Combination(
            elect=self.elect,
            coefficients=coefficients if self.elect else self._coefficients(factors),
            weights=self.weight,
            normalize=options["normalize"],
            lambda_=self.lambda_,
            tie=options.get("tie", 1.0),
        )
        limit = cancelled(scan)

        def thin(inputs: native.Inputs, place: Place, out: native.Stored, beginning: native.Doubles | None) -> bool:
            thinned = place.carry.setdefault("thinned", native.whole(scan.experts))
            if isinstance(step, MagPrune):
                pruned = step.prunings(thinned, place)
                columns = max(scan.columns or 1, 1)
                return native.pruned(
                    inputs, place.start, columns, thinned, pruned, rule, out, beginning, check=scan.checks
                )
            assert isinstance(step, Thins)
            for k, each in enumerate(thinned):
                step.thin(each, k, place, found)
            return native.task_vectors(
                inputs, thinned, rule, out, single=scan.single, limit=limit, check=scan.checks, beginning=beginning
            )

        return watched(scan, thin)
