"""What to do with a pair, from what was measured: the paper's guardrails and decision flow as a value that explains itself.

    sound? → fits? → vocabulary aligned (O)? → angle (ω̄)? → size class → schedule

Reference:
    Rage et al., Geometric Model Merging for Efficient and Scalable Adaptation of Large Language Models, Section on
    compatibility and Fig. 2. The paper prints no thresholds; see `geomerge.diagnose.thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from geomerge.diagnose.score import Score
from geomerge.diagnose.thresholds import Thresholds
from geomerge.engine.schedule import PRESETS

Mode = Literal["global_slerp", "layer_adaptive", "align_then_merge", "near_duplicate", "do_not_merge"]
Scope = Literal["embedding", "residual"]

MODES: dict[str, str] = {
    "global_slerp": "merge with one coefficient everywhere (global SLERP)",
    "layer_adaptive": "merge with a coefficient for each depth and role (layer-adaptive SLERP)",
    "align_then_merge": "align first, then merge",
    "near_duplicate": "near-duplicates: a merge will change little",
    "do_not_merge": "do not merge",
}


@dataclass(frozen=True)
class Evidence:
    """What a decision is made from.

    Attributes:
        score: O, Ā, ω̄ and S.
        parameters: Of one model.
        models: The models' names, in the given order.
        not_finite: In words, which tensors hold NaN or Inf.
        blocking: In words, what forbids a merge.
        same_family: Same model type, heads, activation and positions.
        likeness: How alike the models are whatever their bases (see `geomerge.diagnose.rotation`); `None` when unknown.
        assumed: O could not be measured.
        residual: The models are decoders with RMS norms, whose residual basis can be rotated without changing what they do.
        specialist: The model that is a specialist, if one is.
        aligned: Both were trained to follow instructions: they have the same chat template.
        first: Index of the model that should come first: the one that follows instructions.
        worst: In words, for more than two models: the pair that stands farthest apart.
    """

    score: Score
    parameters: int
    models: tuple[str, ...]
    not_finite: tuple[str, ...] = ()
    blocking: tuple[str, ...] = ()
    same_family: bool = True
    likeness: float | None = None
    assumed: bool = False
    residual: bool = False
    specialist: str | None = None
    aligned: bool = False
    first: int = 0
    worst: str = ""


@dataclass(frozen=True)
class Step:
    """One question of the flow.

    Attributes:
        question: What was asked.
        value: This pair's value, in words.
        limit: What it was compared with, in words.
        answer: What followed from it.
        passed: Whether the flow went on as for a good pair.
    """

    question: str
    value: str
    limit: str
    answer: str
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "question": self.question,
            "value": self.value,
            "limit": self.limit,
            "answer": self.answer,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Decision:
    """What to do, and why.

    Attributes:
        mode: See `MODES`.
        schedule: A preset of `geomerge.engine.schedule` for layer-adaptive merges; `None` for one coefficient.
        t: The coefficient of a global merge, or of the tensors that the schedule's curves do not name. 0 is the first model.
        scope: What to align first; `None` when nothing.
        order: Indices of the models in the order in which the recipe should name them.
        reasons, warnings: Sentences.
        overlap, similarity, omega_bar, score: O, Ā, ω̄, S.
        size_class: ``<1B`` … ``7B``.
        steps: The path through the flow.
    """

    mode: Mode
    schedule: str | None
    t: float
    scope: Scope | None
    order: tuple[int, ...]
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    overlap: float
    similarity: float
    omega_bar: float
    score: float
    size_class: str
    steps: tuple[Step, ...] = field(default=(), repr=False)

    @property
    def merges(self) -> bool:
        """Whether there is anything to merge."""
        return self.mode != "do_not_merge"

    @property
    def coefficients(self) -> dict[str, Any]:
        """The schedule as anchors over depth for each role, and `default` for the rest."""
        if self.schedule is None:
            return {"default": self.t}
        return {**PRESETS[self.schedule], "default": self.t}

    @property
    def headline(self) -> str:
        """The decision in one line."""
        said = MODES[self.mode]
        if not self.merges:
            return said
        how = f"schedule {self.schedule}" if self.schedule else f"t = {self.t:.3g}"
        scope = f", {self.scope} alignment" if self.scope else ""
        return f"{said}: {how}{scope}"

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [f"- {reason}" for reason in self.reasons]
        lines += [f"! {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "mode": self.mode,
            "headline": self.headline,
            "schedule": self.schedule,
            "t": self.t,
            "coefficients": None if not self.merges else self.coefficients,
            "align": self.scope,
            "order": list(self.order),
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "overlap": self.overlap,
            "similarity": self.similarity,
            "omega_bar": self.omega_bar,
            "score": self.score,
            "size_class": self.size_class,
            "steps": [step.to_json() for step in self.steps],
        }


class _Flow:
    """The flow's state while it is walked."""

    def __init__(self, evidence: Evidence, thresholds: Thresholds) -> None:
        self.e, self.limits = evidence, thresholds
        self.reasons: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[Step] = []
        self.size = thresholds.size_class(evidence.parameters)

    def ask(self, question: str, value: str, limit: str, answer: str, *, passed: bool) -> bool:
        """Note a question and its answer."""
        self.steps.append(Step(question, value, limit, answer, passed))
        return passed

    def decide(self, mode: Mode, schedule: str | None = None, t: float = 0.5, scope: Scope | None = None) -> Decision:
        """The decision with everything noted so far."""
        count = len(self.e.models)
        rest = [i for i in range(count) if i != self.e.first]
        if schedule is not None and count > 2:
            self.reasons.append("with more than two models the others share the coefficient, at their barycentre")
        if schedule is None and count > 2:
            t = 1 - 1 / count
            self.reasons.append(
                f"t = 1 − 1/{count}: with more than two models the others share it, so that all weigh the same"
            )
        return Decision(
            mode=mode,
            schedule=schedule,
            t=float(PRESETS[schedule]["default"]) if schedule is not None else t,
            scope=scope,
            order=(self.e.first, *rest),
            reasons=tuple(self.reasons),
            warnings=tuple(self.warnings),
            overlap=self.e.score.overlap,
            similarity=self.e.score.similarity,
            omega_bar=self.e.score.omega_bar,
            score=self.e.score.value,
            size_class=self.size,
            steps=tuple(self.steps),
        )


def decide(evidence: Evidence, thresholds: Thresholds | None = None) -> Decision:
    """Walk the decision flow.

    Args:
        evidence: What was measured.
        thresholds: The limits; by default geomerge's.
    """
    limits = thresholds or Thresholds()
    flow = _Flow(evidence, limits)
    refused = _sound(flow)
    if refused is not None:
        return refused
    scope = _vocabulary(flow)
    stopped, scope = _angle(flow, scope)
    if stopped is not None:
        return stopped
    return _size(flow, scope)


def _sound(flow: _Flow) -> Decision | None:
    """NaN, Inf and differences that forbid a merge."""
    bad, blocking = flow.e.not_finite, flow.e.blocking
    value = f"{len(bad)} tensors with NaN or Inf" if bad else "all finite"
    if not flow.ask("Are the weights sound?", value, "all must be finite", "stop" if bad else "go on", passed=not bad):
        flow.reasons += [f"{each}: repair or retrain this parent, or leave it out" for each in bad[:5]]
        return flow.decide("do_not_merge")
    value = "no" if blocking else "yes"
    if not flow.ask(
        "Do they fit?", value, "nothing may forbid it", "stop" if blocking else "go on", passed=not blocking
    ):
        flow.reasons += blocking
        return flow.decide("do_not_merge")
    return None


def _vocabulary(flow: _Flow) -> Scope | None:
    """Guardrail (ii): embeddings of different vocabularies are aligned on the shared tokens."""
    overlap, limit = flow.e.score.overlap, flow.limits.overlap
    good = overlap >= limit
    answer = "go on" if good else "align the embeddings on the shared tokens"
    flow.ask(
        "Do they share a vocabulary?",
        f"overlap O = {overlap:.3f}" + (" (assumed)" if flow.e.assumed else ""),
        f"at least {limit:g}",
        answer,
        passed=good,
    )
    if good:
        return None
    flow.reasons.append(
        f"only {100 * overlap:.1f} % of the tokens are common (below {100 * limit:g} %): the embeddings are turned onto each "
        "other on the shared tokens before they are merged (orthogonal Procrustes)"
    )
    if overlap < 0.3:
        flow.warnings.append("most tokens are in one vocabulary only: their rows can be copied, not merged")
    return "embedding"


def _angle(flow: _Flow, scope: Scope | None) -> tuple[Decision | None, Scope | None]:
    """Near-duplicates, and guardrail (i): too large an angle."""
    omega, limits, e = flow.e.score.omega_bar, flow.limits, flow.e
    value, limit = f"mean angle ω̄ = {omega:.4g} rad", f"from {limits.near_duplicate:g} to {limits.angle:g}"
    question = "How far apart are the weights?"
    if e.worst:
        flow.warnings.append(e.worst)
    if omega < limits.near_duplicate and scope is None:
        flow.ask(question, value, limit, "near-duplicates", passed=False)
        flow.reasons.append(
            f"the mean angle of {omega:.4g} rad is below {limits.near_duplicate:g}: any interpolation lies within rounding "
            "of the plain average"
        )
        flow.warnings.append("little to gain: evaluate the parents first; the better one may be all that is needed")
        return flow.decide("near_duplicate"), scope
    if omega <= limits.angle:
        flow.ask(question, value, limit, "go on", passed=True)
        flow.reasons.append(f"the mean angle of {omega:.3g} rad is within {limits.angle:g}: the parents share a region")
        return None, scope
    rotated = e.likeness is not None and e.likeness >= limits.rotation
    likeness = "no matrices to compare" if e.likeness is None else f"likeness {e.likeness:.3f}"
    if rotated:
        flow.ask(question, value, limit, "far: look for a rotation", passed=False)
        flow.ask(
            "Is it a rotated basis?", likeness, f"at least {limits.rotation:g}", "align the bases first", passed=True
        )
        found: Scope = "residual" if e.residual and scope is None else "embedding"
        flow.reasons.append(
            f"the weights stand at {omega:.3g} rad, but the inner products between the rows of their matrices agree "
            f"(likeness {e.likeness:.2f}): one model's hidden basis is probably a rotation of the other's, which alignment "
            "undoes"
        )
        flow.warnings.append(
            f"a merge without alignment will not work; when the mean angle after it is above {limits.angle:g}, leave it"
        )
        return flow.decide("align_then_merge", scope=found), found
    if omega > limits.stop:
        flow.ask(question, value, f"at most {limits.stop:g}", "far: look for a rotation", passed=False)
        flow.ask("Is it a rotated basis?", likeness, f"at least {limits.rotation:g}", "stop", passed=False)
        flow.reasons.clear()  # nothing is aligned that is not merged
        flow.reasons.append(
            f"the mean angle of {omega:.3g} rad exceeds {limits.stop:g}, and no rotation explains it: the models have no "
            "common origin, and what lies between them is no model"
        )
        return flow.decide("do_not_merge"), scope
    flow.ask(question, value, limit, "far: one coefficient everywhere", passed=False)
    flow.reasons.append(
        f"the mean angle of {omega:.3g} rad exceeds {limits.angle:g}: coefficients that change with depth would leave the "
        "region that the parents share, so one coefficient is used everywhere"
    )
    flow.warnings.append("score the result beside both parents before you use it")
    if scope is not None:
        return flow.decide("align_then_merge", scope=scope), scope
    return flow.decide("global_slerp"), scope


def _size(flow: _Flow, scope: Scope | None) -> Decision:
    """What the paper's experiments say about models of this size."""
    size, e = flow.size, flow.e
    parameters = said_parameters(e.parameters)
    mode: Mode = "align_then_merge" if scope is not None else "layer_adaptive"

    def answer(said: str, *, passed: bool = True) -> None:
        flow.ask("Which size class?", f"{parameters}: {size}", "classes: <1B, 1B, 2B, 3B, 6B, 7B", said, passed=passed)

    if e.specialist is not None and size != "7B":
        flow.warnings.append(f"{e.specialist} is a specialist: expect the merge to lose some of its skill")
    if size == "<1B":
        answer("one coefficient")
        flow.reasons.append(
            "below 1B parameters the paper's layer-adaptive merges lost to one coefficient everywhere"
            + ("; t from 0.5 to 0.65 is robust" if len(e.models) == 2 else "")
        )
        return flow.decide("align_then_merge" if scope else "global_slerp", scope=scope)
    if size == "1B":
        answer("schedule H65")
        flow.reasons.append("at 1B the schedule H with 0.65 elsewhere (H65) was the paper's choice")
        return flow.decide(mode, "H65", scope=scope)
    if size == "2B":
        answer("schedule H" if e.same_family else "another family: be careful", passed=e.same_family)
        if e.same_family:
            flow.reasons.append("at 2B the schedule H works for models of one family")
            return flow.decide(mode, "H", scope=scope)
        flow.reasons.append("at 2B the paper's merges across families failed, so one coefficient is the safer choice")
        flow.warnings.append("the two are not of one family: score the result, and expect to give it up")
        return flow.decide("align_then_merge" if scope else "global_slerp", scope=scope)
    if size == "3B":
        schedule = "Q" if e.aligned else "S"
        answer(f"schedule {schedule}")
        flow.reasons.append(
            "at 3B the quiet schedule Q suits models that both follow instructions already"
            if e.aligned
            else "at 3B the schedule S was the paper's best; expect a balance of both models, not a win over both"
        )
        return flow.decide(mode, schedule, scope=scope)
    if size == "6B":
        answer("schedule H65")
        flow.reasons.append("at 6B the paper used H65")
        flow.warnings.append("the paper's merges at 6B, of near-duplicates, gained little")
        return flow.decide(mode, "H65", scope=scope)
    if e.specialist is not None:
        answer("a specialist and a generalist: align or refuse", passed=False)
        if e.likeness is not None and e.likeness >= flow.limits.rotation:
            flow.reasons.append(
                f"{e.specialist} is a specialist: the paper's merges of a specialist with a generalist at 7B collapsed, so the "
                "embeddings are aligned first and one coefficient is used"
            )
            flow.warnings.append("score the result on the specialist's task and on general ones before you use it")
            return flow.decide("align_then_merge", scope=scope or "embedding")
        flow.reasons.append(
            f"{e.specialist} is a specialist: the paper's merges of a specialist with a generalist at 7B collapsed, and the "
            "two are not alike enough to be aligned"
        )
        return flow.decide("do_not_merge")
    answer("schedule H")
    flow.reasons.append("at 7B the schedules H and R did equally well when both models are strong generalists")
    flow.warnings.append("with a specialist among them the paper's merges at 7B collapsed: say so with --specialist")
    return flow.decide(mode, "H", scope=scope)


def said_parameters(count: int) -> str:
    """``494 million parameters``."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name} parameters"
    return f"{count:,} parameters"


def specialist_of(norms: Sequence[float], names: Sequence[str], ratio: float) -> str | None:
    """The model that has moved from the base so much farther than all others that it counts as a specialist.

    Args:
        norms: The norms of the task vectors.
        names: The models.
        ratio: How many times as far as the next.
    """
    if len(norms) < 2 or not all(math.isfinite(n) for n in norms):
        return None
    order = sorted(range(len(norms)), key=lambda i: -norms[i])
    return names[order[0]] if norms[order[0]] > ratio * norms[order[1]] > 0 else None
