"""What came of it, in one sentence that the numbers carry: no difference is called one that its interval does not show."""

from __future__ import annotations

from collections.abc import Sequence

from geomerge.evaluate.scores import ModelRow
from geomerge.report.runs import Run
from geomerge.report.sheet import Interval, Sheet
from geomerge.report.words import count, number, percent, signed, visible


def headline(sheets: Sequence[Sheet], runs: Sequence[Run]) -> tuple[str, list[str]]:
    """The headline and the sentences below it."""
    sheet = next((s for s in sheets if s.merges), None)
    if sheet is not None:
        return _of_scores(sheet)
    if sheets:
        return _of_models(sheets[0])
    return _of_runs(runs)


def title(sheets: Sequence[Sheet], runs: Sequence[Run]) -> str:
    """The page's title."""
    names = [visible(run.name, 40) for run in runs]
    if not names:
        names = [visible(m.name, 40) for sheet in sheets for m in sheet.merges or sheet.scores.models]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"Merge report: {shown}"


def _of_scores(sheet: Sheet) -> tuple[str, list[str]]:
    merge = sheet.merges[0]
    mean = sheet.mean(merge.name)
    among = f", the best of {count(len(sheet.merges), 'merge')}," if len(sheet.merges) > 1 else ""
    if mean is None:
        share = sheet.normalised(merge.name)
        if share is None:
            return f"{visible(merge.name, 60)} was scored on {count(len(sheet.tasks), 'task')}.", _lead(sheet, merge)
        said = f"{visible(merge.name, 60)}{among} has {percent(share)}\u00a0% of the best parents’ scores on average."
        return said, _lead(sheet, merge)
    over = (
        f"over {count(len(sheet.tasks), 'task')}" if len(sheet.tasks) > 1 else f"on {visible(sheet.tasks[0].name, 40)}"
    )
    what = f"{visible(merge.name, 60)}{among} scores {_value(sheet, mean)} {over}"
    parent = sheet.parents[0] if sheet.parents else None
    difference = sheet.difference(merge.name, parent.name) if parent is not None else None
    if parent is None or difference is None:
        return f"{what}.", _lead(sheet, merge)
    return f"{what}, {_against(sheet, difference)} its best parent, {visible(parent.name, 60)}.", _lead(sheet, merge)


def _value(sheet: Sheet, mean: Interval) -> str:
    return f"{percent(mean.value)}\u00a0%" if sheet.all_fractions else number(mean.value)


def _against(sheet: Sheet, difference: Interval) -> str:
    """``12.3\u00a0points above`` or ``not clearly different from``."""
    if difference.known and not difference.clear:
        return "not clearly different from"
    size = f"{percent(abs(difference.value))}\u00a0points" if sheet.all_fractions else number(abs(difference.value))
    return f"{size} {'above' if difference.value > 0 else 'below'}" if difference.value else "the same as"


def _lead(sheet: Sheet, merge: ModelRow) -> list[str]:
    lead = []
    limit = sheet.scores.settings.get("limit")
    if isinstance(limit, int):
        lead.append(f"Only the first {limit:,} samples of each task were asked: a first look, not a result to publish.")
    parent = sheet.parents[0] if sheet.parents else None
    found = sheet.difference(merge.name, parent.name) if parent is not None else None
    if found is not None and found.known:
        say = signed if sheet.all_fractions else number
        unit = "\u00a0points" if sheet.all_fractions else ""
        lead.append(
            f"Difference of the means {say(found.value)}{unit}, 95\u00a0% interval {say(found.low)} to {say(found.high)}, "
            "from paired differences on the same samples."
        )
    kept = [
        s.normalised
        for t in sheet.tasks
        if (s := sheet.score(merge.name, t.name)) is not None and s.normalised is not None
    ]
    if kept:
        better = sum(value >= 1 for value in kept)
        many = {0: "none", len(kept): "all"}.get(better, str(better))
        tasks = count(len(kept), "task")
        lead.append(
            f"Task by task, it is at least as good as whichever parent is best there on {many} of {tasks}; where it is "
            f"weakest, it keeps {percent(min(kept), 0)}\u00a0% of that parent's score."
        )
    return lead


def _of_models(sheet: Sheet) -> tuple[str, list[str]]:
    models = [*sheet.parents, *sheet.base]
    best = next((m for m in models if sheet.mean(m.name) is not None), None)
    mean = None if best is None else sheet.mean(best.name)
    what = f"{count(len(models), 'model')} on {count(len(sheet.tasks), 'task')}"
    if best is None or mean is None:
        return f"Scores of {what}.", []
    return f"{what}: {visible(best.name, 60)} has the best mean, {_value(sheet, mean)}.", []


def _of_runs(runs: Sequence[Run]) -> tuple[str, list[str]]:
    if len(runs) > 1:
        return f"{count(len(runs), 'merge')}, not scored yet.", [_SCORE]
    run = runs[0]
    parents = [visible(name, 40) for name in run.parents]
    named = ", ".join(parents[:-1]) + " and " + parents[-1] if len(parents) > 1 else "".join(parents)
    if len(parents) > 5:
        named = count(len(parents), "model")
    tensors = count(len(run.manifest["tensors"]), "tensor")
    return f"{visible(run.name, 60)} merges {named} with {visible(run.method)}: {tensors}, not scored yet.", [_SCORE]


_SCORE = "“geomerge evaluate” scores it beside its parents; give the file that it writes to “geomerge report”, too."
