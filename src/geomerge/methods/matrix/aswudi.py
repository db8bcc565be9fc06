"""ASWUDI: WUDI's minimiser in as many eigendirections as the spectrum itself says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.matrix.quadratic import FLOOR, interference, start_of
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-6


@register
@dataclass(frozen=True)
class Aswudi(Matrix):
    """The exact minimiser of WUDI's objective in the K leading eigendirections of C, the sum of task vectors in the others.

    K is the participation ratio of √Λ. C and D are those of `iwudi`. The authors' code raises every eigenvalue to 10⁻⁸ first,
    which makes K grow with the zero eigenvalues of a C that lacks full rank; here eigenvalues below 10⁻⁶ of the largest do
    not count, unless `reference_floor` asks for that.
    """

    name: ClassVar[str] = "aswudi"
    title: ClassVar[str] = "ASWUDI (adaptive spectral truncation of WUDI)"
    paper: ClassVar[str] = "MLLMerging 2026, Closed-Form Spectral Regularization (code)"
    formula: ClassVar[str] = (
        "θ = θ₀ + λ·(S − S V f Vᵀ + D V (f/Λ) Vᵀ),  f = 1 for the K = ⌈(Σ√Λ)²/ΣΛ⌉ largest Λ, else 0"
    )
    when: ClassVar[str] = "As `swudi`, when nothing is known that its two parameters could be chosen by: this has none."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: aswudi
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
dtype: bfloat16
"""

    reference_floor: bool = parameter(
        False, doc="raise all eigenvalues to 1e-8 before K is counted (the authors' code)"
    )

    start: str = parameter("sum", choices=("sum", "zero"), doc="what the other directions keep: Σ τ_t or 0")

    def merge(self, deltas: Tensor) -> Tensor:
        start = start_of(deltas, self.start)
        objective = interference(deltas, spectral=True)
        if objective is None:
            return start

        def response(values: Tensor) -> Tensor:
            f = torch.zeros_like(values)
            f[: self._number(values, objective.columns)] = 1.0
            return f

        return objective.filtered(start, response)

    def _number(self, values: Tensor, columns: int) -> int:
        """K from the eigenvalues of C, of which those that are zero for want of rank may be missing."""
        if self.reference_floor:
            absent = columns - len(values)
            values = values.clamp(min=FLOOR)
            roots = values.sqrt().sum().item() + absent * math.sqrt(FLOOR)
            total = values.sum().item() + absent * FLOOR
        else:
            values = values[values >= _SMALL * values[0]]
            roots, total = values.sqrt().sum().item(), values.sum().item()
        # Equal eigenvalues give a whole number, which rounding must not raise by one.
        return math.ceil(roots**2 / total - 1e-9)
