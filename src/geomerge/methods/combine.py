"""Rules that combine thinned task vectors into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Σ wₖ δₖ, divided by Σ wₖ if asked; overwrites the first task vector.

    Weights that sum to (nearly) zero are not divided by; methods refuse them before.
    """
    total = deltas[0].mul_(weights[0])
    for w, delta in zip(weights[1:], deltas[1:], strict=True):
        total.add_(delta, alpha=w)
    divisor = sum(weights)
    return total.div_(divisor) if normalize and abs(divisor) >= 1e-8 else total


def elected_sign_(total: Tensor) -> Tensor:
    """The sign of each element in place, + where it is zero (adding 10⁻³⁰⁰ changes no other number)."""
    return total.add_(1e-300).sign_()


def disjoint_merge(deltas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """Elect a sign for each element and merge the task vectors that agree with it (TIES).

    The elected sign is that of Σ wₖ δₖ, + where it is exactly zero. Zeros agree with neither sign. The result is the sum
    of the agreeing wₖ δₖ, divided by the sum of their wₖ when `normalize`.

    Written without masks: multiplied by the elected sign, what agrees is positive and what does not is clamped to zero.
    (Masked selection costs twenty times an addition.)

    Args:
        deltas: The task vectors of one tile; overwritten.
        weights: One for each.
        normalize: Divide by the agreeing weights.
    """
    for w, x in zip(weights, deltas, strict=True):
        if w != 1.0:
            x.mul_(w)
    elected = deltas[0].clone()
    for x in deltas[1:]:
        elected.add_(x)
    elected_sign_(elected)
    total: Tensor | None = None
    agreeing: Tensor | None = None
    for w, x in zip(weights, deltas, strict=True):
        x.mul_(elected).clamp_(min=0.0)
        if normalize:
            share = torch.sign(x)
            agreeing = share.mul_(w) if agreeing is None else agreeing.add_(share, alpha=w)
        total = x if total is None else total.add_(x)
    assert total is not None
    total.mul_(elected)
    if agreeing is not None:
        # Where nothing agrees the sum is zero, and the divisor must not be.
        if min(weights) > 0:
            agreeing.clamp_(min=min(weights) / 2)
        else:
            agreeing.add_(agreeing.eq(0.0))
        total.div_(agreeing)
    return total
