"""The steps before a method: they thin every expert's task vector. How they are carried out: see `geomerge.methods.chain`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from geomerge.errors import UsageError, did_you_mean
from geomerge.methods.base import parameter, per_model
from geomerge.methods.chain import Piece, Shape, Step
from geomerge.methods.kernel import Once, Open
from geomerge.methods.linalg import one_thread, truncate
from geomerge.methods.order import placed
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN
from geomerge.methods.rescaling import Rescaling
from geomerge.methods.rest import is_matrix
from geomerge.methods.selection import Selection
from geomerge.methods.sparsify import Magnitude, MagPrune, Outliers, Random, RowOutliers, Sparsifier, measure
from geomerge.methods.tile import Scan, Tile
from geomerge.methods.walk import whole

if TYPE_CHECKING:
    from torch import Tensor


def example(step: str, method: str = "ties", more: str = "") -> str:
    """A recipe with one step."""
    return f"""\
merge_method: {method}
base_model: ./base
models:
  - {{model: ./chat}}
  - {{model: ./code}}
steps:
  - {step}
{more}dtype: bfloat16
"""


@dataclass(frozen=True)
class _Sparse(Rescaling, Step):
    """A step of `geomerge.methods.sparsify`."""

    density: tuple[float, ...] = per_model(within=(0, 1), above=0, doc="share of the elements that is kept")
    rescale: bool = parameter(False, doc="make up for what was dropped; `l1`: with that as `rescale_norm`")
    rescale_norm: str = parameter(
        "inverse", choices=("inverse", "l1"), doc="how: divide by the kept share, or keep the L1 norm (mergekit)"
    )
    mergekit: ClassVar[dict[str, Any]] = {"rescale_norm": "l1"}

    @property
    def idle(self) -> bool:
        return min(self.density) >= 1

    @property
    def free(self) -> bool:
        return isinstance(self.sparsifier(), Random | MagPrune) and self.rescaling != "l1"

    def sparsifier(self) -> Sparsifier:
        raise NotImplementedError

    def bind(self, open_scan: Open, shape: Shape) -> Piece:
        step = self.sparsifier()
        columns = max(shape[-1] if len(shape) > 1 else _numel(shape), 1) if step.rows else None
        scan = open_scan(columns=columns)
        stats, factors = measure(step, scan)
        if isinstance(stats, list):  # selections: the pieces will come in any order
            stats = _placed(scan, stats)
        return _SparsePiece(step, stats, factors, columns)


class _SparsePiece(Piece):
    def __init__(self, step: Sparsifier, stats: Any, factors: Sequence[float], columns: int | None) -> None:
        self._step, self._stats, self._factors, self.columns = step, stats, factors, columns

    def thin_(self, tile: Tile) -> None:
        for k, (delta, factor) in enumerate(zip(tile.task_vectors(), self._factors, strict=True)):
            self._step.keep_(delta, k, tile, self._stats)
            if factor != 1.0:
                delta.mul_(factor)


def _placed(scan: Scan, selections: list[Selection]) -> list[Selection]:
    """Selections of all experts, one or several of each after the other, with the places of their last elements."""
    times = len(selections) // scan.experts

    def magnitudes(tile: Tile) -> list[Tensor]:
        return [d.abs_() for d in tile.task_vectors()] * times

    return placed(scan, magnitudes, selections)


def _numel(shape: Shape) -> int:
    return math.prod(shape)


@dataclass(frozen=True)
class Trim(_Sparse):
    """Keep each task vector's largest magnitudes (the first step of TIES)."""

    name: ClassVar[str] = "trim"
    aliases: ClassVar[tuple[str, ...]] = ("magnitude",)
    title: ClassVar[str] = "Trim (a step: the largest magnitudes)"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708"
    formula: ClassVar[str] = "τ̂ = τ ⊙ m,  mᵢ = 1 for the density·n largest |τᵢ|"
    when: ClassVar[str] = "Before a method that takes all elements, when most of a fine-tune's small changes are noise."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN})
    example: ClassVar[str] = example("trim: 0.2", "sce")

    top_k: str = parameter(
        "exact_k",
        choices=("exact_k", "kth_inclusive", "mask_rate_inclusive"),
        doc="what density keeps exactly: that share, or one of the two rules of published code, which keep all equals",
    )

    def sparsifier(self) -> Sparsifier:
        return Magnitude(self.density, self.rescaling, top_k=self.top_k)


@dataclass(frozen=True)
class Dare(_Sparse):
    """Drop elements at random (DARE)."""

    name: ClassVar[str] = "dare"
    title: ClassVar[str] = "DARE (a step: elements drawn at random)"
    paper: ClassVar[str] = "Yu et al. 2024, Language models are Super Mario (DARE), arXiv:2311.03099"
    formula: ClassVar[str] = "τ̂ = τ ⊙ m/p,  m ~ Bernoulli(p),  p = density"
    when: ClassVar[str] = "Fine-tunes with small task vectors, before any method that works from a base."
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SCALE, SIGN})
    example: ClassVar[str] = example("dare: 0.5", "sce", "seed: 42\n")

    rescale: bool = parameter(True, doc="make up for what was dropped; `l1`: with that as `rescale_norm`")

    def sparsifier(self) -> Sparsifier:
        return Random(self.density, self.rescaling)


@dataclass(frozen=True)
class Della(_Sparse):
    """Drop elements at random, small ones more often (DELLA's MagPrune)."""

    name: ClassVar[str] = "della"
    aliases: ClassVar[tuple[str, ...]] = ("magprune",)
    title: ClassVar[str] = "DELLA's MagPrune (a step: large elements more often)"
    paper: ClassVar[str] = "Deep et al. 2024, DELLA-Merging, arXiv:2406.11617"
    formula: ClassVar[str] = "τ̂ = τ ⊙ m/q,  m ~ Bernoulli(q),  q = density − ε + 2ε·rank/(n−1)"
    when: ClassVar[str] = "As the step DARE, when large task-vector elements should survive more often than small ones."
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SCALE, SIGN})
    example: ClassVar[str] = example("della: {density: 0.5, epsilon: 0.1}", "sce", "seed: 42\n")

    rescale: bool = parameter(True, doc="make up for what was dropped; `l1`: with that as `rescale_norm`")
    epsilon: tuple[float, ...] = per_model(
        0.15, within=(0, 1), doc="keep probabilities run from density − ε to density + ε along a row's ranks"
    )

    def check(self, count: int, compat: str | None = None) -> None:
        for d, e in zip(self.density, self.epsilon, strict=True):
            if 0 < d < 1 and not (d - e > 0 and d + e < 1):
                raise ValueError(f"density ± epsilon must lie inside (0, 1), not [{d - e:g}, {d + e:g}]")

    def sparsifier(self) -> Sparsifier:
        return MagPrune(self.density, self.epsilon, self.rescaling)


@dataclass(frozen=True)
class Breadcrumbs(_Sparse):
    """Drop the smallest and the very largest elements (Model Breadcrumbs)."""

    name: ClassVar[str] = "breadcrumbs"
    title: ClassVar[str] = "Breadcrumbs (a step: neither the smallest nor the very largest)"
    paper: ClassVar[str] = "Davari & Belilovsky 2023, Model Breadcrumbs, arXiv:2312.06795"
    formula: ClassVar[str] = "τ̂ keeps ranks [n − γn − density·n, n − γn) of |τ|"
    when: ClassVar[str] = "Where outliers of single task vectors spoil what the method makes of them."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN})
    example: ClassVar[str] = example("breadcrumbs: {density: 0.9, gamma: 0.01}", "tsvm")

    gamma: tuple[float, ...] = per_model(0.01, within=(0, 1), doc="share of the largest elements that is dropped")
    scope: str = parameter(
        "tensor",
        choices=("tensor", "row"),
        doc="what density and gamma are shares of: each tensor (mergekit), or each row along the last dimension (published)",
    )

    @property
    def idle(self) -> bool:
        return super().idle and max(self.gamma) == 0

    def sparsifier(self) -> Sparsifier:
        step = RowOutliers if self.scope == "row" else Outliers
        return step(self.density, self.gamma, rescale=self.rescaling)


@dataclass(frozen=True)
class SvdCompress(Step):
    """The nearest task vector of lower rank (the method `svd_compress` before any other)."""

    name: ClassVar[str] = "svd_compress"
    aliases: ClassVar[tuple[str, ...]] = ("tsv_compress",)
    title: ClassVar[str] = "SVD compression (a step: the largest singular triplets)"
    paper: ClassVar[str] = (
        "Eckart & Young 1936; of task vectors: Gargiulo et al. 2025, Task Singular Vectors, arXiv:2412.00081"
    )
    formula: ClassVar[str] = "τ̂ = Uₖ Σₖ Vₖᵀ,  the k largest singular triplets of τ"
    when: ClassVar[str] = "To drop the noise of a fine-tune's weak directions before another method."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = example("svd_compress: {energy: 0.9}", more="parameters: {density: 0.3, weight: 1.0}\n")

    rank: int | None = parameter(None, within=(0, 1e9), doc="singular triplets that are kept")
    ratio: float | None = parameter(
        None, within=(0, 1), doc="share of the shorter side that is kept (0.1 if nothing is said)"
    )
    energy: float | None = parameter(None, within=(0, 1), doc="share of the squared singular values that is kept")
    rest: str = parameter(
        "sum", choices=("sum", "base"), doc="tensors that are no matrices: whole task vectors, or none"
    )
    matrix: bool | None = parameter(
        None, doc="whether a 2-D tensor is a weight matrix; by default all are but embeddings, heads, norms and tables"
    )

    def check(self, count: int, compat: str | None = None) -> None:
        given = [n for n in ("rank", "ratio", "energy") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of rank, ratio and energy, not {' and '.join(given)}")

    @property
    def idle(self) -> bool:
        return self.matrix is False and self.rest == "sum"

    @property
    def whole(self) -> bool:
        return self.matrix is not False

    def decided(self, weight: bool) -> SvdCompress:
        return self if self.matrix is not None else replace(self, matrix=weight)

    def bind(self, open_scan: Open, shape: Shape) -> Piece:
        if self.matrix is False or not is_matrix(shape):
            return Piece() if self.rest == "sum" else _Nothing()
        ratio = 0.1 if self.rank is None and self.energy is None and self.ratio is None else self.ratio

        def compute() -> Tensor:
            gathered = whole(open_scan(), based=True)
            with one_thread():
                for delta in gathered:
                    delta.copy_(
                        truncate(delta.view(shape), rank=self.rank, ratio=ratio, energy=self.energy).reshape(-1)
                    )
            return gathered

        return _Matrices(compute)


class _Nothing(Piece):
    """No task vector is left."""

    def thin_(self, tile: Tile) -> None:
        tile.stack[1:].zero_()


class _Matrices(Piece):
    """Task vectors that were computed whole."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._whole = Once(compute)

    def begin(self) -> None:
        self._whole()

    def thin_(self, tile: Tile) -> None:
        tile.stack[1:].copy_(self._whole()[:, tile.start : tile.start + tile.numel])


STEPS: dict[str, type[Step]] = {
    name: step for step in (Trim, Dare, Della, Breadcrumbs, SvdCompress) for name in (step.name, *step.aliases)
}
"""The steps by name and alias."""


def get(name: str) -> type[Step]:
    """The step of that name or alias.

    Raises:
        UsageError: There is none.
    """
    if name not in STEPS:
        raise UsageError(f"there is no step {name!r}", hint=did_you_mean(name, STEPS))
    return STEPS[name]
