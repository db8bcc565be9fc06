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


def cost(method: type[Method]) -> str:
    """What it reads, and what it holds in memory."""
    from geomerge.methods.base import Elementwise, Matrix, Method, Span
    from geomerge.methods.chain import Step

    if issubclass(method, Step):
        return "done in the run of its method; what it measures of a tensor takes a pass of its own."
    if issubclass(method, Span):
        text = "the output is a linear combination of the inputs. "
        if method.needs_gram is not Span.needs_gram:
            return text + "The coefficients do not depend on the weights, so each input is read once."
        return text + (
            "Each tensor is read twice: once to measure the inputs' inner products (a K×K matrix, from which the "
            "coefficients follow), once to combine them. The manifest `geomerge.json` records the coefficients of every "
            "tensor."
        )
    if method.family == "continual":
        return (
            "a step reads the base, the new expert and the running sum, and replaces the state; its time and memory are the "
            "same however many experts went before."
        )
    if method.family == "search":
        return "averages are blended in memory and scored, one for each model."
    surveyed = "" if method.survey is Method.survey else _SURVEYED
    if issubclass(method, Matrix):
        text = (
            "the output is a function of whole weight matrices. Each input is read once for it, and the matrices of one "
            "tensor are in memory together in float64; `geomerge plan` says how much that takes and how long it may last. "
            "Each matrix is computed by one thread, several matrices side by side, so that the bits do not depend on the "
            "number of threads."
        )
        return text + surveyed
    text = "each output element is a function of the same element of the inputs. "
    if issubclass(method, Elementwise) and method.measure is Elementwise.measure:
        return text + "Nothing of a tensor is measured beforehand, so each input is read once for it." + surveyed
    return (
        text
        + "Where the parameters ask for statistics of a tensor (thresholds, norms, counts), these are measured in passes of "
        "their own before the tensor is read for the output; no tensor is ever sorted or held whole." + surveyed
    )


_SURVEYED = (
    " Where the parameters ask for a look at the whole model first, all of it is read once more, or several times."
)
