"""The sections that show scores: the table and bars, what each task kept, paired differences, synergy."""

from __future__ import annotations

import math
from collections.abc import Sequence

from geomerge.evaluate.scores import ModelRow, PairedRow, TaskRow
from geomerge.report.figures import kept_figure, means_figure, shown_models, synergy_figure, tasks_figure
from geomerge.report.section import Cell, Folded, Part, Row, Section, Table, Tone
from geomerge.report.sheet import Sheet
from geomerge.report.words import MISSING, count, number, percent, signed, visible

_ROWS, _COLUMNS = 100, 40
_PANELS = 30
_AGAINST = 5
_OTHERS = 6


def score_sections(sheet: Sheet, *, prefix: str = "", heading: str = "") -> list[Section]:
    """The sections of one sheet.

    Args:
        sheet: The scores.
        prefix: Of the figures' names, where a report has several sheets.
        heading: Behind each title, where a report has several sheets.
    """
    behind = f": {heading}" if heading else ""
    return [
        section
        for section in (
            _scores(sheet, prefix, behind),
            _kept(sheet, prefix, behind),
            _paired(sheet, behind),
            _synergy(sheet, prefix, behind),
        )
        if section is not None
    ]


def _scores(sheet: Sheet, prefix: str, behind: str) -> Section:
    parts: list[Part] = []
    if any(sheet.mean(m.name) is not None for m in sheet.scores.models):
        parts.append(means_figure(sheet, f"{prefix}means"))
    parts.append(scores_overview(sheet))
    tasks = [t for t in sheet.tasks if any(sheet.score(m.name, t.name) for m in sheet.scores.models)][:_PANELS]
    if tasks:
        parts.append(tasks_figure(sheet, f"{prefix}tasks", tasks))
    return Section(f"Scores{behind}", parts)


def scores_overview(sheet: Sheet) -> Table:
    """Every model by every task with its interval; the best of each task stands out."""
    models = shown_models(sheet, _ROWS)
    tasks = sheet.tasks[:_COLUMNS]
    best = {task.name: _best(sheet, task) for task in tasks}
    best_mean = _best_mean(sheet)
    rows = []
    for model in models:
        mean = sheet.mean(model.name)
        share = sheet.normalised(model.name)
        cells: list[str | Cell] = [visible(model.name, 60), _ROLES[model.role]]
        cells.append(
            MISSING
            if mean is None
            else Cell(
                percent(mean.value) if sheet.all_fractions else number(mean.value),
                tone="strong" if mean.value == best_mean else "",
            )
        )
        cells.append(MISSING if share is None else f"{percent(share)} %")
        cells += [_score_cell(sheet, model, task, best[task.name]) for task in tasks]
        tone: Tone = "accent" if sheet.merges and model is sheet.merges[0] else "" if model.role == "model" else "muted"
        rows.append(Row(cells, tone))
    unit = (
        "Per cent, the 95 % interval behind each score." if sheet.all_fractions else "95 % intervals behind the scores."
    )
    left = []
    if len(models) < len(sheet.scores.models):
        left.append(f"{len(models)} of {count(len(sheet.scores.models), 'model')} are shown.")
    if len(tasks) < len(sheet.tasks):
        left.append(f"{len(tasks)} of {count(len(sheet.tasks), 'task')} are shown.")
    return Table(
        ("model", "role", "mean", "kept", *(visible(t.name, 40) for t in tasks)),
        rows,
        frozenset({0, 1}),
        note=" ".join(
            [
                unit,
                "Bold: the best of a column.",
                "“Kept” is the mean share of the best parent's score.",
                *left,
                *_metrics(tasks),
            ]
        ),
    )


_ROLES = {"model": "merge", "parent": "parent", "base": "base"}


def _metrics(tasks: Sequence[TaskRow]) -> list[str]:
    metrics = list(dict.fromkeys(visible(t.metric, 30) for t in tasks))
    lower = [visible(t.name, 40) for t in tasks if not t.higher_is_better]
    samples = sorted({t.samples for t in tasks})
    asked = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
    said = [f"Metric: {', '.join(metrics[:6])}; {asked} samples a task."]
    return said + ([f"Lower is better on {', '.join(lower[:6])}."] if lower else [])


def _score_cell(sheet: Sheet, model: ModelRow, task: TaskRow, best: float | None) -> str | Cell:
    found = sheet.interval(model.name, task.name)
    if found is None:
        return MISSING
    fraction = task.name in sheet.fractions
    text = percent(found.value) if fraction else number(found.value)
    note = ""
    if found.known:
        low, high = (percent(v, 0) if fraction else number(v) for v in (found.low, found.high))
        note = f"{low}–{high}"
    return Cell(text, note, "strong" if found.value == best else "")


def _best(sheet: Sheet, task: TaskRow) -> float | None:
    values = [s.value for m in sheet.scores.models if (s := sheet.score(m.name, task.name)) is not None]
    return (max if task.higher_is_better else min)(values, default=None)


def _best_mean(sheet: Sheet) -> float | None:
    values = [mean.value for m in sheet.scores.models if (mean := sheet.mean(m.name)) is not None]
    return (min if sheet.upwards is False else max)(values, default=None)


def _kept(sheet: Sheet, prefix: str, behind: str) -> Section | None:
    figure = kept_figure(sheet, f"{prefix}kept")
    if figure is None:
        return None
    return Section(f"What is kept of the best parent{behind}", (figure,))


def _paired(sheet: Sheet, behind: str) -> Section | None:
    tables = [(m, table) for m in sheet.merges[: 1 + _OTHERS] if (table := paired_table(sheet, m)) is not None]
    if not tables:
        return None
    (_, first), *others = tables
    how = (
        "Each merge against each parent on the very same samples: the difference with its 95 % interval, and McNemar's exact p "
        "where answers are right or wrong. In bold where the interval leaves zero out; nothing is corrected for the number "
        "of comparisons."
    )
    parts: list[Part] = [how, first]
    parts += [Folded(visible(model.name, 60), (table,)) for model, table in others]
    left = len(sheet.merges) - len(tables)
    if left > 0:
        parts.append(f"The differences of {count(left, 'further merge')} are in the scores file.")
    return Section(f"Paired differences{behind}", parts)


def paired_table(sheet: Sheet, model: ModelRow) -> Table | None:
    """One model against each parent: tasks down, parents across."""
    against = [p for p in sheet.parents if any(sheet.paired(model.name, t.name, p.name) for t in sheet.tasks)]
    if not against:
        return None
    shown = against[:_AGAINST]
    rows = []
    for task in sheet.tasks[:_ROWS]:
        cells: list[str | Cell] = [visible(task.name, 40)]
        for parent in shown:
            cells += _difference_cells(sheet.paired(model.name, task.name, parent.name), task.name in sheet.fractions)
        rows.append(Row(cells))
    means: list[str | Cell] = ["mean"]
    for parent in shown:
        found = sheet.difference(model.name, parent.name)
        if found is None:
            means += [MISSING, ""]
            continue
        say = signed if sheet.all_fractions else _plus
        note = f"{say(found.low)} to {say(found.high)}" if found.known else ""
        means += [Cell(say(found.value), note, "strong" if found.clear else ""), ""]
    if len(sheet.tasks) > 1:
        rows.append(Row(means, "strong"))
    more = f" The {len(shown)} best of {count(len(against), 'parent')}." if len(shown) < len(against) else ""
    unit = "In points. " if sheet.all_fractions else ""
    return Table(
        ("task", *(c for p in shown for c in (f"against {visible(p.name, 40)}", "p"))),
        rows,
        caption=f"{visible(model.name, 60)} against its parents",
        note=f"{unit}The mean's interval takes the tasks' errors to be independent.{more}",
    )


def _difference_cells(row: PairedRow | None, fraction: bool) -> list[str | Cell]:
    if row is None or not math.isfinite(row.difference):
        return [MISSING, ""]
    say = signed if fraction else _plus
    known = math.isfinite(row.low) and math.isfinite(row.high)
    clear = known and (row.low > 0 or row.high < 0)
    note = f"{say(row.low)} to {say(row.high)}" if known else ""
    return [Cell(say(row.difference), note, "strong" if clear else ""), _p(row.p)]


def _plus(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _synergy(sheet: Sheet, prefix: str, behind: str) -> Section | None:
    if not sheet.merges or not sheet.scores.synergy:
        return None
    best = sheet.merges[0]
    figure = synergy_figure(sheet, f"{prefix}synergy")
    rows = []
    for name in [*(t.name for t in sheet.tasks[:_ROWS]), "mean"]:
        found = sheet.synergy(best.name, name)
        if found is None:
            continue
        fraction = sheet.all_fractions if name == "mean" else name in sheet.fractions
        say = signed if fraction else _plus
        rows.append(
            Row(
                [
                    visible(name, 40),
                    percent(found.expected) if fraction else number(found.expected),
                    say(found.delta),
                    MISSING if found.relative is None else f"{signed(found.relative)} %",
                    Cell(say(found.improvement), tone="strong" if found.improvement > 0 else ""),
                    percent(found.diversity) if fraction else number(found.diversity),
                ],
                "strong" if name == "mean" else "",
            )
        )
    if not rows:
        return None
    table = Table(
        ("task", "expected", "Δ", "relative", "over the best", "diversity"),
        rows,
        caption=f"{visible(best.name, 60)} against what its parents let expect",
        note="Expected: the mean of the parents. Δ: actual minus expected. Over the best: actual minus the best parent, strict "
        "synergy where positive. Diversity: the best parent minus the worst.",
    )
    return Section(f"Synergy{behind}", tuple(part for part in (figure, table) if part is not None))
