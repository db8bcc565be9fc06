"""Scores for a model card: a Markdown table, the hub's ``model-index``, and both written into an existing ``README.md``."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomerge.errors import DamagedCheckpoint, RunError, UsageError
from geomerge.evaluate.scores import ModelRow, Scores
from geomerge.report.build import replace_file
from geomerge.report.sheet import Sheet
from geomerge.report.words import MISSING, number, percent, visible

BEGIN, END = "<!-- geomerge:scores:begin -->", "<!-- geomerge:scores:end -->"
YAML_BEGIN, YAML_END = "# geomerge:scores:begin", "# geomerge:scores:end"
_LIMIT = 4 << 20
_MOST = 24


def scores_table(scores: Scores, models: Sequence[str] | None = None) -> str:
    """The scores as a Markdown table: models down, tasks across, best values in bold.

    Args:
        scores: What `geomerge evaluate` found.
        models: The models to show; by default all, the merges first, at most 24.

    Returns:
        The table and a line about it, without a heading. Names are escaped.
    """
    sheet = Sheet(scores, ())
    rows = [m for m in (*sheet.merges, *sheet.parents, *sheet.base) if models is None or m.name in models]
    shown = rows[:_MOST]
    best = {}
    for task in sheet.tasks:
        values = [s.value for m in shown if (s := sheet.score(m.name, task.name)) is not None]
        best[task.name] = (max if task.higher_is_better else min)(values, default=None)
    heads = ["model", *(_md(t.name) + ("" if t.higher_is_better else " ↓") for t in sheet.tasks), "mean"]
    text = [_line(heads), _line(["---", *(["---:"] * (len(heads) - 1))])]
    for model in shown:
        cells = [_md(model.name) + (f" ({model.role})" if model.role not in ("model", model.name) else "")]
        for task in sheet.tasks:
            found = sheet.interval(model.name, task.name)
            if found is None:
                cells.append(MISSING)
                continue
            say = percent if task.name in sheet.fractions else number
            value = say(found.value)
            value = f"**{value}**" if found.value == best[task.name] else value
            cells.append(f"{value} [{say(found.low)}, {say(found.high)}]" if found.known else value)
        mean = sheet.mean(model.name)
        cells.append(MISSING if mean is None else percent(mean.value) if sheet.all_fractions else number(mean.value))
        text.append(_line(cells))
    unit = "Per cent; " if sheet.all_fractions else ""
    more = f" {len(rows) - len(shown)} more models are left out." if len(rows) > len(shown) else ""
    limit = scores.settings.get("limit")
    limited = f" At most {limit} samples a task." if isinstance(limit, int) else ""
    text += ["", f"{unit}95 % intervals in brackets, the best value of a task in bold.{limited}{more}"]
    return "\n".join(text)


def model_index(
    scores: Scores, model: str, *, name: str | None = None, task_type: str = "text-generation"
) -> list[dict[str, Any]]:
    """The ``model-index`` of the hub's metadata for one model.

    Args:
        scores: What `geomerge evaluate` found.
        model: The model's name in the scores.
        name: Its name on the hub.
        task_type: The hub's word for what it does.

    Returns:
        What belongs under ``model-index:``; plain data. Shares of right answers are given in per cent, as the hub shows them.
    """
    sheet = Sheet(scores, ())
    results = []
    for task in sheet.tasks:
        found = sheet.score(model, task.name)
        if found is None:
            continue
        value = round(100 * found.value, 2) if task.name in sheet.fractions else float(f"{found.value:.6g}")
        results.append(
            {
                "task": {"type": task_type},
                "dataset": {"name": visible(task.name, 120), "type": visible(task.source, 120)},
                "metrics": [{"type": visible(task.metric, 60), "value": value, "name": visible(task.metric, 60)}],
            }
        )
    return [{"name": visible(name or model, 96), "results": results}]


def update_card(model_dir: Path | str, scores: Scores, *, model: str | None = None) -> bool:
    """Write scores into a merged model's ``README.md``, in place of those written before.

    Args:
        model_dir: The directory.
        scores: What `geomerge evaluate` found.
        model: The model's name in the scores; by default the one whose source is the directory, or whose name is its.

    Returns:
        Whether the file changed. A ``model-index`` that somebody else wrote is left as it is.

    Raises:
        UsageError: The directory has no card, or the scores do not hold the model.
        DamagedCheckpoint: The card cannot be read, or only one of the markers is there.
        RunError: The card cannot be written.
    """
    from geomerge.checkpoint.folder import check_contained

    folder = Path(model_dir)
    path = folder / "README.md"
    if not path.is_file():
        raise UsageError("there is no README.md to write the scores into", where=str(folder))
    check_contained(path, folder)
    row = find_model(folder, scores, model)
    try:
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
        if len(raw) > _LIMIT:
            raise DamagedCheckpoint("the card is too large", where=str(path))
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise DamagedCheckpoint("the card is not UTF-8", where=str(path)) from None
    except OSError as error:
        raise RunError(f"the card cannot be read: {error.strerror}", where=str(path)) from None
    newline = "\r\n" if "\r\n" in text else "\n"
    old = text.replace("\r\n", "\n")
    others = [m.name for m in scores.models if m.role != "model"]
    section = f"{BEGIN}\n## Scores\n\n{scores_table(scores, [row.name, *others])}\n{END}"
    index = model_index(scores, row.name, name=folder.resolve().name, task_type=_task_type(folder))
    new = _with_index(_with_section(old, section, str(path)), index, str(path))
    if new == old:
        return False
    try:
        replace_file(path, new.replace("\n", newline).encode())
    except OSError as error:
        raise RunError(f"the card cannot be written: {error.strerror}", where=str(path)) from None
    return True


def find_model(folder: Path, scores: Scores, model: str | None = None) -> ModelRow:
    """The row of the model that lies in a directory.

    Raises:
        UsageError: The scores do not hold it.
    """
    if model is not None:
        found = [m for m in scores.models if m.name == model]
    else:
        here = folder.resolve()
        found = [m for m in scores.models if _same_place(m.source, here)]
        found = found or [m for m in scores.models if m.role == "model" and m.name == here.name]
    if not found:
        known = ", ".join(visible(m.name, 40) for m in scores.models[:12])
        raise UsageError("the scores do not hold this model", where=str(folder), hint=f"they hold {known}")
    return found[0]


def _same_place(source: str, here: Path) -> bool:
    try:
        return Path(source).is_dir() and Path(source).resolve() == here
    except (OSError, ValueError):
        return False


def _with_section(text: str, section: str, where: str) -> str:
    """The card with the section: in place of the old one, else before the licence or at the end."""
    between = _between(text, BEGIN, END, where)
    if between is not None:
        return f"{text[: between[0]]}{section}{text[between[1] :]}"
    licence = re.search(r"^## Licence$", text, re.MULTILINE)
    if licence is not None:
        return f"{text[: licence.start()]}{section}\n\n{text[licence.start() :]}"
    return f"{text.rstrip()}\n\n{section}\n"


def _with_index(text: str, index: list[dict[str, Any]], where: str) -> str:
    """The card with the ``model-index`` at the end of its front matter, which is made if it has none."""
    block = f"{YAML_BEGIN}\nmodel-index: {_yaml(index)}\n{YAML_END}\n"
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    front = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text[len(mark) :], re.DOTALL | re.MULTILINE)
    if front is None:
        return f"{mark}---\n{block}---\n{text[len(mark) :]}"
    inner = front[1]
    between = _between(inner, YAML_BEGIN, YAML_END, where)
    if between is not None:
        inner = f"{inner[: between[0]]}{block}{inner[between[1] + 1 :]}"
    elif not re.search(r"^[\"']?model-index[\"']?\s*:", inner, re.MULTILINE):
        inner = f"{inner}{block}"
    return f"{text[: len(mark) + front.start(1)]}{inner}{text[len(mark) + front.end(1) :]}"


def _between(text: str, begin: str, end: str, where: str) -> tuple[int, int] | None:
    """Where the lines from one marker to the other stand, the markers too; `None` when there is no marker.

    Raises:
        DamagedCheckpoint: There is another number of markers than one pair.
    """
    starts = [found.start() for found in re.finditer(rf"^{re.escape(begin)}$", text, re.MULTILINE)]
    ends = [found.end() for found in re.finditer(rf"^{re.escape(end)}$", text, re.MULTILINE)]
    if not starts and not ends:
        return None
    if len(starts) != 1 or len(ends) != 1 or starts[0] > ends[0]:
        raise DamagedCheckpoint(
            "the markers of the scores are not one pair", where=where, hint=f"remove the lines {begin} and {end}"
        )
    return starts[0], ends[0]


def _yaml(data: object) -> str:
    """JSON, which is YAML too: strings cannot break out of it, and they hold nothing that YAML refuses."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def _task_type(folder: Path) -> str:
    """The hub's word for what a model does, from the name of its class."""
    from geomerge.checkpoint.strict_json import read_json

    if not (folder / "config.json").is_file():
        return "other"
    found = read_json(folder / "config.json", what="config.json", constants=True).get("architectures")
    name = found[0] if isinstance(found, list) and found and isinstance(found[0], str) else ""
    if "CausalLM" in name:
        return "text-generation"
    return "image-classification" if "ForImageClassification" in name or "ViT" in name else "other"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md(text: str) -> str:
    """Text that is nothing but text in a Markdown table's cell."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(visible(text, 80), quote=False))
