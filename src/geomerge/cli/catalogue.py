"""All methods by the names under which they are explained: those of recipes, and those that are verbs of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geomerge.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from geomerge.methods.base import Method


def catalogue() -> dict[str, type[Method]]:
    """Name → class: the methods of recipes, then the continual ones and the greedy soup."""
    from geomerge.continual import RULES
    from geomerge.methods import registry
    from geomerge.search.soup import GreedySoup

    recipes = registry.all_methods()
    continual = {
        f"continual_{name}" if name in recipes or name == "average" else name: rule for name, rule in RULES.items()
    }
    return recipes | dict(sorted(continual.items())) | {GreedySoup.name: GreedySoup}


def explained(name: str) -> tuple[str, type[Method]]:
    """The entry of a name or an alias.

    Raises:
        UsageError: There is none.
    """
    known = catalogue()
    if name in known:
        return name, known[name]
    aliases = {alias: entry for entry, method in known.items() for alias in method.aliases}
    if name in aliases:
        return aliases[name], known[aliases[name]]
    raise UsageError(f"there is no method {name!r}", hint=did_you_mean(name, [*known, *aliases]))
