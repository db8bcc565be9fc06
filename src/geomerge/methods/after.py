"""The steps after a method, as they are explained: what scales the merged task vector, with parameters, formula and paper.

What they do is in `geomerge.engine.steps` (numbers for each tensor), `geomerge.engine.survey` (LiNeS with `alpha: auto`) and
`geomerge.engine.activations` (AIM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from geomerge.methods.base import BaseUse, parameter
from geomerge.methods.before import STEPS, example
from geomerge.methods.chain import Step
from geomerge.methods.properties import BASE, PERMUTATION, ROTATION, SCALE, SIGN


@dataclass(frozen=True)
class After(Step):
    """One step after a method."""

    before: ClassVar[bool] = False
    base_use: ClassVar[BaseUse] = "optional"


@dataclass(frozen=True)
class Scale(After):
    """Multiply the merged task vector (the difference between the merge and the base, or the first model) by a factor."""

    name: ClassVar[str] = "scale"
    title: ClassVar[str] = "Scale (a step: the merged task vector times a factor)"
    paper: ClassVar[str] = "Ilharco et al. 2023, Editing models with task arithmetic (its λ), arXiv:2212.04089"
    formula: ClassVar[str] = "θ = θ₀ + s·(θ_merged − θ₀)"
    when: ClassVar[str] = "After a method without a λ of its own, or to take some tensors (norms, say) from the base."
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = example(
        "scale: [{role: norm, value: 0}, {value: 0.9}]", more="parameters: {density: 0.3, weight: 1.0}\n"
    )

    value: float = parameter(doc="the factor s; may be given bare, as in `scale: 0.9`")


@dataclass(frozen=True)
class Lines(After):
    """Scale the merged task vector by a factor that grows linearly with depth: shallow blocks, whose features are general, stay
    nearer to the base. Tensors outside of the blocks have depth 0.
    """

    name: ClassVar[str] = "lines"
    title: ClassVar[str] = "LiNeS (a step: layer-increasing scaling)"
    paper: ClassVar[str] = "Wang et al. 2024, LiNeS: post-training layer scaling, arXiv:2410.17146"
    formula: ClassVar[str] = (
        "θ = θ₀ + (α + β·depth)·(θ_merged − θ₀),  depth 0 for the first block, 1 for the last (or only) one;  "
        "auto: α = ‖Σ τₜ‖₁ / (T·‖θ_merged − θ₀‖₁)"
    )
    when: ClassVar[str] = (
        "After any method, when the merge forgets what the base can do, or after a sum of many task vectors."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN, ROTATION})
    example: ClassVar[str] = example(
        "lines: {alpha: auto, beta: 0.5}", "task_arithmetic", "parameters: {weight: 1.0}\n"
    )

    alpha: float | None = parameter(
        None, doc="the factor at depth 0; none or `auto`: found from the task vectors, with one more look at the model"
    )
    beta: float = parameter(doc="what is added to it up to the last block")
    post_block_scale: str = parameter(
        "alpha",
        choices=("alpha", "last"),
        doc="the factor of what is behind the blocks (final norm, head): α, as in the authors' code, or the last block's",
    )


@dataclass(frozen=True)
class Aim(After):
    """Weigh the columns of each merged weight by how active its input features are on the base: what the base uses most is
    changed least. `geomerge.observe.activations` makes the file; what it does not list, and embeddings, are left as they are.
    """

    name: ClassVar[str] = "aim"
    base_use: ClassVar[BaseUse] = "required"
    title: ClassVar[str] = "AIM (a step: activation-informed merging)"
    paper: ClassVar[str] = "Nobari et al. 2025, Activation-Informed Merging, arXiv:2502.02421"
    formula: ClassVar[str] = (
        "θ = θ₀ + (θ_merged − θ₀) ⊙ (1 − (1 − ω)·aⱼ/max a),  aⱼ the mean |xⱼ| of input feature j on the base"
    )
    when: ClassVar[str] = (
        "After a method that moves far from the base (TIES, sums of many), to keep what the base can do."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SCALE, SIGN})
    example: ClassVar[str] = example(
        "aim: {statistics: ./act.safetensors, omega: 0.4}", more="parameters: {density: 0.2, weight: 1.0}\n"
    )

    statistics: str = parameter(doc="a safetensors file with one vector for each weight, in the base's tensor names")
    omega: float = parameter(0.4, within=(0, 1), doc="1 changes nothing, 0 keeps the most active feature as it was")


AFTER: dict[str, type[After]] = {step.name: step for step in (Scale, Lines, Aim)}
"""The steps after a method by name."""


def explained_steps() -> list[type[Step]]:
    """All steps, each once, in the order in which a recipe may have them."""
    return [*dict.fromkeys(STEPS.values()), *AFTER.values()]
