"""IWUDI: the gradient flow that WUDI follows, stopped at a time, in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.matrix.quadratic import flow, interference, start_of
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor

TIKHONOV = 0.01
LANDWEBER = 0.9, 150


@register
@dataclass(frozen=True)
class Iwudi(Matrix):
    """WUDI's objective minimised by gradient flow up to the time t, which is a filter on the eigenvalues of C.

    With C = Σ_t τ_tᵀτ_t/‖τ_t‖² = VΛVᵀ and D = Σ_t τ_tτ_tᵀτ_t/‖τ_t‖² the minimiser is DC⁺; large eigenvalues reach it first,
    and small ones, where the task vectors say little, stay at the start. The filter f says how far each has come.
    Eigenvalues below 10⁻⁸ count as that, in f and where they are divided by.
    """

    name: ClassVar[str] = "iwudi"
    title: ClassVar[str] = "IWUDI (implicit regularisation of WUDI)"
    paper: ClassVar[str] = "MLLMerging 2026, Closed-Form Spectral Regularization (code)"
    formula: ClassVar[str] = "θ = θ₀ + λ·(S − S V f Vᵀ + D V (f/Λ) Vᵀ),  S = Σ_t τ_t,  f = 1 − exp(−Λt)"
    when: ClassVar[str] = (
        "As WUDI, without steps and step sizes: one eigendecomposition a weight, and the result scales with the task vectors."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: iwudi
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {t: 300}
dtype: bfloat16
"""

    t: float = parameter(
        300.0, within=(0, math.inf), doc="time at which the flow stops; 0 gives the sum of task vectors"
    )
    filter: str = parameter(
        "flow",
        choices=("flow", "tikhonov", "landweber", "none"),
        doc="f = 1 − exp(−Λt), Λ/(Λ + 0.01), 1 − (1 − 0.9 Λ/Λ₁)^150, or 1 (the minimiser itself)",
    )
    start: str = parameter("sum", choices=("sum", "zero"), doc="where the flow begins: Σ τ_t or 0")

    def merge(self, deltas: Tensor) -> Tensor:
        start = start_of(deltas, self.start)
        objective = interference(deltas, spectral=True)
        return start if objective is None else objective.filtered(start, self._response)

    def _response(self, values: Tensor) -> Tensor:
        if self.filter == "tikhonov":
            return values / (values + TIKHONOV)
        if self.filter == "landweber":
            step, number = LANDWEBER
            return 1.0 - (1.0 - step * values / values[0]) ** number
        return torch.ones_like(values) if self.filter == "none" else flow(values, self.t)
