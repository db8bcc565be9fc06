"""Writes docs/methods/ from the methods' own metadata: what `make docs` runs.

    python docs/generate.py [--check]

One page a method or step, and an index. Nothing in them is written by hand, so a change belongs into the method's class.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from geomerge.cli.catalogue import catalogue, cost
from geomerge.methods.base import Method, Parameter
from geomerge.methods.chain import Step
from geomerge.methods.elementwise.task_vectors import TaskVectors
from geomerge.methods.properties import NAMES, meaning

FOLDER = Path(__file__).parent / "methods"
NOTICE = "<!-- Made by docs/generate.py from the method's class: edit that, then run `make docs`. -->"

BASE = {
    "required": "A base model is required (`base_model`).",
    "optional": "A base model is optional; with one, the method works on task vectors (differences from the base).",
    "ignored": "A base model is not needed. One that is named but not listed counts as one more model.",
}


GUIDES = {"continual": " See the [guide](../continual.md).", "search": " See the [guide](../search.md)."}


def pages() -> dict[str, str]:
    """File name → content of every page."""
    methods = catalogue()
    return {f"{name}.md": page(method) for name, method in methods.items()} | {"index.md": index(methods)}


def page(method: type[Method]) -> str:
    """One method's page."""
    parts = [NOTICE, f"# {method.title}", f"`{method.usage()}`" + _aliases(method), _paragraphs(method)]
    parts += ["```text\n" + method.formula + "\n```", f"Source: {method.paper}.", f"## When to use it\n\n{method.when}"]
    if issubclass(method, TaskVectors):
        parts.append(
            f"As a [chain](../recipes.md#steps-before-and-after-a-method) of a step and a method: `{method.chain}`."
        )
    if issubclass(method, Step):
        parts.append(_place(method))
    else:
        parts.append(f"## Models\n\nIt takes {method.models_text()}. {_base(method)}")
    parts += ["## Parameters", _parameters(method)]
    if method.mergekit:
        parts.append(_compat(method))
    language = "yaml" if "merge_method" in method.example else "sh"
    parts.append(f"## Example\n\n```{language}\n{method.example.strip()}\n```")
    if method.properties:
        parts += ["## What stays true", _properties(method)]
    if not issubclass(method, Step):
        parts.append(
            f"## Family and cost\n\n**{method.family.capitalize()}**: {cost(method)}{GUIDES.get(method.family, '')}"
        )
    return "\n\n".join(parts) + "\n"


def index(methods: dict[str, type[Method]]) -> str:
    """The page that lists them all."""
    rows = ["| method | what it is | family | models | base |", "|---|---|---|---|---|"]
    steps = {name: method for name, method in methods.items() if issubclass(method, Step)}
    for name, method in methods.items():
        if name in steps:
            continue
        number = method.models_text().removesuffix(" beside the base")
        rows.append(f"| [`{name}`]({name}.md) | {method.title} | {method.family} | {number} | {method.base_use} |")
    text = (
        "θ₀ is the base, θₖ are the other models, τₖ = θₖ − θ₀ their task vectors. The number of models is the number "
        "beside the base where a base is required. `geomerge methods NAME` prints the same in a terminal."
    )
    listed = ["| step | what it is | where | base |", "|---|---|---|---|"]
    for name, step in steps.items():
        where = "before a method" if step.before else "after a method"
        listed.append(f"| [`{name}`]({name}.md) | {step.title} | {where} | {step.base_use} |")
    said = "They stand under [`steps:`](../recipes.md#steps-before-and-after-a-method) of a recipe."
    return "\n\n".join([NOTICE, "# Methods", text, "\n".join(rows), "## Steps", said, "\n".join(listed)]) + "\n"


def _aliases(method: type[Method]) -> str:
    return f" (also {', '.join(f'`{alias}`' for alias in method.aliases)})" if method.aliases else ""


def _paragraphs(method: type[Method]) -> str:
    """The class's docstring, each paragraph on one line."""
    text = inspect.getdoc(method) or ""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _base(method: type[Method]) -> str:
    none = method.base_use == "ignored" and (method.models[1] == 1 or method.family == "search")
    return "There is no base model." if none else BASE[method.base_use]


def _place(step: type[Step]) -> str:
    """Where a step stands, and what it costs."""
    if not step.before:
        text = "It follows a method; steps after a method may follow each other in any order. "
        if step.base_use == "required":
            text += "The method must work from a base model (`base_model`). "
        else:
            text += "Without a base model the merge is compared with the first model. "
    else:
        text = (
            "It thins each model's task vector before any method that works from a base model (`base_model`), and is "
            "computed where the tensors are read. A value for one model stands among that model's parameters under the "
            f"step's name, as in `{step.name}.density`. "
            if "density" in step.parameters()
            else "It thins each model's task vector before any method that works from a base model (`base_model`). "
        )
    return f"## Place\n\n{text}[Steps before and after a method](../recipes.md#steps-before-and-after-a-method)."


def _parameters(method: type[Method]) -> str:
    known = method.parameters()
    if not known:
        return "None."
    rows = ["| name | for | value | default | meaning |", "|---|---|---|---|---|"]
    for name, p in known.items():
        default = "required" if p.required else _value(p.default)
        whose = "each model" if p.per_model else "all"
        rows.append(f"| `{name}` | {whose} | {_allowed(p)} | {default} | {p.doc.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def _allowed(p: Parameter) -> str:
    if p.choices:
        return ", ".join(f"`{choice}`" for choice in p.choices)
    if p.kind is bool:
        return "true or false"
    if p.kind is str:
        return "a file"
    text = "whole number" if p.kind is int else "number"
    if p.expert:
        text = "an expert's name or number"
    if p.within:
        text += f" in {p.interval}"
    return f"{text}; beyond with `extrapolate: true`" if p.extrapolates else text


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _compat(method: type[Method]) -> str:
    values = ", ".join(f"`{name}: {_value(value).strip('`')}`" for name, value in method.mergekit.items())
    return f"With `compat: mergekit` the defaults are {values}, unless the recipe says otherwise."


def _properties(method: type[Method]) -> str:
    said = [f"- {_sentence(meaning(name, method))}" for name in NAMES if name in method.properties]
    lacking = [meaning(name, method).rstrip(",") for name in NAMES if name not in method.properties]
    what = "Of task arithmetic with this step" if issubclass(method, Step) else "At the default parameters"
    text = f"{what}, and tested:\n\n" + "\n".join(said)
    return f"{text}\n\nNot so in general: {'; '.join(lacking)}." if lacking else text


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def main(check: bool) -> int:
    """Write what has changed; with `check` only say so."""
    wanted = pages()
    there = {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.md")}
    changed = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    for name in changed:
        sys.stdout.write(f"{'stale: ' if check else ''}docs/methods/{name}\n")
        if not check and name in wanted:
            (FOLDER / name).write_text(wanted[name], "utf-8")
        elif not check:
            (FOLDER / name).unlink()
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
