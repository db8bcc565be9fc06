"""Random draws: where they come from, that they are random, and that nothing but seed, label and element moves them."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import geomerge as gm
import references as ref
from geomerge.methods import native, tile
from geomerge.methods.random import bernoulli, keep_, numbers_at, stream, words
from geomerge.methods.sparsify import MagPrune
from geomerge.methods.tile import Scan, TensorSource
from geomerge.testing import models

ROWS, COLUMNS = 241, 167
N = ROWS * COLUMNS
PINNED = [2260356371, 1122943370, 2255239139, 698460711]


def scan_of(*, size: int = 1 << 13, columns: int | None = None, name: str = "w", seed: int = 0) -> Scan:
    """A scan of zeros; with 167 columns tiles start at odd elements."""
    zeros = torch.zeros(ROWS, COLUMNS)
    return Scan([TensorSource(zeros)], zeros.shape, tile=size, columns=columns, name=name, seed=seed)


def drawn(scan: Scan, label: str = "dare/0") -> NDArray[np.uint32]:
    """All words of a scan."""
    return np.concatenate([words(t, label).copy() for segment in scan.segments for t in scan.tiles(segment)])


def uniform(**options: object) -> NDArray[np.float64]:
    """The words as numbers in [0, 1)."""
    label = str(options.pop("label", "dare/0"))
    return drawn(scan_of(**options), label) / 2.0**32  # type: ignore[arg-type]


def within(found: float, mean: float, variance: float, sigmas: float = 4.0) -> bool:
    """Whether a number lies within so many standard deviations of its mean."""
    return abs(found - mean) <= sigmas * math.sqrt(variance)


@pytest.mark.parametrize("segment", [1 << 14, 1 << 22])
@pytest.mark.parametrize(("size", "columns"), [(1 << 13, None), (1 << 15, None), (1 << 20, None), (1, 167), (900, 167)])
def test_words_belong_to_elements(
    segment: int, size: int, columns: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a tensor is cut, even at odd elements, the words are the stream's from its beginning."""
    monkeypatch.setattr(tile, "SEGMENT", segment)
    expected = stream(0, "dare/0/w").random_raw((N + 1) // 2).astype("<u8").view("<u4")[:N]
    assert np.array_equal(drawn(scan_of(size=size, columns=columns)), expected)


def test_any_tile_in_any_order() -> None:
    """A tile's words do not depend on the tiles that were drawn before it, nor on being drawn twice."""
    whole = drawn(scan_of(size=501, columns=167))
    scan = scan_of(size=501, columns=167)
    (segment,) = scan.segments
    for t in [*scan.tiles(segment)][::-7]:
        for _ in range(2):
            assert np.array_equal(words(t, "dare/0"), whole[t.start : t.start + t.numel])


compiled = pytest.mark.skipif(not native.available(), reason="the compiled loops were not built (no C compiler?)")


@compiled
def test_generators_of_loops_begin_as_numpy_s() -> None:
    """For any 128 bits, those whose high words are zero among them."""
    keys = [bytes(16), b"\x07" + bytes(15), bytes(15) + b"\xff", b"\xff" * 16]
    keys += [np.random.default_rng(i).bytes(16) for i in range(200)]
    for key in keys:
        inner = np.random.PCG64DXSM(int.from_bytes(key, "little")).state["state"]
        assert native.generator(key) == (inner["state"], inner["inc"])


@compiled
@pytest.mark.parametrize("number", [0, 1, 2, 3, 1000, 2**20 + 7, 2**40, 10**12 + 1])
def test_numbers_for_loops_are_those_of_the_generator(number: int) -> None:
    """State and increment at a place, found without making a generator, are those that NumPy's has after as many numbers."""
    scan = scan_of(name="tensor", seed=42)
    generator = stream(42, "dare/0/tensor")
    generator.advance(number)
    inner = generator.state["state"]
    low_state, high_state, low_step, high_step = numbers_at(next(scan.places(scan.segments[0])), "dare/0", number)
    assert (low_state + (high_state << 64), low_step + (high_step << 64)) == (inner["state"], inner["inc"])


def test_words_stay_what_they_are() -> None:
    """The first words of one key, pinned: a merge made today can be made again by a later version."""
    assert drawn(scan_of(name="tensor", seed=42))[:4].tolist() == PINNED


def test_words_are_uniform_and_independent() -> None:
    """Mean, variance and correlation with the next word and the next but one, the 4-bit digits of both halves (χ²)."""
    u = uniform()
    assert within(float(u.mean()), 1 / 2, 1 / 12 / N)
    assert within(float(((u - 0.5) ** 2).mean()), 1 / 12, 1 / 180 / N)
    for lag in (1, 2, 167):
        assert within(float(np.mean((u[:-lag] - 0.5) * (u[lag:] - 0.5))), 0, 1 / 144 / (N - lag))
    bits = drawn(scan_of())
    for shift in (0, 12, 28):
        counts = np.bincount((bits >> np.uint32(shift)) & 15, minlength=16)
        assert within(float(((counts - N / 16) ** 2 / (N / 16)).sum()), 15, 30)


@pytest.mark.parametrize("other", [{"label": "dare/1"}, {"name": "v"}, {"seed": 1}, {"label": "della/0"}], ids=str)
def test_keys_are_independent(other: dict[str, object]) -> None:
    """Another model, tensor, seed or method draws words that have nothing to do with the first."""
    u, v = uniform(), uniform(**other)
    assert not np.array_equal(u, v)
    assert within(float(np.mean((u - 0.5) * (v - 0.5))), 0, 1 / 144 / N)


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.4, 0.5, 0.9, 1 - 1e-7])
def test_keep(p: float) -> None:
    """That share of the elements stays as it is and the others are zero, whatever the width of the words."""
    scan = scan_of(size=167 * 50, columns=167)
    kept = torch.cat([keep_(torch.full_like(t.base, 3.0), t, "x", p) for t in scan.tiles(scan.segments[0])])
    assert set(kept.unique().tolist()) <= {0.0, 3.0}
    assert within(float((kept != 0).double().sum()), p * N, p * (1 - p) * N)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli(p: float) -> None:
    """Masks of a probability have that share of ones."""
    scan = scan_of(size=167 * 50, columns=167)
    masks = [bernoulli(t, "x", torch.full(t.base.shape, p, dtype=torch.float64)) for t in scan.tiles(scan.segments[0])]
    assert all(mask.shape == (50, 167) for mask in masks[:-1])
    ones = float(torch.cat(masks).double().sum())
    assert within(ones, p * N, p * (1 - p) * N)


@pytest.mark.parametrize("p", [2**-18, 0.300001, 1 - 2**-20])
def test_bernoulli_draws_two_words(p: float) -> None:
    """As if both made one number of 32 bits; of two million elements thirty need the second."""
    rows, columns = 12_567, 167

    def halves(label: str) -> NDArray[np.uint64]:
        return stream(7, f"{label}/tensor").random_raw(rows * columns // 4 + 1).view("<u2").astype(np.uint64)

    expected = (halves("x") << np.uint64(16) | halves("finer/x")) < round(p * 2**32)
    scan = Scan([TensorSource(torch.zeros(rows, columns))], (rows, columns), columns=columns, name="tensor", seed=7)
    masks = scan.over(
        lambda tiles: [bernoulli(t, "x", torch.full(t.base.shape, p, dtype=torch.float64)) for t in tiles]
    )
    found = torch.cat([mask for segment in masks for mask in segment])
    assert np.array_equal(found.view(-1).numpy(), expected[: rows * columns])


def test_bernoulli_of_many_probabilities() -> None:
    """Each column with its own: every one within 5 σ of 241 draws."""
    p = torch.linspace(0, 1, COLUMNS, dtype=torch.float64).expand(ROWS, COLUMNS)
    scan = scan_of(columns=167, size=1 << 20)
    (t,) = scan.tiles(scan.segments[0])
    share = bernoulli(t, "x", p).double().mean(0)
    sigma = (p[0] * (1 - p[0]) / ROWS).sqrt()
    assert bool(((share - p[0]).abs() <= 5 * sigma + 1e-12).all())


def test_global_generators_are_left_alone() -> None:
    """A merge neither reads nor moves the generators of torch and NumPy."""
    base, expert = models(2, (50, 40))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        results.append(gm.methods.dare_ties(base, [expert], weight=1, density=0.5, seed=9))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(*results)


def test_dare_is_unbiased() -> None:
    """The mean over 4,000 seeds lies within 4 σ of the task vector, σ² = τ²(1 − p)/p/4000, for each element and in all."""
    base, expert = models(2, (30,))
    tau, p, seeds = expert - base, 0.3, 4000
    total = torch.zeros_like(tau)
    for seed in range(seeds):
        total += gm.methods.dare_linear(base, [expert], weight=1, density=p, seed=seed) - base
    z = (total / seeds - tau) / (tau.abs() * math.sqrt((1 - p) / p / seeds))
    assert float(z.abs().max()) < 4
    assert within(float((z**2).sum()), 30, 60)


def test_dare_keeps_a_binomial_number() -> None:
    """The number of survivors over seeds has mean np and variance np(1 − p)."""
    n, p, seeds = 400, 0.25, 400
    zeros, ones = torch.zeros(n), torch.ones(n)
    kept = [
        float((gm.methods.dare_linear(zeros, [ones], weight=1, density=p, seed=s) != 0).sum()) for s in range(seeds)
    ]  # fmt: skip
    assert within(float(np.mean(kept)), n * p, n * p * (1 - p) / seeds)
    variance = n * p * (1 - p)
    assert within(float(np.var(kept)), variance, 2 * variance**2 / seeds)


def test_experts_and_tensors_have_masks_of_their_own() -> None:
    """Two experts' survivors overlap as chance has it, and so do those of two tensors of one expert."""
    n, p = 40_000, 0.3
    zeros, ones = torch.zeros(n), torch.ones(n)

    def mask(k: int, name: str) -> torch.Tensor:
        experts = [{name: ones if i == k else zeros} for i in range(2)]
        merged = gm.methods.dare_linear({name: zeros}, experts, weight=1, density=p, rescale=False)
        return merged[name].double()

    for a, b in [((0, "a"), (1, "a")), ((0, "a"), (0, "b"))]:
        assert within(float((mask(*a) * mask(*b)).sum()), n * p * p, n * p * p * (1 - p * p))


def test_della_survivors_by_rank() -> None:
    """Rows of one ordering, 6,000 of them: each rank survives with its probability, and its mean is the task vector's."""
    row = torch.tensor([0.3, -0.1, 0.7, 0.2, -0.9, 0.5], dtype=torch.float64)
    count, density, epsilon = 6000, 0.5, 0.3
    tau = row.repeat(count, 1)
    found = gm.methods.della_linear(
        torch.zeros_like(tau), [tau], weight=1, density=density, epsilon=epsilon, normalize=False
    )
    q = torch.from_numpy(ref.keep_probability(row.numpy(), density, epsilon))
    assert sorted(q.tolist()) == pytest.approx([0.2, 0.32, 0.44, 0.56, 0.68, 0.8])
    assert float(q.mean()) == pytest.approx(density)
    share = (found != 0).double().mean(0)
    assert bool(((share - q).abs() <= 4 * (q * (1 - q) / count).sqrt()).all())
    error = row.abs() * ((1 - q) / q / count).sqrt()
    assert bool(((found.mean(0) - row).abs() <= 4 * error).all())


@pytest.mark.parametrize("density", [0.2, 0.5, 0.77])
def test_della_mean_probability_is_the_density(density: float) -> None:
    """In every row, whatever its ties and length, and the larger magnitude never has the smaller probability."""
    random = np.random.default_rng(3)
    for columns in (2, 3, 10, 101):
        tau = random.integers(-5, 6, (7, columns)) / 8
        q = ref.keep_probability(tau, density, 0.15)
        found = MagPrune((density,), (0.15,)).probabilities(torch.from_numpy(tau), 0).numpy()
        np.testing.assert_allclose(found, q, rtol=1e-12)
        np.testing.assert_allclose(found.mean(1), density, rtol=1e-12)
        order = np.argsort(np.abs(tau), 1, kind="stable")
        assert np.all(np.diff(np.take_along_axis(found, order, 1), axis=1) > 0)


def test_seed_and_name_change_the_result() -> None:
    """The same call with another seed, or for a tensor of another name, keeps other elements."""
    base, expert = models(2, (400,))
    results = {
        hashlib.sha256(
            gm.methods.dare_linear({name: base}, [{name: expert}], weight=1, density=0.5, seed=seed)[name]
            .numpy()
            .tobytes()
        ).hexdigest()
        for name in ("a", "b")
        for seed in (0, 1)
    }
    assert len(results) == 4
