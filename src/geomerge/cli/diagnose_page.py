"""A diagnosis for people: the decision and its path, the score, a map of the angles, what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomerge.cli.console import bullets, clean, count, facts, heading, show, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from geomerge.diagnose.diagnosis import Diagnosis, Pair
    from geomerge.report.heatmap import Grid

SHADES = "▁▂▃▄▅▆▇█"
"""From nothing to the largest: readable without colour."""

_WIDEST = 64
"""Blocks that a map shows one by one; of more, neighbours share a cell."""

_MOST_PAIRS = 6


def show_diagnosis(found: Diagnosis) -> None:
    """The page on stdout."""
    show(facts(_header(found)))
    show(heading("decision"), clean(found.decision.headline))
    if found.decision.reasons:
        show(bullets(clean(reason) for reason in found.decision.reasons))
    if found.decision.warnings:
        show(facts(("!", clean(warning)) for warning in found.decision.warnings))
    show(heading("how it was reached"), _path(found))
    if len(found.pairs) > 1:
        show(heading("pairs"), _pairs(found))
    for pair in found.pairs[:_MOST_PAIRS]:
        _show_pair(found, pair)
    if len(found.pairs) > _MOST_PAIRS:
        show(heading(f"{len(found.pairs) - _MOST_PAIRS} more pairs: --json has them all"))
    if found.not_finite:
        show(heading("not finite"), bullets(clean(n) for n in found.not_finite[:20]))


def _header(found: Diagnosis) -> list[tuple[str, str]]:
    from geomerge.diagnose.decision import said_parameters

    rows = [(clean(name), clean(model)) for name, model in zip(found.names, found.models, strict=True)]
    if found.base is not None:
        rows.append(("base", clean(found.base)))
    rows.append(
        (
            "family",
            f"{clean(found.family)}, {said_parameters(found.parameters)}, size class {found.decision.size_class}",
        )
    )
    return rows


def _path(found: Diagnosis) -> RenderableType:
    rows = [
        (clean(s.question), clean(s.value), clean(s.limit), ("" if s.passed else "! ") + clean(s.answer))
        for s in found.decision.steps
    ]
    return table(("question", "here", "limit", "so"), rows)


def _pairs(found: Diagnosis) -> RenderableType:
    rows = [
        (
            f"{clean(found.names[p.a])} - {clean(found.names[p.b])}",
            f"{p.score.omega_bar:.4g}",
            f"{p.score.overlap:.3f}",
            f"{p.score.value:.3f}",
            p.decision.mode.replace("_", " ") + (" (nearest)" if i == found.nearest else ""),
        )
        for i, p in enumerate(found.pairs)
    ]
    return table(("pair", "ω̄", "O", "S", "decision"), rows, right=("ω̄", "O", "S"))


def _show_pair(found: Diagnosis, pair: Pair) -> None:
    from geomerge.diagnose.figures import angle_maps

    if len(found.pairs) > 1:
        show(heading(f"{clean(found.names[pair.a])} and {clean(found.names[pair.b])}"))
    show(heading("score"), facts(_score(pair)))
    for one in angle_maps(pair.angles.groups):
        module = f" of {clean(one.module)}" if one.module else ""
        show(heading(f"angles over depth{module} (radians)"), heat_map(one))
    if found.base is not None:
        show(heading("task vectors"), facts(_tasks(found, pair)))
    show(heading("tokens and representations"), facts(_tokens(pair)))
    if pair.differences:
        rows = [(d.severity, clean(d.what), clean(d.advice)) for d in pair.differences]
        show(heading("differences"), table(("", "what", "what to do"), rows))


def _score(pair: Pair) -> list[tuple[str, str]]:
    s = pair.score
    o, a, w = s.terms
    return [
        ("S", f"{s.value:.4f} of {s.best:g} = αO {o:.4f} + βĀ {a:.4f} − γω̄ {-w:.4f}"),
        ("O", f"{s.overlap:.4f} of the tokens are common"),
        ("Ā", f"{s.similarity:.5f} mean similarity"),
        ("ω̄", f"{s.omega_bar:.4g} rad mean angle; weighted by parameters {pair.angles.omega_weighted:.4g}"),
    ]


def heat_map(one: Grid) -> RenderableType:
    """A map in shades, with the range of each row behind it."""
    cells = _folded(one.columns)
    largest = max(one.values.values(), default=0.0) or 1.0
    rows = []
    for role in one.roles:
        known = [v for (r, _), v in one.values.items() if r == role]
        line = "".join(_shade([one.values.get((role, c)) for c in cell], largest) for cell in cells)
        rows.append((role, f"│{line}│", f"{min(known):.3g}", f"{max(known):.3g}"))
    legend = f"{SHADES[0]} to {largest / len(SHADES):.2g} … {SHADES[-1]} to {largest:.3g}"
    named = [one.columns[0], one.columns[-1]]
    scale = (
        f" {named[0]}{' ' * max(len(cells) - len(named[0]) - len(named[1]), 1)}{named[1]}" if len(cells) > 1 else " "
    )
    rows.append(("", scale, "", legend))
    return table(("role", "", "least", "most"), rows)


def _folded(columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    step = -(-len(columns) // _WIDEST)
    return [columns[i : i + step] for i in range(0, len(columns), step)]


def _shade(values: list[float | None], largest: float) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "·"
    return SHADES[min(int(len(SHADES) * max(known) / largest * 0.999), len(SHADES) - 1)]


def _tasks(found: Diagnosis, pair: Pair) -> list[tuple[str, str]]:
    angle, signs, support = pair.angles.task_means()
    norms = pair.angles.task_norms()
    how = "every element" if found.exact else "a sample"
    rows = []
    if angle is not None:
        rows.append(("angle", f"{angle:.3f} rad (a right angle: 1.571)"))
    if signs is not None:
        rows.append(("same sign", f"{100 * signs:.1f} % of the elements that both moved (chance: 50 %), from {how}"))
    if support is not None:
        top = found.thresholds.top
        rows.append(
            ("support", f"{100 * support:.1f} % of the largest {100 * top:g} % are common (chance: {100 * top:g} %)")
        )
    if norms is not None:
        rows.append(("norms", f"{norms[0]:.4g} and {norms[1]:.4g}"))
        rows.append(
            ("to the base", ", ".join(f"{clean(n)} {a:.4g} rad" for n, a in zip(found.names, found.base_angles)))
        )
    return rows


def _tokens(pair: Pair) -> list[tuple[str, str]]:
    t = pair.tokens
    said = (
        t.assumed
        or f"{count(t.shared, 'token')} common, {t.only_a:,} only in the first, {t.only_b:,} only in the second"
    )
    rows = [("vocabulary", clean(said))]
    if t.same_ids is not None:
        rows.append(("same ids", f"{100 * t.same_ids:.4g} % of the common tokens"))
    if t.specials is not None:
        rows.append(("special tokens", f"{100 * t.specials:.4g} % agree"))
    rows.append(("chat template", t.chat))
    if pair.likeness is not None:
        rows.append(
            ("likeness", f"{pair.likeness:.3f} in any basis: of the rows of matrices, which no rotation changes")
        )
    if pair.cka is not None:
        c = pair.cka
        ends = f"{min(c.values):.3f} to {max(c.values):.3f}"
        rows.append(("hidden states", f"CKA {c.mean:.3f} ({ends} over {len(c.values)} layers, {c.samples} {c.unit})"))
    return rows
