"""The figures of a diagnosis: heat maps over depth × role, the score's parts, the decision's path."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from geomerge.anatomy.roles import ROLES
from geomerge.diagnose.angles import Reading
from geomerge.diagnose.decision import Decision
from geomerge.diagnose.group import Group, group_of
from geomerge.diagnose.score import Score
from geomerge.engine.schedule import Schedule
from geomerge.recipe.values import Where
from geomerge.report import Figure
from geomerge.report.drawing import Colour, canvas
from geomerge.report.heatmap import Grid, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from geomerge.anatomy import Part


def angle_maps(groups: Sequence[Reading]) -> list[Grid]:
    """The angles of a pair's groups, a map for each module."""
    return _maps({g.group: g.angle for g in groups if g.angle is not None})


def task_maps(groups: Sequence[Reading]) -> list[Grid]:
    """The angles of the task vectors."""
    return _maps({g.group: g.task.angle for g in groups if g.task is not None and g.task.angle is not None})


def coefficient_maps(decision: Decision, parts: Mapping[str, Part], groups: Sequence[Reading]) -> list[Grid]:
    """The coefficients that a decision recommends, in the same cells."""
    schedule = Schedule(decision.coefficients, Where("diagnosis", 1))
    wanted = {g.group for g in groups}
    found: dict[Group, float] = {}
    for part in parts.values():
        group = group_of(part)
        if group in wanted:
            found[group] = schedule(part)
    return _maps(found)


def _maps(values: Mapping[Group, float]) -> list[Grid]:
    made = []
    for module in dict.fromkeys(g.module for g in values):
        here = {g: v for g, v in values.items() if g.module == module}
        blocks = sorted({int(g.column) for g in here if g.column.isdigit()})
        columns = ["in", *map(str, blocks), "out"]
        made.append(
            Grid(
                "",
                tuple(r for r in ROLES if any(g.role == r for g in here)),
                tuple(c for c in columns if any(g.column == c for g in here)),
                {(g.role, g.column): v for g, v in here.items()},
                module,
            )
        )
    return made


def heat_figure(name: str, maps: Sequence[Grid], alt: str, caption: str, *, top: float | None = None) -> Figure:
    """A heat map over depth × role, a panel for each module.

    Args:
        name: The file's name.
        maps: What to draw.
        alt, caption: See `Figure`.
        top: The number of the strongest colour; by default the largest.
    """
    return Figure(name, lambda width: draw(maps, width, largest=top), alt=alt, caption=caption)


def score_figure(name: str, score: Score) -> Figure:
    """The parts of the score as a waterfall."""
    return Figure(
        name,
        lambda width: _waterfall(score, width),
        alt=f"The score {score.value:.3f} is the overlap term {score.terms[0]:.3f} plus the similarity term "
        f"{score.terms[1]:.3f} plus the angle term {score.terms[2]:.3f}.",
        caption=f"S = αO + βĀ − γω̄. A model with itself has {score.best:g}.",
        width=5.6,
    )


def _waterfall(score: Score, width: float) -> Drawing:
    drawing = canvas(width, 1.65)
    axes = drawing.subplots()
    o, a, w = score.terms
    rows = [
        (f"αO: {score.alpha:g} × {score.overlap:.3f}", 0.0, o, Colour.ACCENT),
        (f"βĀ: {score.beta:g} × {score.similarity:.4f}", o, a, Colour.ACCENT),
        (f"−γω̄: {score.gamma:.3g} × {score.omega_bar:.4g}", o + a, w, Colour.WARM),
        ("S", 0.0, score.value, Colour.PARENT),
    ]
    edges = [v for _, start, length, _ in rows for v in (start, start + length)]
    low, high = min(0.0, *edges), max(score.best, *edges)
    axes.grid(axis="x")
    axes.axvline(score.best, color=Colour.MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    for y, (_, start, length, colour) in enumerate(rows):
        axes.barh(y, length, left=start, height=0.6, color=colour, zorder=2)
        axes.annotate(
            f"{length:.3f}".replace("-", "−"),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(40, 0),
            textcoords="offset points",
            ha="right",
            va="center_baseline",
            fontsize=8,
            fontweight="bold" if y == 3 else "normal",
        )
    axes.set_xlim(low - 0.02 * (high - low), high * 1.02)
    axes.set_ylim(3.5, -0.5)
    axes.set_yticks(range(4), [row[0] for row in rows])
    return drawing


def path_figure(name: str, decision: Decision) -> Figure:
    """The questions of the flow from top to bottom with this pair's values, and where they lead."""
    said = "; ".join(f"{s.question} {s.value}: {s.answer}" for s in decision.steps)
    return Figure(
        name,
        lambda width: _path(decision, width),
        alt=f"{said}. Decision: {decision.headline}.",
        caption="The path through the decision flow with this pair's values. Full dots: as for a good pair; open ones: not.",
    )


def _path(decision: Decision, width: float) -> Drawing:
    wide = width > 5
    cut = 84 if wide else 42
    steps = [
        (
            s.question,
            textwrap.wrap(f"{s.value}  ({s.limit})", cut),
            textwrap.wrap(f"→ {s.answer}", cut),
            s.passed,
        )
        for s in decision.steps
    ]
    end = textwrap.wrap(decision.headline, cut - 8)
    line = 0.17
    heights = [line * (1 + len(v) + len(a)) + 0.14 for _, v, a, _ in steps]
    total = sum(heights) + line * len(end) + 0.25
    drawing = canvas(width, total)
    axes = drawing.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(total, 0)
    y, centres = 0.15, []
    for (question, value, answer, passed), height in zip(steps, heights, strict=True):
        centres.append(y)
        face = Colour.ACCENT if passed else Colour.PAPER
        axes.scatter([0.12], [y], s=46, facecolor=face, edgecolor=Colour.ACCENT if passed else Colour.WARM, zorder=3)
        axes.text(0.32, y, question, va="center", fontweight="bold", fontsize=8.5)
        at = y + line
        for text in value:
            axes.text(0.32, at, text, va="center", fontsize=8, color=Colour.MUTED)
            at += line
        for text in answer:
            axes.text(0.32, at, text, va="center", fontsize=8, color=Colour.INK if passed else Colour.WARM)
            at += line
        y += height
    axes.plot([0.12, 0.12], [centres[0], y], color=Colour.RULE, linewidth=1.4, zorder=1)
    colour = Colour.ACCENT if decision.merges else Colour.WARM
    axes.scatter([0.12], [y], s=80, marker="s", color=colour, zorder=3)
    for i, text in enumerate(end):
        axes.text(0.32, y + i * line, text, va="center", fontweight="bold", fontsize=9.5, color=colour)
    return drawing
