"""SWUDI: the flow of IWUDI in the leading eigendirections only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.matrix.quadratic import flow, interference, start_of
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Swudi(Matrix):
    """Gradient flow on WUDI's objective up to the time t in the leading eigendirections of C; the others keep the start.

    C and D are those of `iwudi`. With a ratio of 1 it is `iwudi`. Two switches of the authors' code are off by default: a time
    of each weight's own (`rho`; what they refer it to is not written down, so it is a parameter), and a power of the filter.
    """

    name: ClassVar[str] = "swudi"
    title: ClassVar[str] = "SWUDI (spectral truncation of WUDI)"
    paper: ClassVar[str] = "MLLMerging 2026, Closed-Form Spectral Regularization (code)"
    formula: ClassVar[str] = (
        "θ = θ₀ + λ·(S − S V f Vᵀ + D V (f/Λ) Vᵀ),  f = 1 − exp(−Λt) for the ⌈ratio·n⌉ largest Λ, else 0"
    )
    when: ClassVar[str] = (
        "The first choice of the WUDI family: several fine-tunes on different tasks, without data. For a 3B language model "
        "t = 300 and a ratio of 0.85 were used, for LoRA fine-tunes a ratio of 0.01 and λ = 0.2."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
merge_method: swudi
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {t: 1300, ratio: 0.65}
dtype: bfloat16
"""

    t: float = parameter(
        1300.0, within=(0, math.inf), doc="time at which the flow stops; 0 gives the sum of task vectors"
    )
    ratio: float = parameter(0.65, within=(0, 1), doc="share of the eigendirections that flow, the largest first")
    rho: float = parameter(
        0.0,
        within=(0, 10),
        doc="ρ: a weight flows for t·(lambda_ref/Λ₁)^ρ, longer where its largest eigenvalue is small",
    )
    lambda_ref: float = parameter(
        1.0, within=(0, math.inf), above=0.0, doc="the largest eigenvalue of a weight that flows for t"
    )
    gamma: float = parameter(
        1.0, within=(0, 100), above=0.0, doc="the power of f: above 1 small eigenvalues reach less far"
    )
    start: str = parameter("sum", choices=("sum", "zero"), doc="where the flow begins: Σ τ_t or 0")

    def merge(self, deltas: Tensor) -> Tensor:
        start = start_of(deltas, self.start)
        objective = interference(deltas, spectral=True)
        if objective is None:
            return start
        number = math.ceil(self.ratio * objective.columns - 1e-9)

        def response(values: Tensor) -> Tensor:
            f = flow(values, self.t * (self.lambda_ref / float(values[0])) ** self.rho).pow_(self.gamma)
            f[number:] = 0.0
            return f

        return objective.filtered(start, response)
