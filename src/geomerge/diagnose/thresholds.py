"""Every number that a diagnosis compares with, in one place. All of them are settings.

The paper on layer-adaptive SLERP gives the form of the score and of the guardrails but no numbers; what stands here are
geomerge's defaults, and the reports print the values that were used beside the values that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from geomerge.errors import RecipeError, UsageError, did_you_mean

SIMILARITIES = ("cosine", "cka")


@dataclass(frozen=True)
class Thresholds:
    """Weights of the score and limits of the decision.

    Attributes:
        alpha, beta, gamma: Weights of S = αO + βĀ − γω̄; with 2/π the term of a right angle is 1, as large as the others.
        similarity: What Ā is the mean of: ``cosine`` of the weights, or ``cka`` of the hidden states (needs a probe).
        overlap: τ_O: below this share of common tokens the embeddings are aligned on the shared tokens first.
        angle: τ_ω in radians: above this mean angle SLERP's great circles leave the region that the parents share.
        stop: Above this mean angle, in radians, and without a rotation that explains it, the pair is not to be merged:
            models of independent initialisation stand at about 1 to 1.5.
        near_duplicate: τ_dup in radians: below this mean angle there is little to gain.
        rotation: The likeness (debiased CKA of the rows of matrices, which no rotation of the hidden basis changes) from which
            large angles are taken to be a rotated basis, which alignment undoes.
        specialist: How many times farther than the other a model must have moved from the base to count as a specialist.
        top: The share of a task vector's elements that counts as its support.
        small, one, two, three, six: The largest parameter counts, in billions, of the size classes <1B, 1B, 2B, 3B and 6B;
            above is 7B.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 2 / math.pi
    similarity: str = "cosine"
    overlap: float = 0.9
    angle: float = 0.5
    stop: float = 0.8
    near_duplicate: float = 0.005
    rotation: float = 0.5
    specialist: float = 3.0
    top: float = 0.2
    small: float = 0.9
    one: float = 1.6
    two: float = 2.7
    three: float = 4.5
    six: float = 6.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "similarity":
                if value not in SIMILARITIES:
                    raise UsageError(
                        f"the threshold 'similarity' must be {' or '.join(SIMILARITIES)}, not {value!r}",
                    )
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UsageError(f"the threshold {field.name!r} must be a positive number, not {value!r}")
        if not self.near_duplicate <= self.angle <= self.stop:
            raise UsageError(
                f"the thresholds must rise: near_duplicate {self.near_duplicate:g} ≤ angle {self.angle:g} ≤ stop {self.stop:g}",
                hint="set the others, too",
            )
        if not self.small <= self.one <= self.two <= self.three <= self.six:
            raise UsageError("the thresholds must rise: small ≤ one ≤ two ≤ three ≤ six")
        for name in ("overlap", "rotation", "top"):
            if getattr(self, name) > 1:
                raise UsageError(f"the threshold {name!r} is a share and cannot exceed 1")

    def size_class(self, parameters: int) -> str:
        """The paper's size class of a model: ``<1B``, ``1B``, ``2B``, ``3B``, ``6B`` or ``7B``."""
        limits = {"<1B": self.small, "1B": self.one, "2B": self.two, "3B": self.three, "6B": self.six}
        return next((name for name, limit in limits.items() if parameters <= limit * 1e9), "7B")

    def changed(self, values: Mapping[str, Any]) -> Thresholds:
        """The same with some values replaced.

        Raises:
            UsageError: There is no such threshold, or the value cannot be.
        """
        known = {field.name for field in fields(self)}
        for name in values:
            if name not in known:
                raise UsageError(f"there is no threshold {name!r}", hint=did_you_mean(str(name), known))
        return replace(self, **values)


def read_thresholds(path: str | Path) -> Thresholds:
    """Thresholds from a YAML file: a mapping from names to numbers.

    Raises:
        RecipeError: It cannot be read, or a name or value in it cannot be; the message has the line.
    """
    from geomerge.recipe.document import Table, plain, read_documents, read_text

    documents = read_documents(read_text(Path(path), str(path)), str(path))
    if len(documents) != 1 or not isinstance(documents[0], Table):
        raise RecipeError("a file of thresholds is one mapping", where=str(path), hint="as in `angle: 0.6`")
    table = documents[0]
    made = Thresholds()
    given = plain(table)
    for key, (where, _) in table.entries.items():
        if key not in {field.name for field in fields(Thresholds)}:
            known = [field.name for field in fields(Thresholds)]
            raise RecipeError(f"there is no threshold {key!r}", where=str(where), hint=did_you_mean(str(key), known))
    try:
        made = made.changed(given)
    except UsageError as error:
        raise RecipeError(error.what, where=str(path), hint=error.hint) from None
    return made


def parse_threshold(text: str) -> tuple[str, Any]:
    """``angle=0.6`` from the command line.

    Raises:
        UsageError: It is not of that form.
    """
    name, sign, value = text.partition("=")
    if not sign or not name.strip() or not value.strip():
        raise UsageError(f"a threshold is given as NAME=VALUE, not {text!r}", hint="as in --threshold angle=0.6")
    try:
        return name.strip(), float(value)
    except ValueError:
        return name.strip(), value.strip()
