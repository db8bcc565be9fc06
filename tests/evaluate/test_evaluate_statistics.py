"""Statistics of scores: against scipy on the same arrays, against formulas, against answers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from geomerge.errors import RunError, UsageError
from geomerge.evaluate.samples import Samples
from geomerge.evaluate.statistics import compare, mcnemar, normalised, score_interval, synergy


def accuracies(values: list[float] | np.ndarray) -> Samples:
    """Samples of a plain share of right answers."""
    return Samples.of(values, [str(i) for i in range(len(values))])


def draw(seed: int, n: int, p: float) -> np.ndarray:
    """Right and wrong answers."""
    return (np.random.default_rng(seed).random(n) < p).astype(float)


class TestSamples:
    """What a score is made of."""

    def test_mean(self) -> None:
        """An accuracy is the mean."""
        assert accuracies([1, 0, 1, 1]).score() == 0.75

    def test_perplexity(self) -> None:
        """exp of the mean weighted by tokens: 2 tokens of 1 nat and 1 of 4 nats are 6 nats over 3 tokens."""
        samples = Samples.of([1.0, 4.0], "ab", weights=[2, 1], link="exp")
        assert samples.score() == pytest.approx(math.exp(2))

    def test_baselines(self) -> None:
        """Columns are rescaled by their own baseline, cut at 0, and averaged: (0.75-0.5)/0.5 = 0.5 and 0."""
        samples = Samples.of(
            [[1, 0], [1, 0], [1, 0], [0, 0], [0, 0], [0, 0]],
            "abcdef",
            weights=[[1, 0]] * 4 + [[0, 1]] * 2,
            strata=[0, 0, 0, 0, 1, 1],
            baselines=[0.5, 0.25],
        )
        assert samples.score() == pytest.approx((0.5 + 0.0) / 2)

    def test_binary(self) -> None:
        """Only ones and zeros in one column with no baseline are a share of right answers; one value alone is not."""
        assert accuracies([1, 0]).binary
        assert not accuracies([1, 0.5]).binary
        assert not accuracies([1.0]).binary
        assert not Samples.of([1, 0], "ab", weights=[1, 2]).binary
        assert not Samples.of([1, 0], "ab", baselines=[0.5]).binary
        assert not Samples.of([1, 0], "ab", link="exp").binary

    def test_nan_stays(self) -> None:
        """A sample that is no number makes the score none, also where the score is cut at 0."""
        assert math.isnan(Samples.of([1, math.nan], "ab", baselines=[0.5]).score())

    def test_refuses(self) -> None:
        """No samples, or arrays that do not fit."""
        with pytest.raises(RunError, match="no samples"):
            Samples.of([], [])
        with pytest.raises(RunError, match="2 values, 1 hashes"):
            Samples.of([1, 2], ["a"])


class TestIntervals:
    """Intervals of single scores and of differences."""

    def test_wilson(self) -> None:
        """A share's interval is Wilson's, by its formula."""
        low, high = score_interval(accuracies([1.0] * 9 + [0.0]))
        n, p, z = 10, 0.9, stats.norm.ppf(0.975)
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert low == pytest.approx((middle - half) / (1 + z**2 / n))
        assert high == pytest.approx((middle + half) / (1 + z**2 / n))

    def test_all_right_has_a_width(self) -> None:
        """20 right answers of 20 do not prove that all are right."""
        low, high = score_interval(accuracies([1.0] * 20))
        assert low < 0.9
        assert high == 1

    def test_bootstrap_as_scipy(self) -> None:
        """The interval of a mean is what scipy's percentile bootstrap gives for the values themselves."""
        values = np.random.default_rng(1).normal(size=50)
        ours = score_interval(accuracies(values), resamples=500, seed=7)
        theirs = stats.bootstrap(
            (values,), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(7), axis=-1
        ).confidence_interval
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)

    def test_paired_difference_as_scipy(self) -> None:
        """The paired interval is scipy's paired bootstrap of the difference of means on the same arrays."""
        a, b = draw(1, 200, 0.8), draw(2, 200, 0.7)
        found = compare(accuracies(a), accuracies(b), resamples=400, seed=3)
        theirs = stats.bootstrap(
            (a, b),
            lambda x, y, axis: x.mean(axis) - y.mean(axis),
            paired=True,
            vectorized=True,
            n_resamples=400,
            method="percentile",
            rng=np.random.default_rng(3),
            axis=-1,
        ).confidence_interval
        assert found is not None
        assert found.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert found.test == "mcnemar"

    def test_pairing_narrows(self) -> None:
        """Two models that are wrong on the same questions differ for sure where unpaired ones would not."""
        a = draw(5, 300, 0.5)
        b = a.copy()
        b[:6] = 1 - a[:6]
        paired = compare(accuracies(a), accuracies(b))
        unpaired = [score_interval(accuracies(x)) for x in (a, b)]
        assert paired is not None
        assert paired.high - paired.low < (unpaired[0][1] - unpaired[0][0]) / 2

    def test_strata_are_resampled_apart(self) -> None:
        """With one stratum of zeros and one of ones no resample can mix them: the interval is a point."""
        values = [0.0] * 10 + [1.0] * 10
        strata = [0] * 10 + [1] * 10
        apart = Samples.of(values, map(str, range(20)), weights=[2.0] * 20, strata=strata)
        mixed = Samples.of(values, map(str, range(20)), weights=[2.0] * 20)
        assert score_interval(apart) == (0.5, 0.5)
        low, high = score_interval(mixed)
        assert low < 0.4
        assert high > 0.6

    def test_batches_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The interval covers the truth as often as it says, whatever the batch: here, once with small batches."""
        samples = accuracies(np.random.default_rng(0).normal(size=30))
        monkeypatch.setattr("geomerge.evaluate.statistics._BATCH", 100)
        low, high = score_interval(samples, resamples=500)
        assert low < samples.score() < high

    def test_no_interval_from_one_sample(self) -> None:
        """One sample, or no resamples: nothing is claimed."""
        assert all(map(math.isnan, score_interval(accuracies([0.3]))))
        assert all(map(math.isnan, score_interval(accuracies([0.3, 0.4]), resamples=0)))

    def test_not_compared(self) -> None:
        """Models that were asked different questions are not compared."""
        assert compare(Samples.of([1, 0], "ab"), Samples.of([1, 0], "ac")) is None

    def test_perplexities(self) -> None:
        """Differences of scores that are no means get an interval and no p."""
        a = Samples.of([1.0, 2.0, 1.5], "abc", link="exp")
        b = Samples.of([1.1, 2.2, 1.4], "abc", link="exp")
        found = compare(a, b)
        assert found is not None
        assert found.difference == pytest.approx(math.exp(1.5) - math.exp(4.7 / 3))
        assert found.p is None
        assert found.test == "bootstrap"

    def test_deterministic(self) -> None:
        """The same seed gives the same interval, another one another."""
        samples = accuracies(np.random.default_rng(0).normal(size=30))
        assert score_interval(samples, seed=1) == score_interval(samples, seed=1)
        assert score_interval(samples, seed=1) != score_interval(samples, seed=2)


class TestMcNemar:
    """The exact paired test."""

    @pytest.mark.parametrize(("only_a", "only_b"), [(5, 1), (0, 3), (7, 7), (10, 2)])
    def test_by_hand(self, only_a: int, only_b: int) -> None:
        """Twice the smaller tail of a fair coin's binomial, at most 1."""
        a = np.array([True] * only_a + [False] * only_b + [True, False] * 4)
        b = np.array([False] * only_a + [True] * only_b + [True, False] * 4)
        n, k = only_a + only_b, min(only_a, only_b)
        tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
        assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
        assert mcnemar(b, a) == mcnemar(a, b)

    def test_no_disagreement(self) -> None:
        """Where both are right and wrong together there is nothing to test."""
        assert mcnemar(np.array([True, False]), np.array([True, False])) == 1.0


class TestNormalised:
    """The share of the best parent's score."""

    def test_share(self) -> None:
        """Against the best parent; the best parent itself gets 1."""
        assert normalised(0.6, [0.4, 0.8]) == pytest.approx(0.75)
        assert normalised(0.8, [0.4, 0.8]) == 1

    def test_lower_is_better(self) -> None:
        """The ratio is turned: half the perplexity of the best parent is a share of 2."""
        assert normalised(5, [10, 20], higher_is_better=False) == 2

    @pytest.mark.parametrize(
        ("value", "parents"), [(0.5, []), (0.5, [0.0, 0.0]), (math.nan, [0.5]), (0.5, [-1.0]), (-0.1, [0.5])]
    )
    def test_no_meaning(self, value: float, parents: list[float]) -> None:
        """Nothing to compare with, or a ratio that says nothing."""
        assert normalised(value, parents) is None


class TestSynergy:
    """Synergy of a merge."""

    def test_expected_is_no_synergy(self) -> None:
        """P_m = E gives 0."""
        found = synergy([0.2, 0.6], 0.4)
        assert found.expected == pytest.approx(0.4)
        assert found.delta == pytest.approx(0)
        assert found.relative == pytest.approx(0)

    def test_symmetric_in_the_parents(self) -> None:
        """Which parent comes first does not matter."""
        assert synergy([0.3, 0.7, 0.5], 0.6) == synergy([0.5, 0.3, 0.7], 0.6)

    @pytest.mark.parametrize("higher", [True, False])
    @pytest.mark.parametrize(("a", "b", "merged"), [(0.846, 0.872, 0.959), (0.2, 0.9, 0.6), (0.5, 0.5, 0.4)])
    def test_improvement_is_delta_less_half_the_diversity(
        self, a: float, b: float, merged: float, higher: bool
    ) -> None:
        """I = Δ − V/2 for two parents, so I ≤ Δ."""
        found = synergy([a, b], merged, higher_is_better=higher)
        assert found.improvement == pytest.approx(found.delta - found.diversity / 2)
        assert found.improvement <= found.delta + 1e-12

    def test_by_hand(self) -> None:
        """Parents 84.6 and 87.2, merge 95.9, I = +8.7."""
        found = synergy([84.6, 87.2], 95.9)
        assert found.improvement == pytest.approx(8.7)
        assert found.delta == pytest.approx(10.0)
        assert found.relative == pytest.approx(10.0 / 85.9)

    def test_lower_is_better(self) -> None:
        """A perplexity below the parents' is positive synergy."""
        found = synergy([10, 12], 9, higher_is_better=False)
        assert found.delta == 2
        assert found.improvement == 1

    def test_zero_expected(self) -> None:
        """Nothing expected: no relative synergy."""
        assert synergy([0, 0], 0.5).relative is None

    def test_needs_parents(self) -> None:
        """Without parents there is nothing to expect."""
        with pytest.raises(UsageError):
            synergy([], 0.5)
