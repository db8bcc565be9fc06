"""All methods by the names under which they are explained: those of recipes, those that are verbs of their own, and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomerge.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from geomerge.methods.base import Method


def catalogue() -> dict[str, type[Method]]:
    """Name → class: the methods of recipes, then the continual ones and the greedy soup, then the steps around a method.

    A step that is called as a method is, such as ``dare``, is listed as ``step_dare``.
    """
    from geomerge.continual import RULES
    from geomerge.methods import registry
    from geomerge.methods.after import explained_steps
    from geomerge.search.soup import GreedySoup

    recipes = registry.all_methods()
    continual = {
        f"continual_{name}" if name in recipes or name == "average" else name: rule for name, rule in RULES.items()
    }
    methods = recipes | dict(sorted(continual.items())) | {GreedySoup.name: GreedySoup}
    taken = {*methods, *(alias for method in methods.values() for alias in method.aliases)}
    steps = {f"step_{step.name}" if step.name in taken else step.name: step for step in explained_steps()}
    return methods | steps


def explained(name: str) -> tuple[str, type[Method]]:
    """The entry of a name or an alias.

    Raises:
        UsageError: There is none.
    """
    known = catalogue()
    if name in known:
        return name, known[name]
    aliases: dict[str, str] = {}
    for entry, method in known.items():
        for alias in method.aliases:
            aliases.setdefault(alias, entry)  # a method's goes before a step's
    if name in aliases:
        return aliases[name], known[aliases[name]]
    raise UsageError(f"there is no method or step {name!r}", hint=did_you_mean(name, [*known, *aliases]))


def step_of(method: type[Method]) -> str | None:
    """The entry of the step that is called as this method, or as one of its aliases."""
    called = {method.name, *method.aliases}
    steps = {entry: step for entry, step in catalogue().items() if step.family == "step" and step is not method}
    return next((entry for entry, step in steps.items() if step.name in called), None)
