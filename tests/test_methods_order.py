"""The k largest and the order statistics against a full sort, on the data that brackets and histograms fear most."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import references as ref
from geomerge.methods import brackets, native, order, tile
from geomerge.methods.brackets import Bracket
from geomerge.methods.order import largest, nth_smallest
from geomerge.methods.selection import Selection
from geomerge.methods.sparsify import magnitudes
from geomerge.methods.tile import Scan, TensorSource, Tile

Array = NDArray[np.float64]
N = 50_000


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four segments of several tiles in `N` elements."""
    monkeypatch.setattr(tile, "SEGMENT", 1 << 14)


def hostile() -> dict[str, Array]:
    """Data by name."""
    random = np.random.default_rng(4)
    normal = random.standard_normal(N)
    sparse = np.where(random.random(N) < 0.01, normal, 0.0)
    # A common value with few others around it, at the end of the tensor only.
    lonely = np.full(N, 0.25)
    lonely[-100:] = normal[:100]
    return {
        "normal": normal,
        "all equal": np.full(N, -0.5),
        "all zero": np.zeros(N),
        "two values": random.choice([1.0, -2.0], N),
        "grid": random.integers(-3, 4, N) / 64.0,
        "sparse": sparse,
        "ascending": np.arange(N) - 100.0,
        "descending": np.arange(N)[::-1] * 1.0,
        "any size": random.choice([-1, 1], N) * 10.0 ** random.uniform(-300, 300, N),
        "subnormal": random.integers(-9, 10, N) * 5e-324,
        "around one": 1 + random.integers(-2, 3, N) * 2.0**-52,
        "negative zeros": np.where(random.random(N) < 0.5, -0.0, np.sign(normal)),
        "one spike": np.where(np.arange(N) == 31_234, 1e9, 1e-9 * normal),
        "lonely": lonely,
    }


HOSTILE = hostile()


def scan_of(*arrays: Array, size: int = 1 << 13, columns: int | None = None) -> Scan:
    """A scan of arrays."""
    return Scan([TensorSource(torch.from_numpy(a)) for a in arrays], arrays[0].shape, tile=size, columns=columns)


def absolute(scan_tile: Tile) -> list[torch.Tensor]:
    """The magnitudes of all inputs."""
    return [x.abs() for x in scan_tile.inputs]


def shrunk(scan: Scan, selection: Selection, which: int = 0) -> Array:
    """The tensor without what is not selected."""
    return np.concatenate(
        [
            selection.shrink_(t.inputs[which].clone(), t, "test").reshape(-1).numpy().copy()
            for segment in scan.segments
            for t in scan.tiles(segment)
        ]
    )


def expected(values: Array, k: int) -> Array:
    """What is left of the k largest."""
    return values * ref.top(values, max(k, 0))


@pytest.mark.parametrize("k", [0, 1, 2, 77, N // 3, N // 2, N - 77, N - 1, N, N + 5])
@pytest.mark.parametrize("name", HOSTILE)
def test_largest(name: str, k: int) -> None:
    """Exactly the k largest, of equal ones those with the lowest index; the threshold is the k-th largest."""
    values = HOSTILE[name]
    scan = scan_of(values)
    (found,) = largest(scan, absolute, [k])
    assert np.array_equal(shrunk(scan, found), expected(values, k))
    if 0 < k < N:
        assert found.threshold == np.sort(np.abs(values))[N - k]
        assert sum(found.equal) == np.count_nonzero(np.abs(values) == found.threshold)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many times the fallback by counting was taken, as the length of a list."""
    calls: list[int] = []
    by_counting = order.by_counting

    def spy(scan: Scan, magnitudes: order.Magnitudes, which: int, count: int) -> Selection:
        calls.append(count)
        return by_counting(scan, magnitudes, which, count)

    monkeypatch.setattr(order, "by_counting", spy)
    return calls


@pytest.mark.parametrize("k", [1, 77, N // 3, N - 77])
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("end", ["first", "last"])
def test_a_sample_that_lies(name: str, k: int, end: str, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample sees one end of the tensor, so that brackets miss: the answer is the same."""

    def lie(scan: Scan, limit: int) -> Iterator[Tile]:
        segment = scan.segments[0 if end == "first" else -1]
        yield next(iter(scan.tiles(segment)))

    monkeypatch.setattr(Scan, "sample", lie)
    scan = scan_of(HOSTILE[name])
    (found,) = largest(scan, absolute, [k])
    assert np.array_equal(shrunk(scan, found), expected(HOSTILE[name], k))
    if name == "ascending" and k == N // 3:
        assert counted == [k], "the bracket was meant to miss"


@pytest.mark.parametrize("k", [1, 77, N // 3, N - 1])
@pytest.mark.parametrize("name", HOSTILE)
def test_brackets_that_overflow(name: str, k: int, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets that may hold 16 different values and are made to hold everything: folding and counting take over."""
    monkeypatch.setattr(order, "_COLLECT", 16)
    monkeypatch.setattr(
        order, "_brackets", lambda scan, m, counts, *more: dict.fromkeys(counts, (0.0, np.inf, (np.nan, np.nan)))
    )
    scan = scan_of(HOSTILE[name])
    (found,) = largest(scan, absolute, [k])
    assert np.array_equal(shrunk(scan, found), expected(HOSTILE[name], k))
    assert bool(counted) == (np.unique(np.abs(HOSTILE[name])).size > 16)


def test_brackets_usually_hit(counted: list[int]) -> None:
    """On ordinary data, and on a coarse grid, no histogram is needed."""
    for name in ("normal", "grid", "sparse", "any size", "all equal", "two values"):
        for k in (1, N // 10, N // 2, N - 1):
            largest(scan_of(HOSTILE[name]), absolute, [k])
    assert counted == []


def test_two_values_that_meet_are_counted_and_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold where one value of a coarse grid ends and the next begins: both are common."""
    collected: list[int] = []
    fold = Bracket.fold

    def spy(bracket: Bracket, most: int) -> None:
        fold(bracket, most)
        collected.append(bracket.values.size)

    monkeypatch.setattr(Bracket, "fold", spy)
    values = np.random.default_rng(8).choice([0.25, 0.5, 0.75, 1.0], N)
    k = int(np.count_nonzero(values > 0.5))
    for wanted in (k, k + 1):
        (found,) = largest(scan_of(values), absolute, [wanted])
        assert found.threshold == (0.75 if wanted == k else 0.5)
        assert sum(found.equal) == np.count_nonzero(values == found.threshold)
    assert sum(collected) == 0


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_the_largest_of_many_that_were_collected(name: str, loops: bool) -> None:
    """As a sort says, whether a bracket among them helps or not; with common values beside them, or weights."""
    values = np.abs(HOSTILE[name])
    common = sorted({float(np.median(values)): 40_000, float(values.min()): 3}.items(), reverse=True)
    values = values[~np.isin(values, [value for value, _ in common])]
    everything = np.sort(np.concatenate([values, *(np.full(n, value) for value, n in common)]))[::-1]
    distinct, weights = np.unique(values, return_counts=True)
    with contextlib.nullcontext() if loops else native.turned_off():
        for k in (1, 77, N // 3, N // 2, everything.size - 3, everything.size):
            if 0 < k <= everything.size:
                expected = everything[k - 1], int(np.count_nonzero(everything > everything[k - 1]))
                pieces = [np.array(piece) for piece in np.array_split(values, 3)] + [values[:0]]
                assert brackets._threshold(pieces, None, common, k) == expected
                assert brackets._threshold([values], None, common, k) == expected
                assert brackets._threshold([distinct[:5], distinct[5:]], weights, common, k) == expected
        assert brackets._threshold([values], None, common, everything.size + 1) is None


@pytest.mark.parametrize("loops", [True, False])
def test_the_largest_of_pieces_of_both_widths(loops: bool) -> None:
    """As tensors of different dtypes give them."""
    single, double = np.float32([0.1, 3.0, 2.0]), np.float64([0.1, 2.5, 1 / 3])
    ordered = np.sort(np.concatenate([single, double]))[::-1]
    with contextlib.nullcontext() if loops else native.turned_off():
        for pieces, k in itertools.product(([single, double], [double, single]), range(1, 7)):
            assert brackets._threshold(pieces, None, [], k) == (ordered[k - 1], k - 1)


@pytest.mark.parametrize("loops", [True, False])
def test_what_is_ranked_twice_is_sampled_once(loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thresholds of one expert, and of the same recorded magnitudes, share a sample."""
    asked: list[int] = []
    bounds_of = order.bounds_of

    def spy(strata: Sequence[Array], counts: Sequence[int], *more: float) -> list[tuple[native.Bounds, float]]:
        asked.append(len(counts))
        return bounds_of(strata, counts, *more)

    monkeypatch.setattr(order, "bounds_of", spy)
    scan = scan_of(np.zeros(N), HOSTILE["normal"], HOSTILE["any size"])

    def twice(tile: Tile) -> list[torch.Tensor]:
        return magnitudes(tile) * 2

    def recorded(tile: Tile) -> list[torch.Tensor]:
        size = tile.inputs[1].abs()
        return [size, size, tile.inputs[2].abs()]

    with contextlib.nullcontext() if loops else native.turned_off():
        found = largest(scan, twice, [N // 2, N // 3, N // 4, N // 5], [0, 1, 0, 1])
        assert asked == [2, 2]
        asked.clear()
        largest(scan, recorded, [N // 2, N // 3, N // 4], recorded=True)
        assert asked == [2, 1]
    for k, which, selection in zip((2, 3, 4, 5), (1, 2, 1, 2), found, strict=True):
        values = np.abs(HOSTILE["normal" if which == 1 else "any size"])
        assert selection.threshold == np.sort(values)[N - N // k]


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize(("spreads", "again"), [((-5.0, 8.0), 0), ((-6.0, -5.0), 3)])
def test_what_brackets_missed_is_looked_at_once_more(
    spreads: tuple[float, float], again: int, loops: bool, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By wider ones; only what these miss, too, is counted bit by bit."""
    monkeypatch.setattr(order, "_SPREADS", spreads)
    scan = scan_of(np.zeros(N), HOSTILE["normal"])
    with contextlib.nullcontext() if loops else native.turned_off():
        found = largest(scan, lambda tile: magnitudes(tile) * 3, [N // 2, N // 3, N // 50], [0, 0, 0])
    assert len(counted) == again
    ordered = np.sort(np.abs(HOSTILE["normal"]))[::-1]
    assert [s.threshold for s in found] == [ordered[N // k - 1] for k in (2, 3, 50)]


def test_what_repeats_is_kept_once() -> None:
    """Values of a grid are folded, with their numbers; distinct ones would only take more room."""
    random = np.random.default_rng(9)
    for values, kept in ((random.integers(0, 50, 5000) / 8, 50), (random.random(5000), 5000)):
        bracket = Bracket(0.0, math.inf, (math.nan, math.nan))
        bracket.add(values)
        bracket.fold(1000)
        assert bracket.values.size == kept
        assert bracket.values.size == 5000 or (bracket.counts is not None and bracket.counts.sum() == 5000)


class Unplaced(TensorSource):
    """Elements that compiled loops do not read themselves."""

    def stored(self) -> None:
        return None


@pytest.mark.parametrize(("loops", "source"), [(True, TensorSource), (True, Unplaced), (False, TensorSource)])
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_different_sizes_are_no_surprise(
    seed: int, loops: bool, source: type[TensorSource], counted: list[int]
) -> None:
    """Task vectors whose rows and columns differ by factors, as those of trained models do: neighbours are alike, so that a
    sample of few places is worth little, and the brackets know it."""
    random = np.random.default_rng(seed)
    shape = (600, 896)
    base = torch.from_numpy(random.standard_normal(shape) * 0.02)
    sizes = np.exp(random.standard_normal((shape[0], 1))) * np.exp(0.5 * random.standard_normal((1, shape[1])))
    expert = base + torch.from_numpy(random.standard_normal(shape) * 2e-4 * sizes)
    scan = Scan([source(t.bfloat16()) for t in (base, expert)], shape, tile=1 << 16)
    counts = [scan.numel // 100, scan.numel // 5, scan.numel * 9 // 10]

    def three(tile: Tile) -> list[torch.Tensor]:
        return magnitudes(tile) * 3

    with contextlib.nullcontext() if loops else native.turned_off():
        found = largest(scan, three, counts, [0] * 3)
    assert counted == []
    sizes = (expert.bfloat16().double() - base.bfloat16().double()).abs().numpy().ravel()
    assert [f.threshold for f in found] == [np.sort(sizes)[-k] for k in counts]


@pytest.mark.parametrize("size", [1 << 13, 1 << 14, 1 << 20])
def test_several_selections_at_once(size: int) -> None:
    """Different tensors and counts in the same passes, in tiles of any size."""
    names = ["grid", "normal", "all zero", "two values", "any size"]
    counts = [N // 7, 3, 50, N - 1, 0]
    scan = scan_of(*[HOSTILE[n] for n in names], size=size)
    for i, (name, k, found) in enumerate(zip(names, counts, largest(scan, absolute, counts), strict=True)):
        assert np.array_equal(shrunk(scan, found, i), expected(HOSTILE[name], k)), name


def test_threads_give_the_same() -> None:
    """Segments in parallel, in any order."""
    values = HOSTILE["grid"]
    with ThreadPoolExecutor(3) as pool:
        scan = Scan([TensorSource(torch.from_numpy(values))], (N,), tile=1 << 13, run=pool.map)
        (found,) = largest(scan, absolute, [N // 3])
        parts = scan.over(lambda ts: [found.shrink_(t.inputs[0].clone(), t, "x").numpy().copy() for t in ts])
    assert np.array_equal(np.concatenate([p for part in parts for p in part]), expected(values, N // 3))


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 2.0, 5e-324, -1e308]), min_size=1, max_size=120),
    share=st.floats(0, 1),
    sample=st.integers(1, 40),
)
def test_largest_of_anything(values: list[float], share: float, sample: int) -> None:
    """Few values, many ties, tiny tiles, tiny samples."""
    array = np.array(values).reshape(-1, 1)
    k = int(share * len(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile, "SEGMENT", 12)
        patch.setattr(order, "_SAMPLE", sample)
        patch.setattr(order, "_COLLECT", 7)
        scan = scan_of(array, size=5, columns=1)
        (found,) = largest(scan, absolute, [k])
        assert np.array_equal(shrunk(scan, found), expected(array.ravel(), k))


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(0, allow_nan=False, allow_infinity=False), min_size=1, max_size=60), data=st.data())
def test_order_statistics_of_anything(values: list[float], data: st.DataObject) -> None:
    """Any ranks, the first and the last included, of any numbers that are not negative."""
    ranks = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
    array = np.array(values).reshape(-1, 1)
    scan = scan_of(array, size=5, columns=1)
    found = nth_smallest(scan, lambda t: [t.inputs[0].abs()] * len(ranks), ranks)
    assert found == np.sort(array.ravel())[ranks].tolist()


@pytest.mark.parametrize("name", HOSTILE)
def test_order_statistics(name: str) -> None:
    """Extremes and quartiles of large tensors."""
    ranks = [0, 1, N // 4, N // 2, 3 * N // 4, N - 2, N - 1]
    found = nth_smallest(scan_of(HOSTILE[name]), lambda t: [t.inputs[0].abs()] * len(ranks), ranks)
    assert found == np.sort(np.abs(HOSTILE[name]))[ranks].tolist()


@pytest.mark.parametrize("select", [lambda s: largest(s, absolute, [3]), lambda s: largest(s, absolute, [0])])
def test_empty(select: Callable[[Scan], Sequence[Selection]]) -> None:
    """Nothing of nothing."""
    assert len(select(scan_of(np.zeros(0)))) == 1
