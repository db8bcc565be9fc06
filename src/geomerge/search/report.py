"""The search's page: how it went, what mattered, the best schedules over depth, validation beside held out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from geomerge.report.drawing import Colour
from geomerge.report.section import Code, Figure, Row, Section, Table
from geomerge.search.run import Found, importance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

BEST = 5


def write_report(found: Found, out: Path) -> None:
    """Write the page of a search.

    Raises:
        UsageError: The place cannot be written to.
    """
    from geomerge.report.build import check_place, replace_file
    from geomerge.report.page import render

    check_place(out, None)
    best, preset = found.trials[found.best], found.trials[found.best_preset]
    value, low, high = found.difference
    clear = "better than" if low > 0 else "worse than" if high < 0 else "not clearly better than"
    headline = f"The best of {len(found.trials)} candidates is {clear} the best preset on samples that the search has not seen."
    lead = (
        f"Held out: {value:+.4f} against the preset {preset.name}, 95 % interval {low:+.4f} to {high:+.4f}, paired by sample.",
        f"On the search half {_called(found.best, best.name).lower()} scores {best.value:.4f}, the preset {preset.value:.4f}.",
    )
    page = render("Search of a merge's coefficients", sections(found), headline=headline, lead=lead)
    replace_file(out, page.encode("utf-8"))


def sections(found: Found) -> list[Section]:
    """The page's sections."""
    parts = list(found.held_out[0].parts)
    held = Table(
        ("model", "objective", *parts),
        [
            Row(
                (h.name, f"{h.value:.4f}", *(f"{h.parts[p]:.4f}" for p in parts)),
                tone="accent" if h.name == "best" else "",
            )
            for h in found.held_out
        ],
        note=f"Optimism gap of the winner (search half minus held out): {found.optimism:+.4f}.",
    )
    trials = Table(
        ("trial", "kind", "objective", "blend s", "score s"),
        [
            Row(
                (str(t.number + 1), t.name, f"{t.value:.4f}", f"{t.blend:.2f}", f"{t.score:.2f}"),
                tone="accent" if t.number == found.best else "",
            )
            for t in found.trials
        ],
        words=frozenset({1}),
    )
    shares = importance(found.trials, found.study.seed)
    made = [
        Section(
            "Held out", ("The winner, the best preset and the parents on samples that the search has not seen.", held)
        ),
        Section(
            "Course",
            (Figure("course", lambda width: _course(found, width), "The objective of each trial and the best so far"),),
        ),
        Section(
            "Schedules",
            (
                Figure(
                    "schedules", lambda width: _schedules(found, width), "Coefficients over depth of the best trials"
                ),
            ),
        ),
        Section("The winning recipe", (Code(found.recipe),)),
        Section("Trials", (trials,)),
    ]
    if shares:
        text = "The share of each number in the objective's variance over the trials (fANOVA)."
        figure = Figure("importance", lambda width: _importance(shares, width), "The importance of each number")
        made.insert(3, Section("What mattered", (text, figure)))
    return made


def _called(number: int, name: str) -> str:
    return f"Trial {number + 1}" if name == "trial" else f"The preset {name}"


def _axes(width: float, height: float) -> tuple[Drawing, Axes]:
    from matplotlib.figure import Figure as Made

    figure = Made(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _course(found: Found, width: float) -> Drawing:
    figure, axis = _axes(width, 2.8)
    numbers = [t.number + 1 for t in found.trials]
    values = [t.value for t in found.trials]
    best = [max(v for v in values[: i + 1] if math.isfinite(v)) for i in range(len(values))]
    presets = sum(t.name != "trial" for t in found.trials)
    axis.plot(numbers, best, drawstyle="steps-post", color=Colour.ACCENT, lw=1.6, label="best so far")
    axis.plot(numbers[:presets], values[:presets], "s", color=Colour.MUTED, ms=4, label="presets")
    axis.plot(numbers[presets:], values[presets:], "o", color=Colour.ACCENT, ms=4, label="trials")
    axis.set_xlabel("trial")
    axis.set_ylabel("objective")
    axis.legend(frameon=False, loc="lower right")
    return figure


def _schedules(found: Found, width: float) -> Drawing:
    from matplotlib.figure import Figure as Made

    from geomerge.engine.schedule import Schedule
    from geomerge.recipe.values import NOWHERE

    top = sorted((t for t in found.trials if math.isfinite(t.value)), key=lambda t: -t.value)[:BEST]
    figure = Made(figsize=(width, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    blocks = max(found.blocks, 2)
    depths = [i / (blocks - 1) for i in range(blocks)]
    for axis, role in zip(axes, ("attention", "mlp"), strict=True):
        for rank, trial in enumerate(reversed(top)):
            made = Schedule(trial.schedule, NOWHERE)
            first = rank == len(top) - 1
            curve = [made.at(role, u) for u in depths]
            axis.plot(depths, curve, color=Colour.ACCENT if first else Colour.MUTED, lw=2 if first else 1, zorder=rank)
        axis.set_title(role, loc="left")
        axis.set_xlabel("depth")
        axis.set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("coefficient")
    return figure


def _importance(shares: dict[str, float], width: float) -> Drawing:
    figure, axis = _axes(width, 0.3 * len(shares) + 0.8)
    names = sorted(shares, key=lambda k: shares[k])
    axis.barh(names, [shares[n] for n in names], color=Colour.ACCENT, height=0.6)
    axis.set_xlabel("share of the variance")
    return figure
