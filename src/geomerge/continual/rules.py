"""How the running sum S takes in the next task vector, and what is made of it: θ = θ₀ + S·factor.

Each rule is a frozen value of parameters, declared as those of methods are, with a pure function for one step on one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Method, parameter
from geomerge.methods.direct import Function
from geomerge.methods.elementwise.ties import Ties
from geomerge.methods.matrix.opcm import cleaned, mean_norm
from geomerge.methods.properties import BASE, IDENTICAL, PERMUTATION, ROTATION, SCALE, SIGN, SINGLE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rule(Method):
    """One way of taking in experts one after the other."""

    family: ClassVar[str] = "continual"

    @classmethod
    def usage(cls) -> str:
        return f"geomerge continue --method {cls.name}"

    def whole(self, matrix: bool) -> bool:
        """Whether a step needs all of a tensor at once (`matrix`: it is a weight matrix), not element by element."""
        return False

    def step(self, total: Tensor, delta: Tensor, count: int, matrix: bool) -> Tensor:
        """The next sum.

        Args:
            total: S so far (zeros at first), float64; flat, or of the tensor's shape where the step needs it whole.
            delta: The new task vector, likewise. Both may be overwritten.
            count: Which expert it is, from 1.
            matrix: The tensor is a weight matrix.
        """
        raise NotImplementedError

    def factor(self, norm: float, norms: float, count: int) -> float:
        """What S is multiplied by in the merged model.

        Args:
            norm: ‖S‖ over all tensors.
            norms: Σ ‖τ_t‖ over all experts so far, each over all tensors.
            count: The number of experts.
        """
        return 1.0


@dataclass(frozen=True)
class Opcm(Rule):
    """Add what of each task vector is orthogonal to the leading directions of the sum; keep the mean norm of the experts."""

    name: ClassVar[str] = "opcm"
    title: ClassVar[str] = "Continual OPCM (orthogonal projection-based merging)"
    paper: ClassVar[str] = "Tang et al. 2025, Merging Models on the Fly Without Retraining, arXiv:2501.09522"
    formula: ClassVar[str] = "θ = θ₀ + S/λ,  S ← S + P_S(τ_t),  λ = ‖S‖ / mean ‖τ‖"
    when: ClassVar[str] = (
        "Experts of one base that arrive one after the other, when the earlier ones are gone: time and memory of a step "
        "do not grow. Their order matters a little; with all experts at hand compare TSV-M or a WUDI method."
    )
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SINGLE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
geomerge continue ./merged ./cars --base ./base
geomerge continue ./merged ./birds
"""

    alpha: float = parameter(
        0.5, within=(0, 1), doc="share of the singular values that the protected directions make up"
    )
    zero_diagonal: bool = parameter(True, doc="remove the diagonal, too (false: the paper's published numbers)")

    def whole(self, matrix: bool) -> bool:
        return matrix

    def step(self, total: Tensor, delta: Tensor, count: int, matrix: bool) -> Tensor:
        if matrix and count > 1 and delta.numel():
            delta = cleaned(total, delta, self.alpha, zero_diagonal=self.zero_diagonal)
        return total.add_(delta)

    def factor(self, norm: float, norms: float, count: int) -> float:
        return mean_norm(norm, norms, count)


@dataclass(frozen=True)
class Average(Rule):
    """The mean of all experts so far."""

    name: ClassVar[str] = "average"
    title: ClassVar[str] = "Continual average"
    paper: ClassVar[str] = "Wortsman et al. 2022, Model soups, arXiv:2203.05482"
    formula: ClassVar[str] = "θ = θ₀ + Σ τ_t / T"
    when: ClassVar[str] = "The plainest way, and what the others must better: the mean of all experts so far."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, IDENTICAL, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
geomerge continue ./merged ./cars --base ./base --method average
geomerge continue ./merged ./birds
"""

    def step(self, total: Tensor, delta: Tensor, count: int, matrix: bool) -> Tensor:
        return total.add_(delta)

    def factor(self, norm: float, norms: float, count: int) -> float:
        return 1.0 / count


@dataclass(frozen=True)
class TaskArithmetic(Rule):
    """Each task vector is added, scaled."""

    name: ClassVar[str] = "task_arithmetic"
    title: ClassVar[str] = "Continual task arithmetic"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089"
    formula: ClassVar[str] = "θ = θ₀ + λ Σ τ_t"
    when: ClassVar[str] = "Few experts, and λ known from a validation set: the sum grows with each."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = """\
geomerge continue ./merged ./cars --base ./base --method task_arithmetic --lambda 0.3
geomerge continue ./merged ./birds
"""

    lambda_: float = parameter(0.3, doc="factor of every task vector")

    def step(self, total: Tensor, delta: Tensor, count: int, matrix: bool) -> Tensor:
        return total.add_(delta)

    def factor(self, norm: float, norms: float, count: int) -> float:
        return self.lambda_


@dataclass(frozen=True)
class ContinualTies(Rule):
    """The TIES merge of the sum and the new task vector is added to the sum, scaled; so is the first one, as it is."""

    name: ClassVar[str] = "ties"
    title: ClassVar[str] = "Continual TIES"
    paper: ClassVar[str] = "Yadav et al. 2023, TIES-Merging, arXiv:2306.01708"
    formula: ClassVar[str] = "θ = θ₀ + S,  S = λ·τ₁ first, then S ← S + λ·TIES(S, τ_t) with sums of what agrees"
    when: ClassVar[str] = "Experts that disagree about signs, as a baseline: later ones weigh more than earlier ones."
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SCALE})
    example: ClassVar[str] = """\
geomerge continue ./merged ./cars --base ./base --method ties --density 0.2
geomerge continue ./merged ./birds
"""

    lambda_: float = parameter(0.5, doc="factor of what each step adds")
    density: float = parameter(0.2, within=(0, 1), above=0, doc="share of the elements of a tensor that is kept")

    def whole(self, matrix: bool) -> bool:
        return True

    def step(self, total: Tensor, delta: Tensor, count: int, matrix: bool) -> Tensor:
        if count > 1 and delta.numel():
            zero = torch.zeros_like(delta)
            delta = Function(Ties)(zero, [total, delta], weight=1.0, density=self.density, normalize=False)
        return total.add_(delta, alpha=self.lambda_)


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Opcm, Average, TaskArithmetic, ContinualTies)}
"""By name."""


def norm(squares: list[float]) -> float:
    """The root of an exact sum."""
    return math.sqrt(math.fsum(squares))
