"""A merge's coefficients over depth: read from the manifest tensor by tensor, laid out as role × block, and drawn."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from geomerge.report.heatmap import Grid, draw
from geomerge.report.runs import Run
from geomerge.report.section import Figure
from geomerge.report.words import number, visible

if TYPE_CHECKING:
    from geomerge.engine.plan import Plan

_MOST_PANELS = 8


@dataclass(frozen=True)
class Coefficients:
    """What a run combined its parents with.

    Attributes:
        quantity: ``coefficient``, or the parameter's name.
        grids: One for each parent (and module).
        tensors: How many tensors have it.
    """

    quantity: str
    grids: tuple[Grid, ...]
    tensors: int

    @property
    def vary(self) -> bool:
        """Whether there is anything to draw."""
        return any(grid.varies for grid in self.grids)


def read_coefficients(run: Run) -> list[Coefficients]:
    """The quantities of a run: the coefficients of its tensors where it has them, else its method's numbers by parent."""
    tensors: Mapping[str, Mapping[str, Any]] = run.manifest["tensors"]
    numbers: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name, entry in tensors.items():
        if entry.get("coefficients"):
            numbers["coefficient"][name] = [float(c) for c in entry["coefficients"]]
        elif entry.get("method") is not None:
            _take(numbers, name, run.manifest["methods"][entry["method"]]["parameters"])
    if "coefficient" in numbers:
        numbers = defaultdict(dict, {"coefficient": numbers["coefficient"]})
    return [
        Coefficients(key, tuple(_grids(run.shapes, run.config, rows, _names(run, _width(rows), key))), len(rows))
        for key, rows in numbers.items()
    ]


def _take(numbers: dict[str, dict[str, list[float]]], tensor: str, parameters: Mapping[str, Any]) -> None:
    """Keep those of a tensor's parameters that are numbers."""
    for key, value in parameters.items():
        found = value if isinstance(value, list | tuple) else [value]
        if found and all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
            numbers[key][tensor] = [float(v) for v in found]


def _width(rows: Mapping[str, list[float]]) -> int:
    return max(map(len, rows.values()))


def _grids(
    shapes: Mapping[str, tuple[int, ...]], config: Any, rows: Mapping[str, list[float]], names: Sequence[str]
) -> list[Grid]:
    from geomerge import anatomy

    parts = anatomy.read({**dict.fromkeys(rows, ()), **shapes}, config).parts
    width = _width(rows)
    modules = list(dict.fromkeys(parts[name].module for name in rows))
    made = []
    for module in modules:
        here = {n: parts[n] for n in rows if parts[n].module == module}
        blocks = sorted({p.block for p in here.values() if p.block is not None})
        for i in range(width):
            cells: dict[tuple[str, str], list[float]] = defaultdict(list)
            for name, part in here.items():
                if i < len(rows[name]) and math.isfinite(rows[name][i]):
                    column = {"pre": "in", "post": "out"}.get(part.position, str(part.block))
                    cells[part.role, column].append(rows[name][i])
            if cells:
                present = {column for _, column in cells}
                columns = ["in", *map(str, blocks), "out"]
                known = [role for role in anatomy.ROLES if any(r == role for r, _ in cells)]
                values = {at: statistics.fmean(found) for at, found in cells.items()}
                shown = tuple(c for c in columns if c in present)
                made.append(Grid(names[i], tuple(known), shown, values, module if len(modules) > 1 else ""))
    return made


def _names(run: Run, width: int, quantity: str) -> list[str]:
    """Whose the numbers are. Inputs stand base first, and then in the recipe's order."""
    if width == 1:
        return [visible(quantity)]
    inputs = run.parents
    base = _base(run)
    if base in inputs:
        inputs = [base, *(name for name in inputs if name != base)]
    if len(run.manifest["stages"]) == 1:
        if width == len(inputs):
            return [visible(name) for name in inputs]
        if width == len(inputs) - 1 and base in inputs:
            return [visible(name) for name in inputs[1:]]
    return [f"input {i + 1}" for i in range(width)]


def _base(run: Run) -> str | None:
    """The manifest's name of the recipe's base model."""
    from geomerge.errors import GeomergeError
    from geomerge.recipe import loads

    try:
        base = loads(run.recipe, "geomerge.yml").output.base_model
    except GeomergeError:
        return None
    if base is None:
        return None
    adapter = f"+{PurePath(base.lora.path).name}" if base.lora is not None else ""
    whole = f"{base.path}{adapter}"
    return whole if whole in run.parents else f"{PurePath(base.path).name}{adapter}"


def plan_figure(plan: Plan, name: str) -> Figure | None:
    """What of a plan's numbers differs over depth or role: a row for each role, a column for each block, a panel for each
    parameter and parent. Where nothing does the interpolation's t, and `None` where there is none."""
    numbers: dict[str, dict[str, list[float]]] = defaultdict(dict)
    parents: list[str] = []
    for node in plan.output_nodes():
        if node.method is not None:
            _take(numbers, node.name, node.method.values())
            here = [plan.inputs[o.input].name if o.input >= 0 else "an earlier merge" for o in node.operands]
            parents = max(parents, here, key=len)
    shapes = {node.name: node.shape for node in plan.output_nodes()}
    found: dict[str, list[Grid]] = {}
    for quantity, rows in numbers.items():
        several = _width(rows) > 1
        whose = parents[-_width(rows) :] if several and len(parents) >= _width(rows) else [quantity]
        titles = [f"{quantity}: {visible(parent)}" for parent in whose] if several else whose
        found[quantity] = _grids(shapes, plan.config, rows, titles)
    differing = {quantity: [grid for grid in grids if grid.varies] for quantity, grids in found.items()}
    drawn = {quantity: grids for quantity, grids in differing.items() if grids}
    drawn = drawn or {quantity: grids for quantity, grids in found.items() if quantity == "t"}
    if not drawn:
        return None
    shown = [grid for grids in drawn.values() for grid in grids][:_MOST_PANELS]
    alt = f"{', '.join(drawn)} by role and block, from {_range(shown)}."
    return Figure(name, lambda width: draw(shown, width), alt=alt)


def coefficients_figure(run: Run, found: Coefficients, name: str) -> Figure:
    """The quantity over depth: a row for each role, a column for each block, a panel for each parent."""
    grids = found.grids[:_MOST_PANELS]
    left = len(found.grids) - len(grids)
    more = f" {left} more are not drawn." if left else ""
    what = "Coefficient" if found.quantity == "coefficient" else f"The parameter {visible(found.quantity)}"
    return Figure(
        name,
        lambda width: draw(grids, width),
        alt=f"{what} of each parent in {run.name}, by role and block, from {_range(grids)}.",
        caption=f"{what} over depth: blocks from left to right (“in” before the first, “out” after the last), one row a "
        f"role, the mean where several tensors share a cell.{more}",
    )


def _range(grids: Sequence[Grid]) -> str:
    values = [v for grid in grids for v in grid.values.values()]
    return f"{number(min(values))} to {number(max(values))}"
