"""PCB-Merging: parameters compete within a task and between tasks."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from geomerge.methods import native
from geomerge.methods.base import Elementwise, parameter, per_model
from geomerge.methods.combine import added
from geomerge.methods.functions import exp, tanh
from geomerge.methods.order import nth_smallest_of_all
from geomerge.methods.properties import BASE, PERMUTATION, SIGN
from geomerge.methods.registry import register
from geomerge.methods.sparsify import magnitudes
from geomerge.methods.tile import Loop, Place, Scan, Tile
from geomerge.methods.walk import Walk
from geomerge.methods.watched import watched

if TYPE_CHECKING:
    from torch import Tensor


_NOISE = 2.0**-45
"""Scores this near to the threshold, in terms of the largest, are equal to it but for rounding: the weights' division would
make something of that."""


_NARROW = 16
"""Where magnitudes are cut off at less apart than the larger over this, float32 does not tell them apart."""


def _noise(least: float, most: float) -> float:
    return _NOISE * max(abs(least), abs(most))


class Bounds(NamedTuple):
    """What PCB knows of the model, one number for each expert.

    Attributes:
        low, high: Where magnitudes are cut off.
        least, most: Scores from which an element counts, and the largest.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    least: tuple[float, ...] = ()
    most: tuple[float, ...] = ()


class _Contest:
    """The compiled loop over scores: for each expert one that counts, and then the largest."""

    def __init__(self, experts: ctypes.Array[native.Competitor]) -> None:
        self.experts = experts
        self.ranked = [*range(len(experts))] * 2

    def count(
        self, place: Place, brackets: dict[int, native.Bounds], starts: Sequence[int] = (0,), *, check: bool
    ) -> tuple[bool, dict[int, native.Counted]]:
        asked = [(self.ranked[i], bounds) for i, bounds in brackets.items()]
        inputs = place.scan.stored(place.start, place.numel)
        finite, counted = native.competition_survey(inputs, self.experts, asked, starts, check=check)
        return finite, dict(zip(brackets, counted, strict=True))


@register
@dataclass(frozen=True)
class Pcb(Elementwise):
    """Score every element by its size within its task and by its agreement with the other tasks; the best drop in, weighted.

    aₜ = clip(|τₜ|, low, high), uₜ = (aₜ − min)/(max − min), intra = exp(T·uₜ²). The inter-balancing comes in the three
    versions that the authors published: ``raw`` tanh(τₜ·Στₛ), ``normsum`` tanh(τₜ·Σ sgn(τₛ)uₛ), ``pair`` Σₛ tanh(νₜνₛ) with
    ν = sgn(τ)u, the only one that does not depend on the size of the task vectors. (The softmaxes of the paper's text are in
    none of them.)
    """

    name: ClassVar[str] = "pcb"
    aliases: ClassVar[tuple[str, ...]] = ("pcb_merging",)
    title: ClassVar[str] = "PCB-Merging (parameter competition balancing)"
    paper: ClassVar[str] = "Du et al. 2024, Parameter Competition Balancing for Model Merging, arXiv:2410.02396"
    formula: ClassVar[str] = "θ = θ₀ + λ · Σ wₜτ̃ₜ / Σ wₜ,  wₜ from the largest density of intraₜ · interₜ"
    when: ClassVar[str] = (
        "Several experts of one base whose weights compete; a stronger TIES that looks at the model three times."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SIGN})
    findings: ClassVar[tuple[type, ...]] = (Bounds,)
    recorded: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: pcb
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {density: 0.2}
dtype: bfloat16
"""

    density: float = parameter(0.2, within=(0, 1), above=0, doc="share of the elements that may count, for each expert")
    weight: tuple[float, ...] = per_model(1.0, doc="the task vector's factor in the sum")
    lambda_: float = parameter(1.0, doc="factor of the merged task vector")
    winsor: float = parameter(
        0.01, within=(0, 0.49), doc="share of the smallest and of the largest magnitudes that is cut off"
    )
    balance: str = parameter("raw", choices=("raw", "normsum", "pair"), doc="how tasks are balanced against each other")
    scope: str = parameter(
        "global", choices=("global", "tensor"), doc="what shares are shares of: the model, or each tensor"
    )

    @property
    def surveys(self) -> int:
        return 2 if self.scope == "global" else 0

    @property
    def surveyed_alike(self) -> Hashable:
        return self.density, self.winsor, self.balance

    def survey(self, walk: Walk) -> Bounds:
        d, experts = walk.numel, walk.experts
        if not d:
            return Bounds((0.0,) * experts, (0.0,) * experts, (0.0,) * experts, (0.0,) * experts)
        first = min(math.floor(d * self.winsor + 1e-9), d - 1)
        last = max(math.floor(d * (1 - self.winsor) + 1e-9) - 1, 0)

        def twice(tile: Tile) -> list[Tensor]:
            found = magnitudes(tile)
            return found + found

        found = nth_smallest_of_all(walk, twice, [first] * experts + [last] * experts, [*range(experts)] * 2)
        bounds = Bounds(tuple(found[:experts]), tuple(found[experts:]))
        rank = min(math.floor(d * (1 - self.density) + 1e-9), d - 1)

        def scores(tile: Tile) -> list[Tensor]:
            found = self._scores(tile.task_vectors(), bounds)
            return found + found

        found = nth_smallest_of_all(
            walk,
            scores,
            [rank] * experts + [d - 1] * experts,
            signed=True,
            recorded=True,
            loops=lambda scan: self._contest(scan, bounds),
        )
        return bounds._replace(least=tuple(found[:experts]), most=tuple(found[experts:]))

    def measure(self, scan: Scan) -> Any:
        if self.known is not None:
            return self.known
        return self.survey(Walk([lambda: scan], [scan.name], scan.numel, scan.experts))

    def blend(self, tile: Tile, stats: Bounds) -> Tensor:
        deltas = tile.task_vectors()
        total, divisor = [], []
        for k, score in enumerate(self._scores(deltas, stats)):
            least, most = stats.least[k], stats.most[k]
            if not most > least or not stats.high[k] > stats.low[k]:
                continue
            w = score.clamp_(least, most).sub_(least).hardshrink(_noise(least, most)).mul_(1 / (most - least))
            clipped = deltas[k].abs().clamp_(stats.low[k], stats.high[k]).mul_(deltas[k].sign())
            total.append(clipped.mul_(w).mul_(self.weight[k]))
            divisor.append(w)
        if not total:
            return tile.base
        return tile.base.add_(added(total).div_(added(divisor).clamp_(min=1e-12)), alpha=self.lambda_)

    def compiled(self, scan: Scan, stats: Bounds) -> Loop | None:
        contest = self._contest(scan, stats) if scan.compiled else None
        if contest is None or not any(each.counts for each in contest.experts):
            return None

        lambda_ = self.lambda_
        return watched(
            scan,
            lambda inputs, _, *where: native.competition(inputs, contest.experts, lambda_, *where, check=scan.checks),
        )

    def _contest(self, scan: Scan, bounds: Bounds) -> _Contest | None:
        """The loop of its own, where it is right: float32 is to tell what most scores are like."""
        plain = self.balance == "raw" and {source.dtype for source in scan.sources} == {"BF16"}
        apart = all(high <= _NARROW * (high - low) for low, high in zip(bounds.low, bounds.high, strict=True))
        if not plain or not apart or not 0 < scan.experts <= native.COMPETITORS:
            return None
        experts = (native.Competitor * scan.experts)()
        for k, each in enumerate(experts):
            each.low, each.high, each.weight = bounds.low[k], bounds.high[k], self.weight[k]
            if each.high > each.low:
                each.scale = 1 / (each.high - each.low)
            if bounds.least and bounds.most[k] > bounds.least[k] and each.scale:
                each.counts, each.least, each.most = 1, bounds.least[k], bounds.most[k]
                each.shrink, each.share = _noise(each.least, each.most), 1 / (each.most - each.least)
        return _Contest(experts)

    def _scores(self, deltas: tuple[Tensor, ...], bounds: Bounds) -> list[Tensor]:
        """intra · inter of each task vector, which stay as they are."""
        shares = []
        for k, delta in enumerate(deltas):
            low, high = bounds.low[k], bounds.high[k]
            magnitude = delta.abs().clamp_(low, high)
            shares.append(magnitude.sub_(low).mul_(1 / (high - low)) if high > low else magnitude.mul_(0.0))
        signed = [] if self.balance == "raw" else [delta.sign() * u for delta, u in zip(deltas, shares, strict=True)]
        if self.balance == "pair":
            inter = [added([tanh(v * other) for other in signed]) for v in signed]
        else:
            everything = added(signed or deltas)
            inter = [tanh(delta * everything) for delta in deltas]
        return [i.mul_(exp(u.square_().mul_(len(deltas)))) for i, u in zip(inter, shares, strict=True)]
