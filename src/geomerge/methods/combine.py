"""Rules that combine thinned task vectors into one and add it to the base.

Tiles of 16-bit models come as float32, which holds nearly all of their differences exactly and costs half of float64. What
float32 can get wrong by more than the output's rounding is then found and computed again in float64: elements whose terms
nearly cancel, and positions where the votes for the two signs nearly balance. So the result is that of float64. Which
elements these are is decided for each by its own numbers, so that it does not depend on the tile's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from geomerge.methods import native
from geomerge.methods.tile import Scan, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.selection import Selection
    from geomerge.methods.walk import Walk


_CANCELLED = {"BF16": 2.0**-11, "F16": 2.0**-9}
"""A float32 sum this much smaller than its summands is off by a tenth of the dtype's ulp."""

_GAP = 2.0**-12
"""A difference of two 16-bit numbers, one of which is this much smaller, may not fit float32."""

Exact = Callable[["np.ndarray"], tuple["Tensor", "Tensor"]]
"""Gives the base's and the thinned task vectors' elements at flat indices of a tile in float64, exactly."""


def exactly(tile: Tile, found: np.ndarray) -> tuple[Tensor, Tensor]:
    """Elements of a float32 tile whose inputs have become (thinned) task vectors, in float64: see `Exact`.

    Differences that float32 may have rounded are made anew from the sources.
    """
    where = torch.from_numpy(found).to(tile.base.device)
    base = tile.base.reshape(-1)[where].double()
    deltas = tile.stack[1:].reshape(len(tile.stack) - 1, -1)[:, where].double()
    doubtful = ((deltas + base).abs() < _GAP * base.abs()) | (base.abs() < _GAP * deltas.abs())
    doubtful &= (deltas != 0.0) & (base != 0.0)
    for k in torch.nonzero(doubtful.any(1)).flatten().tolist():
        places = torch.nonzero(doubtful[k]).flatten()
        if len(places) > _FEW:
            inputs = torch.empty(tile.numel, dtype=torch.float64, device=base.device)
            tile.scan.sources[k + 1].read(tile.start, inputs)
            inputs = inputs[where[places]]
        else:
            inputs = torch.empty(len(places), dtype=torch.float64, device=base.device)
            for i, place in enumerate(places.tolist()):
                tile.scan.sources[k + 1].read(tile.start + int(found[place]), inputs[i : i + 1])
        deltas[k, places] = inputs - base[places]
    return base, deltas


_FEW = 32
"""More elements than this are not read one by one."""


def cancelled(scan: Scan) -> float:
    """How much smaller than its summands a float32 sum of a tile may be before it is computed again in float64."""
    return min(_CANCELLED.get(source.dtype, 1.0) for source in scan.sources)


def weighted_sum(base: Tensor, deltas: Tensor, coefficients: Sequence[float], exact: Exact, limit: float) -> Tensor:
    """θ₀ + Σ cₖ δₖ.

    Args:
        base: Shape ``(n,)`` (or rows).
        deltas: The task vectors, shape ``(T, n)``.
        coefficients: One for each task vector.
        exact: The same elements in float64, where float32 does not do.
        limit: See `cancelled`.
    """
    total = deltas[0] * coefficients[0]
    for c, delta in zip(coefficients[1:], deltas[1:].unbind(0), strict=True):
        total.add_(delta, alpha=c)
    total.add_(base)
    if total.dtype == torch.float32 and total.numel():
        bound = _largest(base) + max(abs(c) for c in coefficients) * len(coefficients) * _largest(deltas)
        found = _below(total, limit * bound)
        if found.size:
            where = torch.from_numpy(found).to(total.device)
            size = base.reshape(-1)[where].abs()
            for c, delta in zip(coefficients, deltas.unbind(0), strict=True):
                size.add_(delta.reshape(-1)[where].abs_(), alpha=abs(c))
            found = found[(total.view(-1)[where].abs() < limit * size).cpu().numpy()]
        if found.size:
            _again(total, found, exact, lambda b, d: weighted_sum(b, d, coefficients, exact, limit))
    return total


def disjoint_merge(
    base: Tensor,
    deltas: Tensor,
    weights: Sequence[float],
    exact: Exact,
    limit: float,
    *,
    factors: Sequence[float],
    normalize: bool,
    lambda_: float = 1.0,
    furthest: bool = False,
    tie: float = 1.0,
) -> Tensor:
    """Elect a sign for each element and merge the task vectors that agree with it (TIES): θ₀ + λ·Σ{xₖ : agree}/Σ{wₖ : agree}.

    With xₖ = wₖ fₖ δₖ the elected sign is that of Σ xₖ. Zeros agree with neither sign. Without `normalize` nothing is divided
    by, nor where the weights that agree cancel.

    Written without masks: multiplied by the elected sign, what agrees is positive and what does not is clamped to zero.
    (Masked selection costs twenty times an addition.)

    Args:
        base, deltas, exact, limit: As in `weighted_sum`.
        weights: wₖ.
        factors: fₖ, what makes up for dropped elements.
        normalize: Divide by the weights that agree.
        lambda_: λ.
        furthest: Of what agrees take the largest instead of the sum (and divide by nothing).
        tie: The sign where Σ xₖ is exactly zero; 0: nothing is merged there.
    """
    coefficients = [w * f for w, f in zip(weights, factors, strict=True)]
    alike = len(set(coefficients)) == len(set(weights)) == 1 and coefficients[0] > 0
    if alike:
        # Without multiplication float32 counts votes exactly, so long as the task vectors are no 2¹⁶ times apart.
        signed, scale = deltas, coefficients[0]
    else:
        signed = deltas * torch.tensor(coefficients, dtype=deltas.dtype, device=deltas.device).view(
            -1, *[1] * (deltas.dim() - 1)
        )
        scale = 1.0
    votes = added(signed.unbind(0))
    elected = elected_sign(votes, tie)
    agreeing = (signed * elected).clamp_(min=0.0)
    total = added(agreeing.unbind(0))
    disputed = np.empty(0, dtype=np.int64)
    if total.dtype == torch.float32 and not alike:
        disputed = _disputed(votes, total, len(deltas))
    if furthest:
        total = agreeing.amax(0)
    elif normalize:
        shares = agreeing.sign_()
        agreed = added(shares.unbind(0), None if alike else weights)
        # Where nothing agrees the sum is zero, and the divisor must not be.
        if alike or min(weights) > 0:
            agreed.clamp_(min=0.5 if alike else min(weights) / 2)
        else:
            agreed.masked_fill_(agreed.abs() <= native.nothing(weights), 1.0)
        total.div_(agreed)
        scale = scale / weights[0] if alike else scale
    total.mul_(elected)
    result = torch.add(base, total, alpha=lambda_ * scale, out=total)
    if result.dtype == torch.float32 and result.numel():
        found = _below(result, limit * _largest(base))
        found = found[np.abs(_numpy(result)[found]) < limit * np.abs(_numpy(base)[found])]
        if disputed.size:
            found = np.union1d(found, disputed)
        if found.size:

            def again(b: Tensor, d: Tensor) -> Tensor:
                return disjoint_merge(
                    b,
                    d,
                    weights,
                    exact,
                    limit,
                    factors=factors,
                    normalize=normalize,
                    lambda_=lambda_,
                    furthest=furthest,
                    tie=tie,
                )

            _again(result, found, exact, again)
    return result


def elected_sign(total: Tensor, tie: float = 1.0) -> Tensor:
    """The sign of each element, and where it is zero that of `tie`."""
    if not tie:
        return total.sign()
    negative = total.lt(0.0 if tie > 0 else _LEAST[total.element_size()])
    return negative.to(total.dtype).mul_(-2.0).add_(1.0)


_LEAST = {4: 2.0**-149, 8: 2.0**-1074}
"""The smallest number above zero, by a number's bytes."""


class Surveyed(NamedTuple):
    """What a method that trims and elects knows of the whole model.

    Attributes:
        selections: The largest elements by tensor; `None` where all are kept.
        majority: The sign that most elements elect, 1 or −1; 0 when there are as many of each.
    """

    selections: Mapping[str, list[Selection]] | None
    majority: float = 1.0


def majority(walk: Walk, voting: Callable[[Scan], Callable[[Tile], Tensor]]) -> float:
    """The sign that most elements of a model have, 1 or −1; 0 when there are as many of each.

    Args:
        walk: The tensors.
        voting: Gives what computes a tensor's votes for each tile; it can be recorded (`geomerge.methods.program`).
    """

    def signs(scan: Scan) -> float:
        if not scan.numel:
            return 0.0
        votes = voting(scan)
        return scan.sums(lambda tile: [votes(tile).sign_()], recorded=True)[0]

    total = math.fsum(walk.over(signs))
    return float((total > 0) - (total < 0))


def added(parts: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Σ wₖ partsₖ, in their order: a new tensor."""
    first, *others = parts
    if weights is None:
        if not others:
            return first.clone()
        total = first + others[0]
        for part in others[1:]:
            total.add_(part)
        return total
    total = first * weights[0]
    for w, part in zip(weights[1:], others, strict=True):
        total.add_(part, alpha=w)
    return total


def _numpy(values: Tensor) -> np.ndarray:
    return values.reshape(-1).cpu().numpy()


def _largest(values: Tensor) -> float:
    low, high = torch.aminmax(values)
    return max(-low.item(), high.item())


def _below(values: Tensor, limit: float) -> np.ndarray:
    """Flat indices of the elements of smaller magnitude."""
    return np.flatnonzero(np.abs(_numpy(values)) < limit)


def _disputed(votes: Tensor, agreeing: Tensor, voters: int) -> np.ndarray:
    """Flat indices of the votes that float32 may have counted wrongly.

    Each of the votes' terms is off by at most three roundings and each sum by one, and the terms add up to no more than
    twice those that agree and the difference.
    """
    return np.flatnonzero(_numpy(votes.abs() < (agreeing * ((voters + 3) * 2.0**-23))))


def _again(result: Tensor, found: np.ndarray, exact: Exact, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Compute the elements `found` in float64 and put them in their places."""
    result.view(-1)[torch.from_numpy(found).to(result.device)] = compute(*exact(found)).to(result.dtype)
