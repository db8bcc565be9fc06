"""WUDI: remove the interference of task vectors in each other's subspaces by a few hundred steps of Adam."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.matrix.quadratic import interference
from geomerge.methods.properties import BASE, PERMUTATION, SIGN, SINGLE
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Wudi(Matrix):
    """Start at the sum of the task vectors and let Adam reduce what they do to each other's inputs.

    A task vector spans the inputs of its own layer, so (θ − τ_t)τ_tᵀ is, up to a factor, what the merge gets wrong on them. The
    exact minimiser is worse than a few hundred steps towards it: the early end is what regularises (`iwudi` and `swudi` make
    that end exact).

    Adam's steps are of size lr whatever the size of the task vectors, so the result does not scale with them. No weight moves
    by more than about lr·steps, and where the elements of Σ τ_t are larger than that, the result is little but that sum, which
    overshoots: choose lr accordingly. For language models λ of 0.1 to 0.3 was used as well.

    A task vector of zeros is left out. Where the start is a minimiser already, up to rounding, it is returned: Adam would
    turn the rounding into steps.
    """

    name: ClassVar[str] = "wudi"
    title: ClassVar[str] = "WUDI-Merging"
    paper: ClassVar[str] = "Cheng et al. 2025, Whoever Started the Interference Should End It, arXiv:2503.08099"
    formula: ClassVar[str] = "θ = θ₀ + λ·Adam(Σ_t ‖(τ − τ_t)τ_tᵀ‖²_F / ‖τ_t‖²_F from τ = Σ_t τ_t)"
    when: ClassVar[str] = (
        "Several full fine-tunes of one base on different tasks, without data. `swudi` gives as much in one step, and the "
        "same at every size of the task vectors."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, SIGN})
    example: ClassVar[str] = """\
merge_method: wudi
base_model: ./base
models: [{model: ./chat}, {model: ./code}, {model: ./maths}]
parameters: {steps: 300, lambda: 0.3}
dtype: bfloat16
"""

    lr: float = parameter(1e-5, within=(0, math.inf), doc="Adam's step size (2e-5 for RoBERTa)")
    steps: int = parameter(300, within=(0, 100_000), doc="steps of Adam")

    def merge(self, deltas: Tensor) -> Tensor:
        start = deltas.sum(0)
        objective = interference(deltas, spectral=False)
        return start if objective is None else objective.adam(start, self.lr, self.steps)
