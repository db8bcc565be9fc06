"""Exponential functions with the same bits everywhere: on every processor, and recorded (`geomerge.methods.program`).

Libraries differ in the last bit from one version or processor to the next, and a last bit decides which elements are among the
largest. These are sums of powers, right to about one unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from geomerge.methods.program import Value

if TYPE_CHECKING:
    from torch import Tensor

_PER_LN2 = 1.4426950408889634
_LN2 = (0.6931471803691238, 1.9082149292705877e-10)
"""ln 2 in two parts: whole multiples of the first, up to 2²⁰, are exact."""
_ROUNDS = 1.5 * 2.0**52
"""Added to a number and taken away again it leaves a whole number."""
_TERMS = tuple(1 / math.factorial(n) for n in range(13, 1, -1))

_FLAT = (-1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3)
"""Of tanh's series, which does up to 2⁻⁵."""
_ODD = tuple(1 / n for n in range(21, 1, -2))
_FEW_ODD = _ODD[-6:]
_ROOT_OF_HALF = 0x3FE6A09E667F3BCD
"""The bits of √½."""


def exp(x: Tensor) -> Tensor:
    """eˣ in float64, from −708 to 709; numbers beyond count as these."""
    if isinstance(x, Value):
        return x.exp()
    power, r, p = _reduced(x.clamp(-708.0, 709.0))
    return p.mul_(r).mul_(r).add_(r).add_(1.0).mul_(power)


def tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent in float64."""
    if isinstance(x, Value):
        return x.tanh()
    square = x * x
    flat = polynomial(square, _FLAT).mul_(square).mul_(x).add_(x)
    power, r, p = _reduced(x.abs().clamp_(max=20.0).mul_(2.0))
    less_one = p.mul_(r).mul_(r).add_(r).mul_(power).add_(power.sub_(1.0))  # e²ˣ − 1
    return torch.where(x.abs() < 2.0**-5, flat, less_one.div_(less_one + 2.0).mul_(x.sign()))


def log_of_ratio(p: Tensor, q: Tensor) -> Tensor:
    """ln(p/q) of positive normal float64 numbers, of nearly equal ones from their difference."""
    f = p.sub(q).div_(p + q)
    return torch.where(f.abs() < 2.0**-4, near_log(f), log(p / q))


def near_log(f: Tensor) -> Tensor:
    """ln((1 + f)/(1 − f)) for sizes below 2⁻⁴."""
    square = f * f
    twice = f + f
    return polynomial(square, _FEW_ODD).mul_(square).mul_(twice).add_(twice)


def log(x: Tensor) -> Tensor:
    """The natural logarithm of positive normal float64 numbers."""
    bits = x.view(torch.int64)
    k = (bits - _ROOT_OF_HALF).bitwise_right_shift_(52)
    m = (bits - (k << 52)).view(torch.float64)  # from √½ to √2
    k = k.to(torch.float64)
    f = m.sub(1.0).div_(m + 1.0)
    square = f * f
    f.add_(f)
    return polynomial(square, _ODD).mul_(square).mul_(f).add_(f).add_(k, alpha=_LN2[1]).add_(k, alpha=_LN2[0])


def _reduced(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2ᵏ, r = x − k ln 2 of at most ln 2/2, and (eʳ − 1 − r)/r²."""
    k = x.mul(_PER_LN2).add_(_ROUNDS).sub_(_ROUNDS)
    r = x.add(k, alpha=-_LN2[0]).add_(k, alpha=-_LN2[1])
    power = k.to(torch.int64).add_(1023).bitwise_left_shift_(52).view(torch.float64)
    return power, r, polynomial(r, _TERMS)


def polynomial(x: Tensor, terms: Sequence[float]) -> Tensor:
    """Σ termsₖ xⁿ⁻ᵏ: from the highest power down, one rounding for each."""
    total = torch.full_like(x, terms[0])
    for term in terms[1:]:
        total = torch.full_like(x, term).addcmul_(total, x)
    return total
