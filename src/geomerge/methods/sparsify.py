"""Steps that thin out task vectors: by magnitude, at random, at random by magnitude, or both ends cut off.

Each step is a frozen value with two functions: `measure` looks at a whole tensor in additive passes, `apply_` thins one
tile of one expert's task vector in place. A published method is a chain of such a step and a rule of combination.
"""

from __future__ import annotations

import abc
import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from geomerge.methods import native
from geomerge.methods.native import Pruning, Thinning
from geomerge.methods.order import largest, largest_of_all
from geomerge.methods.random import FINER, bernoulli, drawing, keep_, numbers_at
from geomerge.methods.selection import Selection, share
from geomerge.methods.tile import BLOCK, Place, Scan, Segment, Tile, added_up
from geomerge.methods.walk import Walk

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


Rescale = Literal["none", "inverse", "l1"]
"""What is done for the dropped elements: nothing; division by the kept share (unbiased, as in the papers); or
multiplication by ‖δ‖₁/‖δ⊙m‖₁ (mergekit)."""


class Sparsifier(Protocol):
    """A step on task vectors."""

    @property
    def rescale(self) -> Rescale:
        """What is done for the dropped elements."""

    @property
    def rows(self) -> bool:
        """Whether whole rows are needed."""

    def measure(self, scan: Scan) -> Any:
        """Statistics of the tensor, or `None`."""

    def keep_(self, delta: Tensor, k: int, tile: Tile, stats: Any) -> Tensor:
        """Drop elements of the k-th expert's task vector in place; what is kept stays as it is."""

    def inverse(self) -> list[float]:
        """For each expert the factor that makes the thinned task vector unbiased."""


class Thins(abc.ABC):
    """A step that compiled loops know."""

    @abc.abstractmethod
    def thin(self, into: Thinning, k: int, place: Place, stats: Any) -> None:
        """Say what `keep_` drops at a place; `into` is the same for all places of a segment."""


def measure(step: Sparsifier, scan: Scan) -> tuple[Any, list[float]]:
    """A step's statistics, and the factor that makes up for what it drops of each expert: ``(stats, factors)``."""
    stats = step.measure(scan)
    if step.rescale == "inverse":
        return stats, step.inverse()
    if step.rescale == "none":
        return stats, [1.0] * scan.experts

    sums = _norms(step, scan, stats) if scan.numel else [0.0] * (2 * scan.experts)
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return stats, [before / after if before > 1e-7 and after > 1e-7 else 1.0 for before, after in pairs]


def _norms(step: Sparsifier, scan: Scan, stats: Any) -> list[float]:
    """Of each expert ‖δ‖₁ and ‖δ⊙m‖₁."""
    if isinstance(step, Thins | MagPrune) and scan.compiled and (scan.columns or 0) <= native.ROW:
        return added_up(part for segment in scan.over_segments(_counted(step, scan, stats)) for part in segment)

    def norms(tile: Tile) -> list[Tensor]:
        found = []
        for k, delta in enumerate(tile.task_vectors()):
            found.append(delta.abs())
            found.append(step.keep_(delta, k, tile, stats).abs_())
        return found

    return scan.sums(norms)


def _counted(step: Thins | MagPrune, scan: Scan, stats: Any) -> Callable[[Segment], list[list[list[float]]]]:
    """What compiled loops add up of a segment."""

    def counted(segment: Segment) -> list[list[list[float]]]:
        found = []
        for place in scan.places(segment):
            inputs = scan.stored(place.start, place.numel)
            thinned = place.carry.setdefault("thinned", native.whole(scan.experts))
            if isinstance(step, MagPrune):
                columns = max(scan.columns or 1, 1)
                pruned = step.prunings(thinned, place)
                finite, sums = native.pruned_norms(inputs, place.start, columns, thinned, pruned, check=scan.checks)
            else:
                for k, each in enumerate(thinned):
                    step.thin(each, k, place, stats)
                finite, sums = native.norms(inputs, BLOCK, thinned, single=scan.single, check=scan.checks)
            if not finite:
                scan.look_again(place.start, place.numel)
            found.append(sums.tolist())
        return found

    return counted


def _inverse(density: Sequence[float]) -> list[float]:
    return [1 / d if d > 0 else 1.0 for d in density]


def kept(density: float, n: int, *, binary: bool = False) -> int:
    """The same of a density: at least 1 element, and at most all."""
    return min(max(share(density, n, binary=binary), 1 if density > 0 else 0), n)


@dataclass(frozen=True)
class Everything(Thins):
    """No sparsification."""

    rescale: Rescale = "none"
    rows: bool = False

    def measure(self, scan: Scan) -> None:
        return None

    def keep_(self, delta: Tensor, k: int, tile: Tile, stats: Any) -> Tensor:
        return delta

    def thin(self, into: Thinning, k: int, place: Place, stats: Any) -> None:
        pass

    def inverse(self) -> list[float]:
        raise ValueError("nothing was dropped")


TOP_K = ("exact_k", "binary_k", "kth_inclusive", "mask_rate_inclusive")
"""What a density keeps exactly: see `Magnitude`."""


@dataclass(frozen=True)
class Magnitude(Thins):
    """The largest magnitudes of each tensor, or of the whole model.

    Attributes:
        density: The share that is kept.
        top_k: ``exact_k``: ⌊density·n⌋ elements, among equals the lowest index. ``binary_k``: the same as binary fractions
            have it (mergekit). ``kth_inclusive`` (the TIES authors'): all that
            are at least the (n − ⌊density·n⌋)-th smallest. ``mask_rate_inclusive`` (MergeLM's): all that are at least the
            ⌊(1 − density)·n⌋-th smallest. 1-based; a rank of 0 keeps everything.
        known: The selections by tensor, where they were made over the whole model.
    """

    density: Sequence[float]
    rescale: Rescale = "none"
    rows: bool = False
    top_k: str = "exact_k"
    known: Mapping[str, list[Selection]] | None = None

    def measure(self, scan: Scan) -> list[Selection]:
        if self.known is not None:
            return self.known[scan.name]
        found = largest(scan, magnitudes, self.counts(scan.numel), range(scan.experts))
        return [s.with_equals() for s in found] if self._inclusive else found

    def survey(self, walk: Walk) -> dict[str, list[Selection]]:
        """The selections over all tensors together, by tensor."""
        found = largest_of_all(walk, magnitudes, self.counts(walk.numel), range(walk.experts))
        if not self._inclusive:
            return found
        return {name: [s.with_equals() for s in selections] for name, selections in found.items()}

    @property
    def _inclusive(self) -> bool:
        return self.top_k.endswith("inclusive")

    def counts(self, n: int) -> list[int]:
        """How many of n elements are kept of each expert, equals of the last one aside."""
        if self.top_k == "kth_inclusive":
            return [min(math.floor(d * n + 1e-9) + 1, n) for d in self.density]
        if self.top_k == "mask_rate_inclusive":
            return [min(n - math.floor((1 - d) * n + 1e-9) + 1, n) for d in self.density]
        return [kept(d, n, binary=self.top_k == "binary_k") for d in self.density]

    def keep_(self, delta: Tensor, k: int, tile: Tile, stats: list[Selection]) -> Tensor:
        return stats[k].shrink_(delta, tile, k)

    def thin(self, into: Thinning, k: int, place: Place, stats: list[Selection]) -> None:
        if place.start == place.scan.segments[place.segment].start:
            into.keep, into.equal, into.left = stats[k].limits(place)

    def inverse(self) -> list[float]:
        return _inverse(self.density)


def magnitudes(tile: Tile) -> list[Tensor]:
    """|τ| of each expert, in place of the inputs."""
    return [d.abs_() for d in tile.task_vectors()]


@dataclass(frozen=True)
class Random(Thins):
    """Each element survives with probability `density`, independently (DARE)."""

    density: Sequence[float]
    rescale: Rescale = "inverse"
    rows: bool = False

    def measure(self, scan: Scan) -> None:
        return None

    def keep_(self, delta: Tensor, k: int, tile: Tile, stats: None) -> Tensor:
        density = self.density[k]
        if density >= 1:
            return delta
        if density <= 0:
            return delta.zero_()
        return keep_(delta, tile, f"dare/{k}", density)

    def thin(self, into: Thinning, k: int, place: Place, stats: None) -> None:
        density = self.density[k]
        if density >= 1:
            return
        if density <= 0:
            into.keep = math.inf
            return
        # The loop goes on by itself from the first place of a segment to the next.
        if place.start == place.scan.segments[place.segment].start:
            into.draw(*drawing(place, f"dare/{k}", density))

    def inverse(self) -> list[float]:
        return _inverse(self.density)


@dataclass(frozen=True)
class _Ends:
    """The ⌊density·n⌋ largest magnitudes of n after the ⌊gamma·n⌋ very largest are taken away (Breadcrumbs).

    Where the two do not go together (density + gamma > 1), all that is left after the outliers is kept. With `yielding`
    the outliers give way instead, as in mergekit: ⌊density·n⌋ elements are kept whatever gamma says.
    """

    density: Sequence[float]
    gamma: Sequence[float]
    yielding: bool = False
    rescale: Rescale = "none"
    binary: bool = False

    def ends(self, k: int, n: int) -> tuple[int, int]:
        """Of n elements of an expert by descending magnitude, which are kept: from the one rank up to the other."""
        first, count = (share(part[k], n, binary=self.binary) for part in (self.gamma, self.density))
        if self.yielding:
            first = min(first, n - count)
        return first, min(first + count, n)

    def inverse(self) -> list[float]:
        return _inverse(self.density)


@dataclass(frozen=True)
class Outliers(_Ends, Thins):
    """Both ends of each tensor."""

    rows: bool = False

    def measure(self, scan: Scan) -> list[Selection]:
        top, both = zip(*(self.ends(k, scan.numel) for k in range(scan.experts)), strict=True)

        def twice(tile: Tile) -> list[Tensor]:
            found = magnitudes(tile)
            return found + found

        return largest(scan, twice, [*top, *both], [*range(scan.experts)] * 2)

    def keep_(self, delta: Tensor, k: int, tile: Tile, stats: list[Selection]) -> Tensor:
        outliers = stats[k].shrink_(delta.clone(), tile, ("top", k))
        stats[len(self.density) + k].shrink_(delta, tile, ("both", k))
        return delta.sub_(outliers)

    def thin(self, into: Thinning, k: int, place: Place, stats: list[Selection]) -> None:
        if place.start == place.scan.segments[place.segment].start:
            into.drop, into.drop_equal, into.drop_left = stats[k].limits(place)
            into.keep, into.equal, into.left = stats[len(self.density) + k].limits(place)


@dataclass(frozen=True)
class RowOutliers(_Ends):
    """Both ends of each row, that is of each slice along the last dimension."""

    rows: bool = True

    def measure(self, scan: Scan) -> None:
        return None

    def keep_(self, delta: Tensor, k: int, tile: Tile, stats: None) -> Tensor:
        if not tile.scan.shape:  # a single number is no row
            return delta
        first, last = self.ends(k, delta.shape[-1])
        ascending = _ascending(delta.abs().flip(-1))  # so that of equal magnitudes the first columns are the largest
        descending = (delta.shape[-1] - 1 - ascending).flip(-1)
        return delta.mul_(torch.zeros_like(delta).scatter_(-1, descending[:, first:last], 1.0))


@dataclass(frozen=True)
class MagPrune:
    """Each element survives with a probability that rises with its rank in its row (DELLA).

    q = (density − ε) + 2ε·rank/(n − 1), ranks ascending in |δ|, equal magnitudes by index; a row of one element has
    q = density. ``inverse`` divides each survivor by its own q (so what is kept does not stay as it is).
    """

    density: Sequence[float]
    epsilon: Sequence[float]
    rescale: Rescale = "inverse"
    rows: bool = True

    def measure(self, scan: Scan) -> None:
        return None

    def line(self, k: int, n: int) -> tuple[float, float]:
        """The keep probability of the smallest element of a row of n, and how much that of the next is larger."""
        density, epsilon = self.density[k], self.epsilon[k]
        return (density, 0.0) if n == 1 else (density - epsilon, 2 * epsilon / (n - 1))

    def by_rank(self, k: int, n: int) -> NDArray[np.float64]:
        """The keep probabilities of a row of n elements, by ascending rank."""
        start, step = self.line(k, n)
        return np.arange(n, dtype=np.float64) * step + start

    def probabilities(self, delta: Tensor, k: int) -> Tensor:
        """The keep probabilities of one tile's rows: shape ``(rows, columns)``."""
        steps = torch.from_numpy(self.by_rank(k, delta.shape[-1])).to(delta)
        return torch.empty_like(delta).scatter_(-1, _ascending(delta.abs()), steps.expand_as(delta))

    def prunings(self, thinned: ctypes.Array[Thinning], place: Place) -> ctypes.Array[Pruning]:
        """What `keep_` drops of each task vector from a place on, for a compiled loop."""
        found = (Pruning * len(thinned))()
        for k, (thinning, pruning) in enumerate(zip(thinned, found, strict=True)):
            self._prune(thinning, pruning, k, place)
        return found

    def _prune(self, thinning: Thinning, pruning: Pruning, k: int, place: Place) -> None:
        if self.density[k] >= 1:
            return
        if self.density[k] <= 0:
            thinning.keep = math.inf
            return
        pruning.start, pruning.step = self.line(k, max(place.scan.columns or 1, 1))
        pruning.rescale = self.rescale == "inverse"
        label = f"della/{k}"
        pruning.finer[:] = numbers_at(place, FINER + label, 0)
        thinning.draw(numbers_at(place, label, place.start // 4), 16)

    def keep_(self, delta: Tensor, k: int, tile: Tile, stats: None) -> Tensor:
        if self.density[k] >= 1:
            return delta
        if self.density[k] <= 0:
            return delta.zero_()
        q = self.probabilities(delta, k)
        delta.mul_(bernoulli(tile, f"della/{k}", q))
        return delta.div_(q) if self.rescale == "inverse" else delta

    def inverse(self) -> list[float]:
        return [1.0] * len(self.density)


def _ascending(magnitudes: Tensor) -> Tensor:
    """The columns of each row in ascending order of their magnitudes, equal ones by index: shape ``(rows, columns)``.

    Magnitudes that float32 holds (those of 16-bit models) are sorted together with their columns as one integer, several times
    faster than their order alone is found: the bits of a non-negative float are in the order of the values.
    """
    single = magnitudes.to(torch.float32)
    if magnitudes.device.type != "cpu" or not torch.equal(single.to(magnitudes.dtype), magnitudes):
        return magnitudes.argsort(dim=-1, stable=True)
    columns = torch.arange(magnitudes.shape[-1])
    packed = ((single + 0.0).view(torch.int32).to(torch.int64) << 32 | columns).numpy()
    packed.sort(axis=-1)
    return torch.from_numpy(packed & 0xFFFFFFFF)
