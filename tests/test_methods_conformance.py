"""Every registered method through the conformance suite, in several segments."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from geomerge.methods import native, properties, registry, tile
from geomerge.methods.base import Elementwise, parameter
from geomerge.methods.random import words
from geomerge.methods.tile import Scan, Tile
from geomerge.testing import CHECKS, Case, cases, check_processes_agree, check_properties_complete
from geomerge.testing.conformance import (
    check_endpoints,
    check_loops,
    check_not_finite,
    check_properties_hold,
    check_rounding,
    check_seed,
    check_tiles,
)


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that tensors of a hundred thousand elements fill several of."""
    monkeypatch.setattr(tile, "SEGMENT", 1 << 15)


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(case: Case, check: Callable[[Case], None]) -> None:
    """The method keeps what every method must keep."""
    check(case)


@pytest.mark.parametrize("method", registry.all_methods())
def test_lists_all_its_properties(method: str) -> None:
    """What a method does not list, it lacks."""
    check_properties_complete(method)


BY_ROWS = [replace(case, values={"density": 0.5, "gamma": 0.1, "scope": "row"}) for case in cases("breadcrumbs")[::2]]


@pytest.mark.parametrize("case", BY_ROWS, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms_by_rows(case: Case, check: Callable[[Case], None]) -> None:
    """Breadcrumbs, where its shares are of rows."""
    check(case)


def test_processes_agree() -> None:
    """The bits of every method are those of another process."""
    check_processes_agree()


# The suite itself: methods with one fault each, and the check that finds it.


@dataclass(frozen=True)
class Faultless(Elementwise):
    """The base plus the first task vector."""

    name: ClassVar[str] = "faultless"
    title: ClassVar[str] = "A method of a third party"
    paper: ClassVar[str] = "none"
    formula: ClassVar[str] = "θ = θ₀ + c·τ₁"
    when: ClassVar[str] = "In tests."
    example: ClassVar[str] = "merge_method: faultless"
    properties: ClassVar[frozenset[str]] = frozenset(properties.NAMES) - {properties.PERMUTATION}

    c: float = parameter(1.0, within=(0, 1), doc="factor")

    def blend(self, tile: Tile, stats: None) -> Tensor:
        return tile.base.add_(tile.task_vectors()[0], alpha=self.c)


class DependsOnTiles(Faultless):
    """Adds a mean over the tile."""

    def blend(self, tile: Tile, stats: None) -> Tensor:
        return super().blend(tile, stats).add_(tile.inputs[1].mean())


class DrawsFromTorch(Faultless):
    """Uses the global generator."""

    def blend(self, tile: Tile, stats: None) -> Tensor:
        return super().blend(tile, stats).mul_(torch.rand(()))


class CancelsInFloat32(Faultless):
    """Says that float32 is enough, where it is not."""

    single: ClassVar[bool] = True

    def blend(self, tile: Tile, stats: None) -> Tensor:
        return super().blend(tile, stats).add_(1e6).sub_(1e6)


@dataclass(frozen=True)
class MissesItsEnd(Faultless):
    """Interpolates, but not up to the other model."""

    interpolates: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (1, 1)

    t: float = parameter(1.0, within=(0, 1), doc="where between the models")

    def blend(self, tile: Tile, stats: None) -> Tensor:
        return tile.base.add_(tile.task_vectors()[0], alpha=0.9 * self.t)


class ClaimsPermutation(Faultless):
    """Lists a property that it lacks."""

    properties: ClassVar[frozenset[str]] = frozenset(properties.NAMES)


class HidesScale(Faultless):
    """Does not list a property that it has."""

    name: ClassVar[str] = "hides_scale"
    properties: ClassVar[frozenset[str]] = Faultless.properties - {properties.SCALE}


class ForgetsTheBase(Faultless):
    """Off by the last bit of the base."""

    def blend(self, tile: Tile, stats: None) -> Tensor:
        return super().blend(tile, stats).mul_(1 + 2.0**-20)


class HasTwoFaces(Faultless):
    """What is recorded is not what torch does."""

    recorded: ClassVar[bool] = True

    def blend(self, tile: Tile, stats: None) -> Tensor:
        return super().blend(tile, stats).mul_(1.0 + isinstance(tile, Tile))


class CannotBeRecorded(Faultless):
    """Claims what it does not keep."""

    recorded: ClassVar[bool] = True

    def blend(self, tile: Tile, stats: None) -> Tensor:
        return super().blend(tile, stats).erf_()


class OrdersDraws(Faultless):
    """Draws by the tile's place: right, so long as the words belong to elements."""

    def blend(self, tile: Tile, stats: None) -> Tensor:
        drawn = torch.from_numpy(words(tile, "test").astype(np.float64)).view(tile.base.shape)
        return super().blend(tile, stats).addcmul_(tile.inputs[1], drawn, value=2.0**-32)


compiled = pytest.mark.skipif(not native.available(), reason="the compiled loops were not built (no C compiler?)")


def case(method: type[Faultless], count: int = 2) -> Case:
    """A case of a method that need not be registered."""
    return Case(method, count, True)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_third_partys_method(check: Callable[[Case], None]) -> None:
    """A method without faults passes, registered or not."""
    check(case(Faultless))
    check_tiles(case(OrdersDraws))


@pytest.mark.parametrize(
    ("method", "check", "message"),
    [
        (DependsOnTiles, check_tiles, "tiles of"),
        (DrawsFromTorch, check_seed, "same seed"),
        (ClaimsPermutation, check_properties_hold, "permutation"),
        (ForgetsTheBase, check_properties_hold, "base"),
        (CancelsInFloat32, check_rounding, "units in the last place"),
        pytest.param(HasTwoFaces, check_loops, "differs from torch", marks=compiled),
    ],
)
def test_the_suite_finds(method: type[Faultless], check: Callable[[Case], None], message: str) -> None:
    """Each fault by its check."""
    with pytest.raises(AssertionError, match=message):
        check(case(method))


def test_the_suite_finds_a_hidden_property(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered method must list what it keeps."""
    monkeypatch.setattr(registry, "_registered", {**registry._registered, "hides_scale": HidesScale})
    with pytest.raises(AssertionError, match="scale"):
        check_properties_complete("hides_scale")


def test_the_suite_finds_what_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN that goes through."""
    monkeypatch.setattr(Scan, "_finite", property(lambda self: True, lambda self, value: None), raising=False)
    with pytest.raises(AssertionError, match="went through"):
        check_not_finite(case(Faultless))


def test_the_suite_finds_what_depends_on_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Here the hash of a string, which each process draws anew."""
    (tmp_path / "hashing.py").write_text(
        "from geomerge.methods.registry import register\n"
        "from geomerge.methods.span.linear import Linear\n\n\n"
        "@register\n"
        "class Hashing(Linear):\n"
        "    name, aliases = 'hashing', ()\n\n"
        "    def coefficients(self, gram):\n"
        "        return [c * (1 + hash('word') % 1000) for c in super().coefficients(gram)]\n"
    )
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("hashing")
    with pytest.raises(AssertionError, match="hashing-1 gives other bits"):
        check_processes_agree("hashing")


def test_the_suite_finds_a_missed_endpoint() -> None:
    """t = 1 is to give the other model."""
    with pytest.raises(AssertionError, match="t = 1 gives no end"):
        check_endpoints(case(MissesItsEnd, 1))


@compiled
def test_what_cannot_be_recorded_is_named() -> None:
    """Instead of a slow way that nobody notices."""
    with pytest.raises(AttributeError, match="'erf_' cannot be recorded"):
        check_loops(case(CannotBeRecorded))
