"""The quadratic objective behind the WUDI family, its descent, and its minimiser through a spectral filter.

    L(θ) = Σ_t ‖(θ − a_t) P_tᵀ‖²_F      with a target a_t (rows × columns) and a probe P_t (k × columns) for each task

Its gradient is 2(θC − D) with C = Σ P_tᵀP_t and D = Σ a_tP_tᵀP_t, so the tasks are gone after one multiplication each, and a
step of descent costs one product with C. Where the stacked probes B have fewer rows than C, they take its place: C = BᵀB,
D = MB with M = [a₁P₁ᵀ … a_TP_Tᵀ]. What the eigenvectors of C do, those of the smaller BBᵀ do as well then:

    θ + (D − θC) V φ(Λ) Vᵀ = θ + (M − θBᵀ) Q φ(Λ) Qᵀ B      C = VΛVᵀ, BBᵀ = QΛQᵀ
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from geomerge.methods.eigen import eigh, gram

if TYPE_CHECKING:
    from torch import Tensor


FLOOR = 1e-8
"""Smaller eigenvalues count as this. Those of WUDI's C do not depend on the task vectors' size: its trace is their number."""

ROUNDING = 1e-14
"""Eigenvalues below this share of the largest have vectors of rounding errors."""

NULL = 1e-10
"""Eigenvalues below this share of the largest are rounding errors of zero, for whoever divides by them."""

SETTLED = 1e-7
"""A gradient that is this much smaller than D is rounding, which Adam would blow up to steps of full size."""


class Quadratic:
    """The objective of some tasks.

    Args:
        targets: a_t, shape ``(T, rows, columns)``.
        probes: P_t, shape ``(T, k, columns)``.
        factored: Keep C and D as products of thin matrices.
    """

    def __init__(self, targets: Tensor, probes: Tensor, *, factored: bool) -> None:
        self.columns = targets.shape[-1]
        self.factored = factored
        if factored:
            self.stacked = probes.flatten(0, 1)
            self.image = torch.cat([a @ p.T for a, p in zip(targets, probes, strict=True)], 1)
            return
        self.gram = torch.zeros(self.columns, self.columns, dtype=targets.dtype, device=targets.device)
        self.image = torch.zeros_like(targets[0])
        for target, probe in zip(targets, probes, strict=True):
            square = gram(probe.T)
            self.image += target @ square
            self.gram += square

    def descent(self, theta: Tensor) -> Tensor:
        """D − θC, half the direction of steepest descent."""
        if self.factored:
            return torch.mm(torch.addmm(self.image, theta, self.stacked.T, alpha=-1), self.stacked)
        return torch.addmm(self.image, theta, self.gram, alpha=-1)

    def settled(self, theta: Tensor) -> bool:
        """Whether θ is a minimiser up to rounding."""
        size = torch.linalg.vector_norm(self.image @ self.stacked if self.factored else self.image)
        return bool(torch.linalg.vector_norm(self.descent(theta)) <= SETTLED * size)

    def adam(self, start: Tensor, lr: float, steps: int) -> Tensor:
        """Adam from a start (β = 0.9, 0.999; ε = 10⁻⁸ is added to the root, after the correction of its bias)."""
        theta = start.clone()
        if self.settled(theta):
            return theta
        return adam(theta, lambda now: self.descent(now).mul_(-2.0), lr, steps)

    def momentum(self, start: Tensor, lr: float, steps: int, beta: float = 0.9) -> Tensor:
        """Gradient descent with momentum: u ← βu + ∇L, θ ← θ − lr·u."""
        theta, velocity = start.clone(), torch.zeros_like(start)
        for _ in range(steps):
            velocity.mul_(beta).add_(self.descent(theta), alpha=-2.0)
            theta.sub_(velocity, alpha=lr)
        return theta

    def filtered(self, start: Tensor, response: Callable[[Tensor], Tensor]) -> Tensor:
        """θ − θ V f Vᵀ + D V (f/Λ) Vᵀ from the start θ: the minimiser where f = 1, the start where f = 0.

        Args:
            start: Shape ``(rows, columns)``.
            response: f for the eigenvalues of C, none below `FLOOR`, largest first: shape ``(e,)`` → ``(e,)``, e ≤ columns.
                Those that are zero may be missing: no task says anything in their directions.
        """
        values, vectors = self._spectrum()
        counted = values.clamp(min=FLOOR)
        shares = response(counted)
        found = self._moved(start, vectors, shares / counted)
        weak = (values < FLOOR) & (values > ROUNDING * values[0])
        if bool(weak.any()):
            # With an eigenvalue that is raised, θC/Λ is less than θ: what is left of it goes, too.
            values, vectors, left = values[weak], vectors[:, weak], (shares * (1 - values / counted))[weak]
            if self.factored:
                vectors, left = self.stacked.T @ vectors, left / values
            found.addmm_((start @ vectors) * left, vectors.T, alpha=-1.0)
        return found

    def nearest(self, start: Tensor) -> Tensor:
        """The minimiser that lies closest to a start."""
        values, vectors = self._spectrum()
        return self._moved(start, vectors, torch.where(values > NULL * values[0], 1.0 / values, 0.0))

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        return eigh(gram(self.stacked, upper=True) if self.factored else self.gram)

    def _moved(self, start: Tensor, vectors: Tensor, factors: Tensor) -> Tensor:
        """θ + (D − θC)·V φ Vᵀ."""
        if self.factored:
            rest = self.image - start @ self.stacked.T
            return torch.addmm(start, (rest @ vectors * factors) @ vectors.T, self.stacked)
        return torch.addmm(start, self.descent(start) @ vectors * factors, vectors.T)


def adam(theta: Tensor, gradient: Callable[[Tensor], Tensor], lr: float, steps: int) -> Tensor:
    """Kingma and Ba 2015 on θ, in place: θ ← θ − lr · (m / (1 − β₁ⁱ)) / (√(v / (1 − β₂ⁱ)) + ε).

    Args:
        theta: The start.
        gradient: Of θ; a new tensor, which is overwritten.
        lr, steps: Step size and number of steps.
    """
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    root = torch.empty_like(theta)
    for i in range(1, steps + 1):
        g = gradient(theta)
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        torch.sqrt(square, out=root).div_((1 - beta2**i) ** 0.5).add_(epsilon)
        theta.addcdiv_(mean, root, value=-lr / (1 - beta1**i))
    return theta


def norms(deltas: Tensor) -> Tensor:
    """‖τ_t‖_F: shape ``(T,)``."""
    size: Tensor = torch.linalg.vector_norm(deltas.flatten(1), dim=1)
    return size


def interference(deltas: Tensor, *, spectral: bool) -> Quadratic | None:
    """WUDI's objective Σ_t ‖(θ − τ_t)τ_tᵀ‖² / ‖τ_t‖² over the tasks that changed the weight; `None` if none did.

    Args:
        deltas: Shape ``(T, rows, columns)``.
        spectral: It is to be solved by eigenvectors, not by many steps: these two are worth a factored C at other shapes.
    """
    size = norms(deltas)
    changed = size > 0
    if not bool(changed.any()):
        return None
    deltas, size = deltas[changed], size[changed]
    tasks, rows, columns = deltas.shape
    stacked = tasks * rows
    factored = stacked < columns if spectral else 2 * stacked < columns
    return Quadratic(deltas, deltas / size.view(-1, 1, 1), factored=factored)


def start_of(deltas: Tensor, start: str) -> Tensor:
    """Where a flow begins: at the ``sum`` of the task vectors, or at ``zero``."""
    return deltas.sum(0) if start == "sum" else torch.zeros_like(deltas[0])


def flow(values: Tensor, t: float) -> Tensor:
    """f = 1 − exp(−λt): how far gradient descent has come in each eigendirection at time t."""
    return torch.expm1(values * -t).neg_()
