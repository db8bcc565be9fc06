"""The compatibility score S = αO + βĀ − γω̄ of two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from geomerge.diagnose.thresholds import Thresholds


@dataclass(frozen=True)
class Score:
    """The score and its parts.

    Attributes:
        overlap: O, the share of common tokens, 0 to 1.
        similarity: Ā, the mean over the groups of layers of their similarity.
        omega_bar: ω̄ in radians, the unweighted mean angle over the groups (a block's tensors of one role).
        alpha, beta, gamma: The weights.

    Reference:
        Rage et al., Geometric Model Merging for Efficient and Scalable Adaptation of Large Language Models, Eq. 7.
    """

    overlap: float
    similarity: float
    omega_bar: float
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 2 / math.pi

    @classmethod
    def of(cls, overlap: float, similarity: float, omega_bar: float, thresholds: Thresholds) -> Score:
        """The score with the thresholds' weights."""
        return cls(overlap, similarity, omega_bar, thresholds.alpha, thresholds.beta, thresholds.gamma)

    @property
    def terms(self) -> tuple[float, float, float]:
        """αO, βĀ, −γω̄."""
        return self.alpha * self.overlap, self.beta * self.similarity, -self.gamma * self.omega_bar

    @property
    def value(self) -> float:
        """S."""
        return math.fsum(self.terms)

    @property
    def best(self) -> float:
        """The score of a model with itself, α + β."""
        return self.alpha + self.beta

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "value": self.value,
            "best": self.best,
            "overlap": self.overlap,
            "similarity": self.similarity,
            "omega_bar": self.omega_bar,
            "alpha": self.alpha,
            "beta": self.beta,
            "gamma": self.gamma,
        }
