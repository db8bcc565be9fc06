"""``geomerge methods``: the merge methods, and everything about one of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from geomerge.methods.base import Method, Parameter


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A method or a step; without a name all are listed.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of text: one object, or a list of them without a name.")
    ] = False,
) -> None:
    """List the merge methods and steps, or explain one.

    Of one: its formula, paper, parameters, properties, and an example recipe.
    """
    from geomerge.cli.catalogue import catalogue, explained
    from geomerge.cli.console import write_json

    if name is None:
        found = catalogue()
        if json:
            write_json([_as_json(entry, method) for entry, method in found.items()])
        else:
            _show_all(found)
    else:
        entry, method = explained(name)
        if json:
            write_json(_as_json(entry, method))
        else:
            _show_one(entry, method)


def _show_all(found: dict[str, type[Method]]) -> None:
    from geomerge.cli.console import show, table

    rows = [
        (name, m.family, "" if m.family == "step" else _models(m), m.base_use, m.title) for name, m in found.items()
    ]
    made = table(("method", "family", "models", "base", "title"), rows)
    show(
        made,
        "",
        "`geomerge methods NAME` explains one. Models are counted without a base that is required. Steps stand before or "
        "after a method, under `steps:` of a recipe.",
    )


def _show_one(name: str, method: type[Method]) -> None:
    from geomerge.cli.catalogue import cost, step_of
    from geomerge.cli.console import facts, heading, show, table, write_lines
    from geomerge.methods.chain import Step
    from geomerge.methods.properties import NAMES, meaning

    aliases = f" (also {', '.join(method.aliases)})" if method.aliases else ""
    rows = [
        (name, method.title + aliases),
        ("usage", method.usage()),
        ("formula", method.formula),
        ("paper", method.paper),
        ("when", method.when),
    ]
    properties = "; ".join(meaning(p, method) for p in NAMES if p in method.properties) or "none of the tested ones"
    if issubclass(method, Step):
        rows += [
            ("family", f"step, {'before' if method.before else 'after'} a method; a base is {method.base_use}"),
            ("properties", f"with task arithmetic: {properties}"),
        ]
    else:
        rows += [
            ("models", f"{method.models_text()}; {_base(method)}"),
            ("family", method.family),
            ("properties", f"at the default parameters: {properties}"),
        ]
        step = step_of(method)
        if step is not None:
            rows.append(("as a step", f"before another method: `geomerge methods {step}`"))
    rows.append(("cost", cost(method)))
    show(facts(rows))
    parameters = method.parameters()
    if parameters:
        lines = [
            (name, _range(p), _default(method, p), p.doc + ("; one for each model" if p.per_model else ""))
            for name, p in parameters.items()
        ]
        made = table(("parameter", "value", "default", "meaning"), lines)
        show(heading("parameters"), made)
    show(heading("example"))
    write_lines(f"  {line}" for line in method.example.rstrip().splitlines())


def _models(method: type[Method]) -> str:
    low, high = method.models
    return str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"


def _base(method: type[Method]) -> str:
    """What becomes of a base."""
    if method.base_use != "ignored":
        return f"the base is {method.base_use}"
    if method.models[1] is None and method.family != "search":
        return "a base that is named but not listed counts as one more model"
    return "there is no base"


def _range(p: Parameter) -> str:
    """Which values it takes."""
    if p.choices:
        return ", ".join(p.choices)
    if p.kind is bool:
        return "true, false"
    if p.kind is str:
        return "a file"
    text = "whole number" if p.kind is int else "number"
    if p.expert:
        text = "an expert's name or number"
    if p.within is not None:
        text += f" in {p.interval}"
    elif p.above is not None:
        text += f" above {p.above:g}"
    return text + (", more with `extrapolate`" if p.extrapolates else "")


def _default(method: type[Method], p: Parameter) -> str:
    own = "required" if p.required else "none" if p.default is None else _word(p.default)
    theirs = method.mergekit.get(p.name)
    return own if theirs is None or theirs == p.default else f"{own} (mergekit: {_word(theirs)})"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _as_json(name: str, method: type[Method]) -> dict[str, Any]:
    from geomerge.cli.catalogue import cost

    return {
        "name": name,
        "usage": method.usage(),
        "aliases": list(method.aliases),
        "family": method.family,
        "title": method.title,
        "formula": method.formula,
        "paper": method.paper,
        "when": method.when,
        "models": {"least": method.models[0], "most": method.models[1]},
        "base": method.base_use,
        "properties": sorted(method.properties),
        "cost": cost(method),
        "parameters": [
            {
                "name": p.name,
                "type": {float: "number", int: "integer", bool: "boolean", str: "string"}[p.kind],
                "per_model": p.per_model,
                "required": p.required,
                "default": p.default,
                "mergekit_default": method.mergekit.get(p.name, p.default),
                "least": _bound(p.within[0]) if p.within else None,
                "most": _bound(p.within[1]) if p.within else None,
                "above": p.above,
                "choices": list(p.choices),
                "doc": p.doc,
            }
            for p in method.parameters().values()
        ],
        "example": method.example,
    }


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None
