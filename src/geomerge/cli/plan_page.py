"""A plan for people: a header, a table in which equal blocks are one line, what is left out, notes; and as JSON."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from geomerge.anatomy.components import inner_name
from geomerge.checkpoint.dtypes import recipe_name
from geomerge.cli.console import amount, bullets, clean, count, duration, facts, heading, show, table, write_lines
from geomerge.cli.loss import dtypes, rounded, rounding
from geomerge.cli.patterns import Group, folded, grouped, split
from geomerge.engine.curves import curves
from geomerge.engine.plan import REST
from geomerge.methods import registry

if TYPE_CHECKING:
    from geomerge.engine.curves import Curves
    from geomerge.engine.estimate import Estimate
    from geomerge.engine.plan import InputModel, Node, Operand, Plan
    from geomerge.methods.base import Method

_COLUMNS = 9
"""Blocks that the table of coefficients shows."""

_LINES = 60
"""The table's most lines; models whose tensors have no pattern could fill any number."""


# -- text --------------------------------------------------------------------------------------------------------------


def show_plan(plan: Plan, expected: Estimate | None) -> None:
    """The whole page on stdout."""
    names = _Names(plan)
    show(heading_line(plan), facts(_header(plan, expected)), heading("models"), _models(plan, names))
    for index, stage in enumerate(plan.stages):
        nodes = [n for n in plan.nodes if n.stage == index]
        title = "tensors" if len(plan.stages) == 1 else f"tensors of {clean(stage.name or 'the output')}"
        show(heading(title), *_tensor_table(nodes, names))
    depth = curves(plan)
    if depth is not None and not depth.constant:
        show(heading("coefficient t over depth (0: the first model, 1: the other)"), _curves(depth))
    if plan.left_out:
        show(heading("left out"), bullets(_left_out(plan.left_out)))
    if plan.notes:
        show(heading("notes"), bullets(clean(note) for note in plan.notes))


def heading_line(plan: Plan) -> str:
    """The methods: name and title."""
    return " → ".join(f"{s.method}: {registry.get(s.method).title}" for s in plan.stages)


def show_tensors(plan: Plan) -> None:
    """Every tensor in a line: name, shape, dtype, bytes, inputs, method with all parameters or rule."""
    names = _Names(plan)
    describe = _Described(every=True)
    nodes = list(plan.nodes) if len(plan.stages) > 1 else list(plan.output_nodes())
    rows = []
    for n in nodes:
        sources = ", ".join(names.full(o, n.name) for o in n.operands)
        shape = "[" + ", ".join(map(str, n.shape)) + "]"
        said = n.rule == "merge" or n.rule.startswith(REST) or n.method is None
        rule = "" if said else f"; {clean(n.rule)}"
        rows.append(
            (clean(n.name), shape, recipe_name(n.dtype), amount(n.nbytes), f"{describe(n)}{rule} from {sources}")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    write_lines(
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}  {how}"
        for name, shape, dtype, size, how in rows
    )
    write_lines(f"left out: {clean(name)}: {clean(rule)}" for name, rule in plan.left_out.items())


def _header(plan: Plan, expected: Estimate | None) -> list[tuple[str, str]]:
    outputs = list(plan.output_nodes())
    last = plan.stages[-1]
    rows = [("output", f"{count(len(outputs), 'tensor')}, {amount(plan.nbytes)}, {dtypes(outputs)}")]
    if expected is not None:
        rows += [
            ("time", f"{_about(expected.seconds)} when the models are in the page cache"),
            ("memory", f"about {amount(expected.memory)} beside the libraries"),
            ("reading", amount(expected.read)),
        ]
        loss = expected.rounding_loss
        if loss is not None:
            small = f"rounding to {rounded(outputs)} takes {loss * 100:.1f} % of the task vectors' norm"
            rows.append(("loss", rounding(plan, loss) or small))
    elif last.rounding != "nearest":
        rows.append(("rounding", last.rounding))
    if last.compat is not None:
        rows.append(("profile", f"compat: {clean(last.compat)}"))
    if last.seed:
        rows.append(("seed", str(last.seed)))
    rows.append(("plan", plan.hash[:16]))
    return rows


def _about(seconds: float) -> str:
    text = duration(seconds)
    return text if text.startswith("under") else f"about {text}"


def _models(plan: Plan, names: _Names) -> Any:
    bases = {n.operands[0].input for n in plan.nodes if n.method is not None and n.method.base_use == "required"}
    rows = []
    for index, model in enumerate(plan.inputs):
        revision = f" @{model.revision[:12]}" if model.revision else ""
        base = "  (base)" if index in bases else ""
        size = amount(sum(f[1] for f in model.files)) if model.files else ""
        rows.append((names.number(index), f"{clean(model.ref)}{revision}{base}", size, str(len(model.files) or "")))
    return table(("", "model", "size", "files"), rows, right=("size", "files"))


def _tensor_table(nodes: Sequence[Node], names: _Names) -> list[Any]:
    describe = _Described()

    def exactly(node: Node) -> Hashable:
        return describe(node), alike(node)

    def alike(node: Node) -> Hashable:
        # Tensors of one line may differ in their parameters' values, not in where they come from or what is done.
        how = node.rule if node.method is None else (type(node.method), node.rule)
        steps = tuple(type(step) for step in node.chain), len(node.columns), node.lift is None
        return how, steps, node.dtype, tuple((o.input, o.rows >= 0, names.shift(o, node.name)) for o in node.operands)

    def key(group: Group[Node]) -> tuple[str, str, str]:
        first = group.items[0]
        return describe.all(group.items), names.group(group), recipe_name(first.dtype)

    rows = folded(grouped(nodes, lambda n: n.name, exactly, alike), key)
    several = len({n.dtype for n in nodes}) > 1
    columns = ["tensors", "number", "size", *(["dtype"] if several else []), "from", "how"]
    lines = []
    for row in rows[:_LINES]:
        how, sources, dtype = row.key
        size = amount(sum(n.nbytes for n in row.items))
        lines.append((clean(row.pattern), f"{len(row.items):,}", size, *([dtype] if several else []), sources, how))
    made = table(columns, lines, right=("number", "size"))
    more = [] if len(rows) <= _LINES else [f"... and {len(rows) - _LINES:,} more lines: --all shows every tensor"]
    return [made, *more]


def _curves(depth: Curves) -> Any:
    """A line for each role, a column for some of the blocks, evenly spread; what stands outside of the blocks at the end."""
    number = min(depth.blocks, _COLUMNS)
    shown = sorted({round(i * (depth.blocks - 1) / max(number - 1, 1)) for i in range(number)})
    blocks = [str(block) for block in shown]
    rows = []
    for role in (*depth.roles, *(r for r in depth.outside if r not in depth.roles)):
        curve = depth.roles.get(role, {})
        outside = depth.outside.get(role)
        values = [f"{curve[block]:.2f}" if block in curve else "" for block in shown]
        rows.append((role, *values, "" if outside is None else f"{outside:.2f}"))
    return table(("block", *blocks, "outside"), rows, right=(*blocks, "outside"))


def _left_out(left_out: Iterable[Any]) -> list[str]:
    by_rule: dict[str, list[str]] = {}
    for name, rule in dict(left_out).items():
        by_rule.setdefault(rule, []).append(name)
    return [
        f"{count(len(names), 'tensor')}, {clean(rule)}: {clean(names[0])}{', ...' if len(names) > 1 else ''}"
        for rule, names in by_rule.items()
    ]


@dataclass
class _Names:
    """How a plan's inputs are named in the table: by their numbers in the list of models."""

    plan: Plan

    def number(self, index: int) -> str:
        return str(index + 1)

    def short(self, operand: Operand) -> str:
        if operand.input >= 0:
            return self.number(operand.input)
        return clean(self.plan.stages[self.plan.nodes[operand.node].stage].name)

    def full(self, operand: Operand, output: str) -> str:
        """The input, and the tensor in it when its name is another than the output's."""
        model = clean(self.plan.inputs[operand.input].ref) if operand.input >= 0 else self.short(operand)
        rows = " (rows in the new vocabulary's order)" if operand.rows >= 0 else ""
        return (model if operand.tensor == output else f"{model}: {clean(operand.tensor)}") + rows

    def shift(self, operand: Operand, output: str) -> Hashable:
        """By how many blocks the input's tensor stands before or after the output's; its name if it is another one."""
        if operand.tensor == output:
            return 0
        template, numbers = split(operand.tensor)
        wanted, own = split(output)
        if template != wanted:
            return template if inner_name(operand.tensor) == inner_name(output) else operand.tensor
        return tuple(a - b for a, b in zip(numbers, own, strict=True))

    def group(self, group: Group[Node]) -> str:
        """The inputs of a group of tensors; with their blocks where these are others than the output's."""
        said = []
        for k, operand in enumerate(group.items[0].operands):
            text = self.short(operand)
            if operand.tensor != group.items[0].name:
                first, last = split(operand.tensor), split(group.items[-1].operands[k].tensor)
                if first[0] == group.template and first[1]:
                    a, b = first[1][0], last[1][0]
                    text += f" (block{'' if a == b else 's'} {a}{'' if a == b else f'-{b}'})"
                elif inner_name(operand.tensor) == inner_name(group.items[0].name):
                    text += " (own name)"  # without the output's prefix; --all shows every name
                else:
                    text += f" ({clean(operand.tensor)})"
            said.append(text + (" (new rows)" if operand.rows >= 0 else ""))
        return ", ".join(said)


class _Described:
    """Methods with their parameters in words, each worked out once.

    Args:
        every: Name default values, too.
    """

    def __init__(self, *, every: bool = False) -> None:
        self._every = every
        self._known: dict[Hashable, str] = {}

    def __call__(self, node: Node) -> str:
        key = (id(node.method), node.scale, node.lift, node.rule, node.chain, tuple(c.omega for c in node.columns))
        if key not in self._known:
            self._known[key] = clean(self._say([node]))
        return self._known[key]

    def all(self, nodes: Sequence[Node]) -> str:
        """Several nodes of one method: parameters that vary over them show how, ``t=0→0.5→1``."""
        alike = len({self(n) for n in nodes}) == 1
        return self(nodes[0]) if alike else clean(self._say(nodes))

    def _say(self, nodes: Sequence[Node]) -> str:
        method = nodes[0].method
        if method is None:
            return nodes[0].rule
        before = [self._called([n.chain[i] for n in nodes]) for i in range(len(nodes[0].chain))]
        text = " → ".join([*before, self._called([n.method for n in nodes if n.method is not None])])
        scale = _course([n.scale for n in nodes])
        text = text if scale == "1" else f"{text} × {scale}"
        lifts = [n.lift for n in nodes if n.lift is not None]
        if lifts:
            text += f" → lines(alpha=auto, beta·depth={_course(lifts)})"
        for i in range(len(nodes[0].columns)):
            text += f" → aim(omega={_course([n.columns[i].omega for n in nodes])})"
        return f"{nodes[0].rule}: {text}" if nodes[0].rule.startswith(REST) else text

    def _called(self, methods: Sequence[Method]) -> str:
        """The name and parameters of several nodes' method, or step."""
        method = methods[0]
        said = []
        for name, p in type(method).parameters().items():
            course: list[tuple[Any, ...]] = []
            for value in (getattr(m, p.attribute) for m in methods):
                several = value if isinstance(value, tuple) else (value,)
                if not course or course[-1] != several:
                    course.append(several)
            if self._every or course != [(p.default,) * len(course[0])]:
                models = [_course([v[k] for v in course]) for k in range(len(course[0]))]
                values = models[0] if len(set(models)) == 1 else f"[{', '.join(models)}]"
                said.append(f"{name}={values}")
        return f"{method.name}({', '.join(said)})" if said else method.name


def _course(values: Sequence[Any]) -> str:
    """The turning points of a course of values: ``0→0.5→0.3``; from many, the smallest and the largest."""
    kept: list[Any] = []
    for value in values:
        if kept and kept[-1] == value:
            continue
        numbers = len(kept) > 1 and all(isinstance(v, float | int) for v in (*kept[-2:], value))
        if numbers and (kept[-1] - kept[-2]) * (value - kept[-1]) > 0:
            kept[-1] = value
        else:
            kept.append(value)
    if len(kept) > 6 and all(isinstance(v, float | int) for v in kept):
        return f"{min(kept):.3g} to {max(kept):.3g}"
    digits = 3 if len(kept) > 1 else 6
    return "→".join(f"{v:.{digits}g}" if isinstance(v, float) else str(v).lower() for v in kept)


# -- JSON --------------------------------------------------------------------------------------------------------------


def as_json(plan: Plan, expected: Estimate | None) -> dict[str, Any]:
    """Everything the page says, and every tensor."""
    return {
        "plan": plan.hash,
        "stages": [asdict(stage) for stage in plan.stages],
        "inputs": [_input(i) for i in plan.inputs],
        "output": {
            "tensors": len(plan.outputs),
            "bytes": plan.nbytes,
            "dtypes": list(dict.fromkeys(recipe_name(n.dtype) for n in plan.output_nodes())),
        },
        "estimate": None if expected is None else asdict(expected),
        "tensors": [_tensor(plan, n) for n in plan.output_nodes()],
        "left_out": dict(plan.left_out),
        "notes": list(plan.notes),
    }


def _input(model: InputModel) -> dict[str, Any]:
    files = [{"name": name, "bytes": size, "header_sha256": header} for name, size, header in model.files]
    return {**asdict(model), "files": files, "bytes": sum(f[1] for f in model.files)}


def _tensor(plan: Plan, node: Node) -> dict[str, Any]:
    def source(operand: Operand) -> dict[str, Any]:
        if operand.input >= 0:
            return {"model": plan.inputs[operand.input].ref, "tensor": operand.tensor, "reordered": operand.rows >= 0}
        stage = plan.stages[plan.nodes[operand.node].stage].name
        return {"stage": stage, "tensor": operand.tensor, "reordered": operand.rows >= 0}

    return {
        "name": node.name,
        "shape": list(node.shape),
        "dtype": recipe_name(node.dtype),
        "bytes": node.nbytes,
        "rule": node.rule,
        "method": None if node.method is None else node.method.name,
        "parameters": None if node.method is None else node.method.values(),
        "before": [{"step": step.name, "parameters": step.values()} for step in node.chain],
        "scale": node.scale,
        "lines": None if node.lift is None else {"alpha": "auto", "beta_times_depth": node.lift},
        "aim": [{"statistics": source(c.statistics), "omega": c.omega, "axis": c.axis} for c in node.columns],
        "inputs": [source(o) for o in node.operands],
    }
