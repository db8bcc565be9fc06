"""Rules that combine thinned task vectors into one and add it to the base.

Tiles of 16-bit models come as float32, which holds their differences exactly and costs half of float64. What float32 can
get wrong by more than the output's rounding is then found and computed again in float64: elements where base and change
nearly cancel, and positions where the weighted votes for the two signs nearly balance. So the result is that of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_CANCELLED = 2.0**-12
"""A float32 sum this much smaller than its summands is off by up to a quarter of a bfloat16 (two of a float16) ulp."""

_BALANCED = 2.0**-19
"""Votes that differ by less than this share of the largest are decided in float64."""


def weighted_sum(base: Tensor, deltas: Tensor, coefficients: Sequence[float]) -> Tensor:
    """θ₀ + Σ cₖ δₖ.

    Args:
        base: Shape ``(n,)`` (or rows).
        deltas: The task vectors, shape ``(T, n)``.
        coefficients: One for each task vector.
    """
    total = deltas[0] * coefficients[0]
    for c, delta in zip(coefficients[1:], deltas[1:].unbind(0), strict=True):
        total.add_(delta, alpha=c)
    total.add_(base)
    if total.dtype == torch.float32:
        found = _cancelled(total, base)
        if found.size:
            _again(total, base, deltas, found, lambda b, d: weighted_sum(b, d, coefficients))
    return total


def disjoint_merge(
    base: Tensor,
    deltas: Tensor,
    weights: Sequence[float],
    *,
    factors: Sequence[float],
    normalize: bool,
    lambda_: float = 1.0,
) -> Tensor:
    """Elect a sign for each element and merge the task vectors that agree with it (TIES): θ₀ + λ·Σ{xₖ : agree}/Σ{wₖ : agree}.

    With xₖ = wₖ fₖ δₖ the elected sign is that of Σ xₖ, + where it is exactly zero. Zeros agree with neither sign. Without
    `normalize` nothing is divided by.

    Written without masks: multiplied by the elected sign, what agrees is positive and what does not is clamped to zero.
    (Masked selection costs twenty times an addition.)

    Args:
        base, deltas: As in `weighted_sum`.
        weights: wₖ.
        factors: fₖ, what makes up for dropped elements.
        normalize: Divide by the weights that agree.
        lambda_: λ.
    """
    coefficients = [w * f for w, f in zip(weights, factors, strict=True)]
    alike = len(set(coefficients)) == len(set(weights)) == 1 and coefficients[0] > 0
    if alike:
        # Without multiplication the votes of float32 task vectors are counted exactly.
        signed, scale = deltas, coefficients[0]
    else:
        signed = deltas * torch.tensor(coefficients, dtype=deltas.dtype, device=deltas.device).view(
            -1, *[1] * (deltas.dim() - 1)
        )
        scale = 1.0
    votes = _added(signed)
    elected = elected_sign_(votes + 0.0)
    agreeing = (signed * elected).clamp_(min=0.0)
    total = _added(agreeing)
    balanced = np.empty(0, dtype=np.int64)
    if total.dtype == torch.float32 and not alike:
        flat = votes.reshape(-1).cpu().numpy()
        limit = _BALANCED * float(total.max()) if total.numel() else 0.0
        balanced = np.flatnonzero((np.abs(flat) <= limit) & (total.reshape(-1).cpu().numpy() > 0))
    if normalize:
        shares = agreeing.sign_()
        agreed = _added(shares) if alike else _added(shares, weights)
        # Where nothing agrees the sum is zero, and the divisor must not be.
        if alike or min(weights) > 0:
            agreed.clamp_(min=0.5 if alike else min(weights) / 2)
        else:
            agreed.add_(agreed.eq(0.0))
        total.div_(agreed)
        scale = scale / weights[0] if alike else scale
    total.mul_(elected)
    result = torch.add(base, total, alpha=lambda_ * scale, out=total)
    if result.dtype == torch.float32:
        found = _cancelled(result, base)
        if balanced.size:
            found = np.union1d(found, balanced)
        if found.size:

            def again(b: Tensor, d: Tensor) -> Tensor:
                return disjoint_merge(b, d, weights, factors=factors, normalize=normalize, lambda_=lambda_)

            _again(result, base, deltas, found, again)
    return result


def elected_sign_(total: Tensor) -> Tensor:
    """The sign of each element in place, + where it is zero (adding the smallest normal number changes no other)."""
    return total.add_(torch.finfo(total.dtype).tiny).sign_()


def _added(rows: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Σ wₖ rowsₖ over the first dimension, in its order: a new tensor."""
    first, *others = rows.unbind(0)
    if weights is None:
        if not others:
            return first.clone()
        total = torch.add(first, others[0])
        for row in others[1:]:
            total.add_(row)
        return total
    total = first * weights[0]
    for w, row in zip(weights[1:], others, strict=True):
        total.add_(row, alpha=w)
    return total


def _cancelled(result: Tensor, base: Tensor) -> np.ndarray:
    """Flat indices of the elements that are so much smaller than the base's that float32 does not determine them."""
    flat = np.abs(result.reshape(-1).cpu().numpy())
    origin = base.reshape(-1).cpu().numpy()
    if not flat.size:
        return np.empty(0, dtype=np.int64)
    bound = max(float(origin.max()), -float(origin.min()))
    small = np.flatnonzero(flat < _CANCELLED * bound)
    return np.asarray(small[flat[small] < _CANCELLED * np.abs(origin[small])])


def _again(
    result: Tensor, base: Tensor, deltas: Tensor, found: np.ndarray, compute: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Compute the elements `found` in float64 and put them in their places."""
    where = torch.from_numpy(found).to(result.device)
    exact = compute(base.reshape(-1)[where].double(), deltas.reshape(deltas.shape[0], -1)[:, where].double())
    result.view(-1)[where] = exact.to(result.dtype)
