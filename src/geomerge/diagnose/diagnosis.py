"""What a diagnosis found, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from geomerge.anatomy import Part
from geomerge.diagnose.angles import PairAngles
from geomerge.diagnose.cka import LayerSimilarity
from geomerge.diagnose.decision import Decision
from geomerge.diagnose.recipe import RecipeFacts, to_recipe
from geomerge.diagnose.score import Score
from geomerge.diagnose.thresholds import Thresholds
from geomerge.diagnose.tokens import TokenComparison
from geomerge.engine.config_differences import Difference
from geomerge.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class NotFinite:
    """A tensor that holds NaN or Inf."""

    model: str
    tensor: str
    nan: int
    inf: int

    def __str__(self) -> str:
        parts = [f"{n:,} {what}" for n, what in ((self.nan, "NaN"), (self.inf, "Inf")) if n]
        return f"{self.model}: {self.tensor} holds {' and '.join(parts)}"


@dataclass(frozen=True)
class Pair:
    """Two of the models.

    Attributes:
        a, b: Indices of the models.
        angles: Tensor by tensor and group by group.
        tokens: Their tokenizers.
        differences: What else differs.
        score: S and its parts.
        likeness: How alike they are whatever their bases: see `geomerge.diagnose.rotation`.
        cka: CKA of the hidden states, when it was asked for.
        decision: What to do with these two alone.
    """

    a: int
    b: int
    angles: PairAngles
    tokens: TokenComparison
    differences: tuple[Difference, ...]
    score: Score
    likeness: float | None
    cka: LayerSimilarity | None
    decision: Decision


@dataclass(frozen=True)
class Diagnosis:
    """A diagnosis of two or more models.

    Attributes:
        models: The models' references, as given.
        names: What they are called here.
        base: The base's reference.
        parameters: Of the first model.
        family: The first model's family, and whether it was guessed.
        pairs: All pairs, in order.
        nearest: The pair with the smallest mean angle, as an index in `pairs`.
        base_angles: With a base: each model's mean angle to it.
        not_finite: Tensors that hold NaN or Inf.
        skipped: Tensors that not all models have.
        decision: What to do with all of them.
        thresholds: What was compared with.
        exact: Whether signs and supports were counted on every element, not on a sample.
        parts: What each compared tensor is.
        facts: What a recipe needs beside the decision.
    """

    models: tuple[str, ...]
    names: tuple[str, ...]
    base: str | None
    parameters: int
    family: str
    pairs: tuple[Pair, ...]
    nearest: int
    base_angles: tuple[float, ...]
    not_finite: tuple[NotFinite, ...]
    skipped: Mapping[str, tuple[str, ...]]
    decision: Decision
    thresholds: Thresholds
    exact: bool
    parts: Mapping[str, Part] = field(repr=False)
    facts: RecipeFacts = field(repr=False)

    def recipe(self) -> str:
        """The decision as a recipe (YAML).

        Raises:
            UsageError: The decision is not to merge.
        """
        return to_recipe(self.decision, self.facts)

    def pair(self, a: int, b: int) -> Pair:
        """The pair of two of the models, in any order."""
        return next(p for p in self.pairs if {p.a, p.b} == {a, b})

    def to_json(self, *, tensors: bool = True) -> dict[str, Any]:
        """Plain data.

        Args:
            tensors: With every tensor's readings.
        """
        return {
            "format": FORMAT,
            "kind": "diagnosis",
            "geomerge": __version__,
            "models": [{"model": m, "name": n} for m, n in zip(self.models, self.names, strict=True)],
            "base": self.base,
            "parameters": self.parameters,
            "family": self.family,
            "decision": self.decision.to_json(),
            "pairs": [self._pair(p, tensors=tensors) for p in self.pairs],
            "nearest": [self.names[self.pairs[self.nearest].a], self.names[self.pairs[self.nearest].b]],
            "angles_to_base": dict(zip(self.names, self.base_angles, strict=True)) if self.base_angles else None,
            "not_finite": [asdict(n) for n in self.not_finite],
            "not_in_all": {name: list(without) for name, without in self.skipped.items()},
            "task_vector_statistics": "exact" if self.exact else "sampled",
            "thresholds": asdict(self.thresholds),
        }

    def _pair(self, pair: Pair, *, tensors: bool) -> dict[str, Any]:
        angle, signs, support = pair.angles.task_means()
        made: dict[str, Any] = {
            "models": [self.names[pair.a], self.names[pair.b]],
            "score": pair.score.to_json(),
            "omega_weighted": pair.angles.omega_weighted,
            "mean_cosine": pair.angles.mean_cosine,
            "likeness": pair.likeness,
            "cka": None if pair.cka is None else pair.cka.to_json(),
            "tokens": pair.tokens.to_json(),
            "differences": [d.to_json() for d in pair.differences],
            "task_vectors": None
            if self.base is None
            else {
                "angle": angle,
                "sign_agreement": signs,
                "support_overlap": support,
                "norms": pair.angles.task_norms(),
            },
            "decision": pair.decision.to_json(),
            "groups": [g.to_json() for g in pair.angles.groups],
        }
        if tensors:
            made["tensors"] = [t.to_json() for t in pair.angles.tensors]
        return made
