"""Heat maps of numbers over depth and role: a row for each role, a column for each block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from geomerge.report.drawing import Colour, canvas, label
from geomerge.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_SPREAD = 0.01
"""Coefficients that differ by less than this share of the largest are the same for a reader: SLERP's depend on angles."""

_ANNOTATED = 14


@dataclass(frozen=True)
class Grid:
    """One quantity over depth.

    Attributes:
        title: Whose it is: ``expert-a``, or a parameter's name.
        roles: The rows.
        columns: ``in``, the blocks, ``out``.
        values: (role, column) → mean over the tensors there.
        module: The part of the model that numbers its blocks so; empty when there is but one.
    """

    title: str
    roles: tuple[str, ...]
    columns: tuple[str, ...]
    values: Mapping[tuple[str, str], float]
    module: str = ""

    @property
    def spread(self) -> float:
        """The largest value minus the smallest."""
        return max(self.values.values()) - min(self.values.values())

    @property
    def varies(self) -> bool:
        """Whether it varies enough to be seen."""
        return self.spread > _SPREAD * max(map(abs, self.values.values()), default=0.0)


def draw(grids: Sequence[Grid], width: float, *, largest: float | None = None) -> Drawing:
    """A panel for each grid.

    Args:
        grids: What to draw.
        width: Inches.
        largest: The number of the strongest colour; by default the largest magnitude.
    """
    wide = width > 5
    longest = max(len(grid.columns) for grid in grids)
    across = 2 if wide and longest <= 12 and len(grids) > 1 else 1
    down = math.ceil(len(grids) / across)
    row = 0.27
    heights = [max(len(g.roles) for g in grids[i * across : (i + 1) * across]) * row + 0.58 for i in range(down)]
    drawing = canvas(width, sum(heights) + 0.05, hspace=0.09, wspace=0.05)
    largest = largest or max(abs(v) for grid in grids for v in grid.values.values()) or 1.0
    axes = drawing.subplots(down, across, squeeze=False, height_ratios=heights)
    for i, place in enumerate(axes.flat):
        if i < len(grids):
            _panel(place, grids[i], largest, annotate=longest <= (_ANNOTATED if wide else 9), wide=wide, across=across)
        else:
            place.set_axis_off()
    return drawing


def _panel(axes: Axes, grid: Grid, largest: float, *, annotate: bool, wide: bool, across: int) -> None:
    from matplotlib.patches import Rectangle

    for (role, column), value in grid.values.items():
        x, y = grid.columns.index(column), grid.roles.index(role)
        strength = min(abs(value) / largest, 1.0)
        colour = Colour.ACCENT if value >= 0 else Colour.WARM
        axes.add_patch(Rectangle((x - 0.46, y - 0.43), 0.92, 0.86, facecolor=Colour.RULE, alpha=0.55, linewidth=0))
        axes.add_patch(
            Rectangle((x - 0.46, y - 0.43), 0.92, 0.86, facecolor=colour, alpha=round(strength, 3), linewidth=0)
        )
        if annotate:
            said = number(round(value, 4), 2)
            size = 7.5 if wide and len(grid.columns) * across <= 20 else 6.5
            ink = Colour.PAPER if strength > 0.6 else Colour.INK
            axes.text(x, y, said, ha="center", va="center_baseline", fontsize=size, color=ink)
    axes.set_xlim(-0.5, len(grid.columns) - 0.5)
    axes.set_ylim(len(grid.roles) - 0.5, -0.5)
    axes.set_yticks(range(len(grid.roles)), grid.roles)
    step = max(1, math.ceil(len(grid.columns) / (28 // across if wide else 12)))
    ticks = [i for i, c in enumerate(grid.columns) if not c.isdigit() or int(c) % step == 0]
    axes.set_xticks(ticks, [grid.columns[i] for i in ticks])
    axes.spines["bottom"].set_visible(False)
    low, high = min(grid.values.values()), max(grid.values.values())
    axes.set_title(" · ".join(filter(None, (label(grid.title, 26), grid.module))))
    if number(low, 2) != number(high, 2):
        span = f"from {number(low, 2)} to {number(high, 2)}"
        axes.set_title(span, loc="right", fontweight="normal", fontsize=8, color=Colour.MUTED)
