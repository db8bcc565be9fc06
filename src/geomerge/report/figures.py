"""The figures of a sheet of scores: bars with intervals, what each task kept, actual against expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from geomerge.evaluate.scores import ModelRow, TaskRow
from geomerge.report.drawing import Colour, canvas, label, percent_axis
from geomerge.report.section import Figure
from geomerge.report.sheet import Interval, Sheet
from geomerge.report.words import count, number, percent, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_PANEL_MODELS = 8
_LABELLED = 12


def colour_of(sheet: Sheet, model: ModelRow) -> str:
    """The best merge accented, other merges softer, parents grey, the base lighter."""
    if model.role == "model":
        return Colour.ACCENT if model is sheet.merges[0] or len(sheet.merges) == 1 else Colour.SOFT
    return Colour.PARENT if model.role == "parent" else Colour.BASE


def shown_models(sheet: Sheet, most: int) -> list[ModelRow]:
    """The models worth a bar each when there are more than fit: the best merges, the best parents, the base."""
    if len(sheet.scores.models) <= most:
        return [*sheet.merges, *sheet.parents, *sheet.base]
    base = sheet.base[:1]
    parents = sheet.parents[: max(most // 2 - len(base), most - len(base) - len(sheet.merges))]
    return [*sheet.merges[: most - len(base) - len(parents)], *parents, *base]


def means_figure(sheet: Sheet, name: str) -> Figure:
    """Every model's mean over the tasks, with its interval."""
    models = [m for m in shown_models(sheet, 60) if sheet.mean(m.name) is not None]
    left = sum(sheet.mean(m.name) is not None for m in sheet.scores.models) - len(models)
    best = models[0] if models else None
    said = "" if best is None else f" {visible(best.name)} has {_said(sheet, sheet.mean(best.name))}."
    return Figure(
        name,
        lambda width: _means(sheet, models, width),
        alt=f"Bars of the mean of {count(len(models), 'model')} over {count(len(sheet.tasks), 'task')}.{said}",
        caption="Mean over the tasks with 95 % intervals. The line marks the best parent."
        + (f" {count(left, 'further model')} in the table only." if left else ""),
    )


def _said(sheet: Sheet, value: Interval | None) -> str:
    if value is None:
        return "none"
    return f"{percent(value.value)} %" if sheet.all_fractions else number(value.value)


def _means(sheet: Sheet, models: Sequence[ModelRow], width: float) -> Drawing:
    drawing = canvas(width, 0.215 * len(models) + 0.45)
    axes = drawing.subplots()
    found = [sheet.mean(m.name) for m in models]
    _bars(axes, sheet, models, [f for f in found if f is not None], fraction=sheet.all_fractions, height=0.66)
    axes.set_yticks(range(len(models)), [label(m.name, 34 if width > 5 else 19) for m in models])
    _embolden(axes, sheet, models)
    if sheet.parents and (best := sheet.mean(sheet.parents[0].name)) is not None:
        axes.axvline(best.value, color=Colour.MUTED, linewidth=0.9, zorder=3)
    return drawing


def tasks_figure(sheet: Sheet, name: str, tasks: Sequence[TaskRow]) -> Figure:
    """Every task's scores as bars with intervals, the models in the same order in each."""
    models = shown_models(sheet, _PANEL_MODELS)
    left = len(sheet.scores.models) - len(models)
    return Figure(
        name,
        lambda width: _tasks(sheet, models, tasks, width),
        alt=f"Bars with intervals of {count(len(models), 'model')} on each of {count(len(tasks), 'task')}; "
        "the table beside it holds the numbers.",
        caption="Each task by itself, 95 % intervals."
        + (" The dotted line is what guessing scores." if any(_guessed(sheet, task) for task in tasks) else "")
        + (f" The {len(models)} models that tell most; {left} more in the table." if left else ""),
    )


def _guessed(sheet: Sheet, task: TaskRow) -> bool:
    """Whether a line shows what guessing scores."""
    return task.name in sheet.fractions and task.chance is not None and 0 < task.chance < 1


def _tasks(sheet: Sheet, models: Sequence[ModelRow], tasks: Sequence[TaskRow], width: float) -> Drawing:
    across = (2 if len(tasks) in (2, 4) else min(len(tasks), 3)) if width > 5 else 1
    down = math.ceil(len(tasks) / across)
    drawing = canvas(width, down * (0.155 * len(models) + 0.6), hspace=0.1, wspace=0.05)
    grid = drawing.subplots(down, across, squeeze=False)
    for i, axes in enumerate(grid.flat):
        if i >= len(tasks):
            axes.set_axis_off()
            continue
        task = tasks[i]
        there = [(m, sheet.interval(m.name, task.name)) for m in models]
        fraction = task.name in sheet.fractions
        rows = [(y, m, found) for y, (m, found) in enumerate(there) if found is not None]
        _bars(
            axes,
            sheet,
            [m for _, m, _ in rows],
            [f for *_, f in rows],
            fraction=fraction,
            height=0.72,
            places=[y for y, *_ in rows],
            values=False,
        )
        if fraction:
            axes.set_xlim(0, 1)
            axes.set_xticks([0, 0.5, 1])
            ends = axes.get_xticklabels()
            ends[0].set_horizontalalignment("left")
            ends[-1].set_horizontalalignment("right")
            if _guessed(sheet, task):
                axes.axvline(task.chance, color=Colour.MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=3)
        axes.set_ylim(len(models) - 0.4, -0.6)
        axes.set_title(label(task.name, 30) + ("" if task.higher_is_better else "  (lower is better)"))
        first = i % across == 0
        axes.set_yticks(range(len(models)), [label(m.name, 19) if first else "" for m in models])
        if first:
            _embolden(axes, sheet, models)
    return drawing


def _bars(
    axes: Axes,
    sheet: Sheet,
    models: Sequence[ModelRow],
    found: Sequence[Interval],
    *,
    fraction: bool,
    height: float,
    places: Sequence[int] | None = None,
    values: bool = True,
) -> None:
    """Horizontal bars, their intervals, and (if asked for) their values at the right edge."""
    at = list(range(len(models))) if places is None else list(places)
    axes.grid(axis="x")
    axes.barh(at, [f.value for f in found], height=height, color=[colour_of(sheet, m) for m in models], zorder=2)
    for y, one in zip(at, found, strict=True):
        if one.known:
            ends = [one.low, one.high], [y, y]
            axes.plot(*ends, color=Colour.PAPER, linewidth=3.2, solid_capstyle="projecting", zorder=4)
            axes.plot(*ends, color=Colour.INK, linewidth=1.2, solid_capstyle="butt", zorder=5)
    top = max([f.high if f.known else f.value for f in found], default=1.0)
    low = min([0.0, *(f.low if f.known else f.value for f in found)])
    axes.set_xlim(low, top * 1.02 if top > 0 else 1)
    if fraction:
        percent_axis(axes)
    else:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set_ylim(len(models) - 0.4, -0.6)
    if values:
        for y, one in zip(at, found, strict=True):
            said = percent(one.value) if fraction else number(one.value)
            axes.annotate(
                said,
                (1, y),
                xycoords=("axes fraction", "data"),
                xytext=(34, 0),
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                fontsize=8,
                color=Colour.INK,
            )


def _embolden(axes: Axes, sheet: Sheet, models: Sequence[ModelRow]) -> None:
    for text, model in zip(axes.get_yticklabels(), models, strict=True):
        colour = colour_of(sheet, model)
        text.set_color(
            Colour.ACCENT if colour == Colour.ACCENT else Colour.INK if model.role == "model" else Colour.MUTED
        )
        text.set_fontweight("bold" if colour == Colour.ACCENT else "normal")


def kept_figure(sheet: Sheet, name: str) -> Figure | None:
    """For each task, the share of the best parent's score that the merge has: a dot beside the parents' dots.

    Returns:
        `None` when there are no parents to compare with.
    """
    tasks = [
        t
        for t in sheet.tasks
        if sheet.merges and (s := sheet.score(sheet.merges[0].name, t.name)) and s.normalised is not None
    ]
    if not tasks or not sheet.parents:
        return None
    merge = visible(sheet.merges[0].name)
    return Figure(
        name,
        lambda width: _kept(sheet, tasks, width),
        alt=f"For each of {count(len(tasks), 'task')} the share of the best parent's score that {merge} and the others have.",
        caption=f"Score as a share of the best parent's on that task (the line at 100 %). Large dot: {merge}"
        + (", small blue dots: the other merges" if len(sheet.merges) > 1 else "")
        + ", grey: the parents"
        + (", ring: the base." if sheet.base else "."),
    )


def _kept(sheet: Sheet, tasks: Sequence[TaskRow], width: float) -> Drawing:
    drawing = canvas(width, 0.25 * len(tasks) + 0.45)
    axes = drawing.subplots()
    axes.grid(axis="x")
    axes.axvline(1.0, color=Colour.MUTED, linewidth=1, zorder=2)
    largest = 1.0
    for y, task in enumerate(tasks):

        def shares(models: Sequence[ModelRow], task: TaskRow = task) -> list[float]:
            found = [sheet.score(m.name, task.name) for m in models]
            return [s.normalised for s in found if s is not None and s.normalised is not None]

        parents, others, base = shares(sheet.parents), shares(sheet.merges[1:30]), shares(sheet.base)
        mine = shares(sheet.merges[:1])
        axes.plot([0, 1], [y, y], color=Colour.RULE, linewidth=0.8, zorder=1)
        axes.scatter(parents, [y] * len(parents), s=26, color=Colour.PARENT, linewidth=0, zorder=3)
        if base:
            axes.scatter(base, [y] * len(base), s=24, facecolor="none", edgecolor=Colour.PARENT, linewidth=1, zorder=3)
        axes.scatter(others, [y] * len(others), s=18, color=Colour.SOFT, linewidth=0, zorder=4)
        axes.scatter(mine, [y] * len(mine), s=58, color=Colour.ACCENT, linewidth=0, zorder=5)
        axes.annotate(
            f"{percent(mine[0], 0)} %",
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(40, 0),
            textcoords="offset points",
            ha="right",
            va="center_baseline",
            fontsize=8,
            fontweight="bold" if mine[0] >= 1 else "normal",
            color=Colour.ACCENT,
        )
        largest = max([largest, *parents, *others, *mine, *base])
    axes.set_xlim(0, min(largest, 3.0) * 1.04)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_yticks(range(len(tasks)), [label(t.name, 30 if width > 5 else 17) for t in tasks])
    percent_axis(axes)
    return drawing


def synergy_figure(sheet: Sheet, name: str) -> Figure | None:
    """The merge's scores against the means of its parents', with the diagonal.

    Returns:
        `None` when nothing is known of it, or no task's score is a share.
    """
    points = [
        (row.expected, value.value, visible(task.name))
        for task in sheet.tasks
        if task.name in sheet.fractions
        and sheet.merges
        and (row := sheet.synergy(sheet.merges[0].name, task.name)) is not None
        and math.isfinite(row.expected)
        and (value := sheet.interval(sheet.merges[0].name, task.name)) is not None
    ]
    if not points:
        return None
    mean = sheet.synergy(sheet.merges[0].name)
    total = sheet.mean(sheet.merges[0].name)
    centre = (mean.expected, total.value) if mean and total and sheet.all_fractions else None
    others = [
        (row.expected, value.value)
        for model in sheet.merges[1:30]
        for task in sheet.tasks
        if task.name in sheet.fractions
        and (row := sheet.synergy(model.name, task.name)) is not None
        and math.isfinite(row.expected)
        and (value := sheet.interval(model.name, task.name)) is not None
    ]
    above = sum(y > x for x, y, _ in points)
    return Figure(
        name,
        lambda width: _synergy(points, others, centre, width),
        alt=f"{visible(sheet.merges[0].name)}: actual against expected scores; {above} of {len(points)} tasks lie above "
        "the diagonal.",
        caption="Actual score against the expected one, the mean of the parents. Above the diagonal the merge has more than "
        "its parents' mean."
        + (" Cross: the mean over the tasks." if centre else "")
        + (" Small dots: the other merges." if others else ""),
        width=4.9,
    )


def _synergy(
    points: Sequence[tuple[float, float, str]],
    others: Sequence[tuple[float, float]],
    centre: tuple[float, float] | None,
    width: float,
) -> Drawing:
    drawing = canvas(width, width * 0.97)
    axes = drawing.subplots()
    everything = [v for x, y in [*((x, y) for x, y, _ in points), *others] for v in (x, y)]
    low, high = max(0.0, min(everything) - 0.08), min(1.0, max(everything) + 0.08)
    low, high = math.floor(low * 10) / 10, max(math.ceil(high * 10) / 10, 0.2)
    axes.grid()
    axes.plot([low, high], [low, high], color=Colour.MUTED, linewidth=1, zorder=2)
    if others:
        axes.scatter([x for x, _ in others], [y for _, y in others], s=15, color=Colour.SOFT, linewidth=0, zorder=3)
    for x, y, _ in points:
        axes.plot([x, x], [x, y], color=Colour.ACCENT if y >= x else Colour.WARM, linewidth=0.9, alpha=0.6, zorder=3)
    colours = [Colour.ACCENT if y >= x else Colour.WARM for x, y, _ in points]
    axes.scatter([p[0] for p in points], [p[1] for p in points], s=44, color=colours, linewidth=0, zorder=4)
    if centre:
        axes.plot(*centre, marker="+", markersize=13, markeredgewidth=2, color=Colour.INK, zorder=5)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    percent_axis(axes)
    percent_axis(axes, vertical=True)
    axes.set_xlabel("expected: mean of the parents")
    axes.set_ylabel("actual")
    for text in axes.get_yticklabels():
        text.set_color(Colour.MUTED)
    _label_points(axes, points, [*others, *([centre] if centre else [])], high - low, width)
    return drawing


def _label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    others: Sequence[tuple[float, float]],
    span: float,
    width: float,
) -> None:
    """A task's name at its point, on the first side where it meets neither another name nor another point."""
    taken = [(x - 0.015 * span, y - 0.015 * span, x + 0.015 * span, y + 0.015 * span) for x, y, _ in points]
    taken += [(x - 0.01 * span, y - 0.01 * span, x + 0.01 * span, y + 0.01 * span) for x, y in others]
    unit = span / (width - 0.8)  # data units in an inch
    order = sorted(range(len(points)), key=lambda i: -abs(points[i][1] - points[i][0]))
    left, right = axes.get_xlim()
    for i in order[:_LABELLED]:
        x, y, name = points[i]
        text = label(name, 22)
        wide, high, gap = 0.068 * len(text) * unit, 0.14 * unit, 0.075 * unit
        for dx, dy, ha, va in (
            (1, 0, "left", "center"),
            (-1, 0, "right", "center"),
            (0, 1, "center", "bottom"),
            (0, -1, "center", "top"),
        ):
            x0 = x + gap * dx - {"left": 0, "right": wide, "center": wide / 2}[ha]
            y0 = y + gap * dy - {"center": high / 2, "bottom": 0, "top": high}[va]
            box = (x0, y0, x0 + wide, y0 + high)
            mine = taken[i]
            free = all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken if t is not mine)
            if free and box[0] >= left and box[2] <= right:
                axes.text(x + gap * dx, y + gap * dy, text, ha=ha, va=va, fontsize=8, color=Colour.INK, zorder=6)
                taken.append(box)
                break
