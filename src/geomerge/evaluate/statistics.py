"""Uncertainty of scores, paired comparison of two models, normalised scores, synergy of a merge.

The resampling and the exact tests are scipy's. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from geomerge.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from geomerge.evaluate.samples import Samples

CONFIDENCE = 0.95
RESAMPLES = 2000
_BATCH = 2_000_000
"""How many indices are drawn at a time: bounds the memory of a bootstrap over many samples."""


@dataclass(frozen=True)
class Difference:
    """One model against another on the same samples.

    Attributes:
        difference: The model's score minus the other's, in the task's unit.
        low, high: The 95 % bootstrap interval of it; NaN when there are too few samples.
        p: McNemar's exact two-sided p for shares of right answers, else `None`.
        test: ``"mcnemar"`` or ``"bootstrap"``.
    """

    difference: float
    low: float
    high: float
    p: float | None
    test: Literal["mcnemar", "bootstrap"]


@dataclass(frozen=True)
class Synergy:
    """What a merge makes of its parents: positive is always good.

    Attributes:
        expected: E, the mean of the parents' scores.
        delta: Δ = P_m − E; E − P_m where lower scores are better.
        relative: Δ / E, `None` when E is 0.
        improvement: I, the same against the best parent; strict synergy when positive.
        diversity: V, the best parent's distance from the worst.
    """

    expected: float
    delta: float
    relative: float | None
    improvement: float
    diversity: float


def score_interval(samples: Samples, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of one model's score.

    Shares of right answers get Wilson's interval, which has a width even when every answer is right; everything else gets
    the percentile bootstrap over samples, sub-task by sub-task.

    Args:
        samples: The outcomes.
        resamples: Bootstrap resamples; 0 gives no bootstrap interval (NaN).
        seed: Of the resampling.
    """
    if samples.binary:
        from scipy import stats

        found = stats.binomtest(int(samples.values.sum()), len(samples))
        limits = found.proportion_ci(CONFIDENCE, method="wilson")
        return float(limits.low), float(limits.high)
    return _bootstrap([samples], samples.resampled, resamples, seed)


def compare(model: Samples, other: Samples, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference | None:
    """The paired difference of two models, or `None` when they were not asked the same.

    Args:
        model, other: Outcomes on the same task.
        resamples, seed: See `score_interval`. Each resample draws the same samples for both models.
    """
    if model.hashes != other.hashes:
        return None
    low, high = _bootstrap([model, other], lambda rows: model.resampled(rows) - other.resampled(rows), resamples, seed)
    binary = model.binary and other.binary
    p = mcnemar(model.values[:, 0] == 1, other.values[:, 0] == 1) if binary else None
    return Difference(model.score() - other.score(), low, high, p, "mcnemar" if binary else "bootstrap")


def mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """McNemar's exact two-sided p: whether two models that answered the same questions are equally often right.

    Only the questions that one of them got right and the other wrong count; under the null each is a fair coin.

    Args:
        a, b: Whether each answer is right, ``(samples,)``.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b == 0:
        return 1.0
    from scipy import stats

    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def _bootstrap(samples: Sequence[Samples], statistic: Any, resamples: int, seed: int) -> tuple[float, float]:
    """scipy's percentile interval of a statistic of rows; strata are resampled apart from each other."""
    import numpy as np

    first = samples[0]
    # scipy resamples two observations or more; a stratum of one sample stays as it is.
    drawn = [i for i, rows in enumerate(first.parts) if len(rows) > 1]
    finite = all(bool(np.isfinite(s.values).all()) for s in samples)
    if resamples < 1 or not drawn or not finite:
        return math.nan, math.nan

    def of_indices(*chosen: NDArray[np.int64], axis: int = -1) -> Any:
        shape = chosen[0].shape[:-1]
        rows: list[NDArray[np.int64]] = [np.broadcast_to(part, (*shape, len(part))) for part in first.parts]
        for i, part in zip(drawn, chosen):
            rows[i] = np.moveaxis(part, axis, -1).astype(np.int64)
        return statistic(rows)

    columns = sum(s.values.shape[1] for s in samples)
    from scipy.stats import bootstrap

    generator = "rng" if "rng" in inspect.signature(bootstrap).parameters else "random_state"
    found = bootstrap(
        [first.parts[i] for i in drawn],
        of_indices,
        n_resamples=resamples,
        batch=max(1, min(resamples, _BATCH // (len(first) * min(columns, 2)))),
        vectorized=True,
        paired=False,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",
        **{generator: np.random.default_rng(seed)},
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for one purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}".encode()).digest()[:8], "little") >> 1


# -- against the parents -----------------------------------------------------------------------------------------------


def normalised(value: float, parents: Sequence[float], *, higher_is_better: bool = True) -> float | None:
    """The share of the best parent's score: ``value / best``, or ``best / value`` where lower scores are better.

    Returns:
        `None` without parents, or when a ratio has no meaning (a score that is not positive, or not finite).
    """
    if not parents:
        return None
    best = max(parents) if higher_is_better else min(parents)
    above, below = (value, best) if higher_is_better else (best, value)
    if not (math.isfinite(above) and math.isfinite(below) and below > 0 and above >= 0):
        return None
    return above / below


def synergy(parents: Sequence[float], merged: float, *, higher_is_better: bool = True) -> Synergy:
    """A merge's score against its parents' scores on the same task.

    For two parents I = Δ − V/2, so a merge improves on its best parent only where its synergy is more than half of what the
    parents differ by.

    Args:
        parents: Their scores, in any order.
        merged: The merge's.
        higher_is_better: Otherwise the signs of Δ and I are turned.

    Raises:
        UsageError: There are no parents.

    Reference:
        Lu, Luu, Buehler: Fine-tuning large language models for domain adaptation (2025), arXiv 2409.03444.
    """
    if not parents:
        raise UsageError("synergy needs the scores of the parents")
    sign = 1.0 if higher_is_better else -1.0
    expected = math.fsum(parents) / len(parents)
    best = max(parents) if higher_is_better else min(parents)
    delta = sign * (merged - expected)
    return Synergy(
        expected=expected,
        delta=delta,
        relative=delta / expected if expected else None,
        improvement=sign * (merged - best),
        diversity=max(parents) - min(parents),
    )
