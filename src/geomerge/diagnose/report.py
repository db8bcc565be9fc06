"""A diagnosis as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from geomerge.diagnose.decision import said_parameters
from geomerge.diagnose.figures import (
    angle_maps,
    coefficient_maps,
    heat_figure,
    path_figure,
    score_figure,
    task_maps,
)
from geomerge.errors import RunError
from geomerge.report import Code, Facts, Folded, Part, Row, Section, Table, render
from geomerge.report.build import check_place, replace_file
from geomerge.report.words import count, number, visible

if TYPE_CHECKING:
    from geomerge.diagnose.diagnosis import Diagnosis, Pair

_MOST_PAIRS = 15
_FARTHEST = 20


def write_report(found: Diagnosis, out: Path) -> None:
    """Write the page.

    Raises:
        UsageError: The place is taken by what is no report, or its directory does not exist.
        RunError: It cannot be written.
    """
    check_place(out, None)
    page = to_html(found)
    try:
        replace_file(out, page.encode())
    except OSError as error:
        raise RunError(f"the report cannot be written: {error.strerror}", where=str(out)) from None


def to_html(found: Diagnosis) -> str:
    """The page: nothing in it is loaded from elsewhere."""
    names = ", ".join(visible(name, 60) for name in found.names)
    shown = found.pairs[:_MOST_PAIRS]
    sections = [_decision(found)]
    if len(found.pairs) > 1:
        sections.append(_all_pairs(found))
    for i, pair in enumerate(shown):
        sections.append(_pair(found, pair, f"{i}-" if len(shown) > 1 else ""))
    sections.append(_provenance(found))
    return render(
        f"Diagnosis of {names}",
        sections,
        headline=_sentence(found.decision.headline),
        lead=list(found.decision.warnings[:2]),
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _decision(found: Diagnosis) -> Section:
    decision = found.decision
    parts: list[Part] = [path_figure("decision-path", decision)]
    parts += [_sentence(reason) for reason in decision.reasons]
    parts += [f"Warning: {warning}." for warning in decision.warnings]
    if decision.merges:
        maps = coefficient_maps(decision, found.parts, found.pairs[0].angles.groups)
        parts.append(
            heat_figure(
                "coefficients",
                maps,
                alt=f"The recommended coefficient for each role and block: {decision.headline}.",
                caption="Recommended coefficients over depth: 0 is the first model of the recipe, 1 the other. Blocks from "
                "left to right (“in” before the first, “out” after the last), one row a role.",
                top=1.0,
            )
        )
        parts.append(Code(found.recipe().strip("\n"), "The recipe"))
    return Section("Decision", parts)


def _all_pairs(found: Diagnosis) -> Section:
    rows = [
        Row(
            (
                f"{visible(found.names[p.a], 40)} – {visible(found.names[p.b], 40)}",
                f"{p.score.omega_bar:.4g}",
                f"{p.score.overlap:.3f}",
                f"{p.score.value:.3f}",
                p.decision.mode.replace("_", " "),
            ),
            "accent" if i == found.nearest else "",
        )
        for i, p in enumerate(found.pairs)
    ]
    left = len(found.pairs) - _MOST_PAIRS
    note = (
        f"Nearest first in colour. {left} pairs have no section of their own." if left > 0 else "The nearest in colour."
    )
    return Section(
        "Pairs", [Table(("pair", "ω̄ (rad)", "O", "S", "decision for the pair"), rows, frozenset({0, 4}), note=note)]
    )


def _pair(found: Diagnosis, pair: Pair, prefix: str) -> Section:
    names = visible(found.names[pair.a], 40), visible(found.names[pair.b], 40)
    parts: list[Part] = [score_figure(f"{prefix}score", pair.score)]
    maps = angle_maps(pair.angles.groups)
    if maps:
        parts.append(
            heat_figure(
                f"{prefix}angles",
                maps,
                alt=f"Angles between {names[0]} and {names[1]} by role and block, {pair.score.omega_bar:.4g} rad in the mean.",
                caption=f"Angles in radians over depth and role. Mean {pair.score.omega_bar:.4g}, weighted by parameters "
                f"{pair.angles.omega_weighted:.4g}.",
            )
        )
    tasks = task_maps(pair.angles.groups)
    if tasks:
        angle, signs, support = pair.angles.task_means()
        parts.append(
            heat_figure(
                f"{prefix}task-angles",
                tasks,
                alt=f"Angles between the task vectors of {names[0]} and {names[1]} by role and block.",
                caption=f"Angles between the task vectors (a right angle is 1.571). Mean {number(angle)} rad, sign agreement "
                f"{number(signs)} (chance: 0.5), overlap of the largest {100 * found.thresholds.top:g} % {number(support)} "
                f"(chance: {found.thresholds.top:g}).",
                top=3.1416,
            )
        )
    parts.append(Facts(_facts(pair)))
    parts.append(_differences(pair))
    parts.append(_farthest(pair))
    return Section(f"{names[0]} and {names[1]}" if prefix else "Measurements", parts)


def _facts(pair: Pair) -> list[tuple[str, str]]:
    tokens = pair.tokens
    rows = [
        ("tokens", tokens.assumed or f"{tokens.shared:,} common, {tokens.only_a:,} and {tokens.only_b:,} in one only")
    ]
    if tokens.same_ids is not None:
        rows.append(("same ids", f"{100 * tokens.same_ids:.4g} % of the common tokens"))
    rows.append(("chat template", tokens.chat))
    if pair.likeness is not None:
        rows.append(
            (
                "likeness in any basis",
                f"{pair.likeness:.3f} (debiased CKA of the rows of matrices, which no rotation changes)",
            )
        )
    if pair.cka is not None:
        layers = ", ".join(f"{layer}: {v:.3f}" for layer, v in zip(pair.cka.layers, pair.cka.values, strict=True))
        rows.append(
            ("CKA of hidden states", f"mean {pair.cka.mean:.3f} over {pair.cka.samples} {pair.cka.unit} ({layers})")
        )
    return rows


def _differences(pair: Pair) -> Part:
    if not pair.differences:
        return "Nothing else differs: same config, number format, vocabulary."
    rows = [Row((d.severity, visible(d.what, 300), visible(d.advice, 300))) for d in pair.differences]
    return Table(("", "what differs", "what to do"), rows, frozenset({0, 1, 2}), caption="Differences")


def _farthest(pair: Pair) -> Part:
    known = [t for t in pair.angles.tensors if t.angle is not None]
    far = sorted(known, key=lambda t: -(t.angle or 0.0))[:_FARTHEST]
    rows = [
        Row(
            (
                visible(t.name, 80),
                number(t.angle, 4),
                number(t.cosine, 4),
                *(number(n, 4) for n in t.norms),
                number(t.ratio),
            )
        )
        for t in far
    ]
    columns = ("tensor", "angle", "cosine", "norm", "norm", "ratio")
    return Folded(f"The {len(far)} tensors that stand farthest apart", [Table(columns, rows)])


def _provenance(found: Diagnosis) -> Section:
    limits = found.thresholds
    rows = [(visible(name, 40), visible(model)) for name, model in zip(found.names, found.models, strict=True)]
    if found.base is not None:
        rows.append(("base", visible(found.base)))
    rows += [
        ("family", f"{visible(found.family)}, {said_parameters(found.parameters)}"),
        (
            "thresholds",
            (
                f"overlap O at least {limits.overlap:g}; mean angle at most {limits.angle:g}, beyond {limits.stop:g} only "
                f"with a rotation that explains it; below {limits.near_duplicate:g} near-duplicates"
            ),
        ),
        (
            "weights of the score",
            f"α {limits.alpha:g}, β {limits.beta:g}, γ {limits.gamma:.4g}; Ā is {limits.similarity}",
        ),
    ]
    if found.base is not None:
        rows.append(
            ("signs and supports", "of every element" if found.exact else "estimated on a sample of each tensor")
        )
    if found.not_finite:
        rows.append(("not finite", "; ".join(visible(str(n)) for n in found.not_finite[:10])))
    if found.skipped:
        rows.append(("left out", f"{count(len(found.skipped), 'tensor')} that not all models have"))
    return Section("What was compared", [Facts(rows)])
