"""What a parameter's value is for one tensor.

The innermost scope with a matching entry counts: source → slice → module → recipe. A scope whose filters all miss falls
through to the next. Parameters with one value per model test their filters against the *input* tensor, which may stand
in another block than the output; parameters with one value for all test the *output* tensor, and have no source scope.
A planner makes one `Lookup` for each parameter of each source and asks it once a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from geomerge.errors import RecipeError, did_you_mean
from geomerge.recipe.values import Entry, Module, Parameters, Recipe, Scalar, Slice, Source, Where

if TYPE_CHECKING:
    from geomerge.anatomy import Part


class Resolved(NamedTuple):
    """A value, where the recipe gives it, and the entry that matched."""

    value: Scalar
    where: Where
    entry: Entry

    def said_of(self, part: Part) -> str:
        """What a message adds of the tensor: nothing when the entry is for all of them."""
        test = self.entry.filter
        everywhere = (test is None or test.everywhere) and not isinstance(self.entry.value, tuple)
        return "" if everywhere else f" (for {part.name})"


class Unused(NamedTuple):
    """An entry that has decided no tensor's value, and its parameter."""

    parameter: str
    entry: Entry


def layer_t(index: int, count: int) -> float:
    """The depth in [0, 1] of the block at `index` in a slice of `count` blocks; 1 when it is the only one.

    Depth starts anew in every slice. Tensors outside blocks have depth 0: embeddings, final norm and head alike.
    """
    return index / (count - 1) if count > 1 else 1.0


def scopes(recipe: Recipe, module: Module, each: Slice, source: Source | None = None) -> tuple[Parameters, ...]:
    """The places to look for a parameter, innermost first; without a source: for parameters with one value for all."""
    outer = (each.parameters, module.parameters, recipe.parameters)
    return outer if source is None else (source.parameters, *outer)


def resolve_parameter(name: str, part: Part, t: float, scopes: Sequence[Parameters]) -> Resolved | None:
    """The value of the parameter `name` for one tensor.

    Args:
        name: The recipe's name of the parameter.
        part: The tensor whose name, role and block the filters test.
        t: Its depth, see `layer_t`.
        scopes: Innermost first, see `scopes`.

    Returns:
        The value with its place and entry, or ``None`` when no scope has a value: the method's default holds.
    """
    for scope in scopes:
        setting = scope.get(name)
        if setting is not None:
            entry = setting.match(part)
            if entry is not None:
                return Resolved(entry.at(t), entry.where, entry)
    return None


class Lookup:
    """`resolve_parameter` for many tensors: the scopes are searched once, and equal answers are one object.

    Attributes:
        constant: The answer for every tensor, when the parameter does not depend on the tensor.
        absent: No scope mentions the parameter, so the answer is always ``None``.
        where: The first line that mentions it.
    """

    __slots__ = ("_candidates", "absent", "constant", "used", "where")

    def __init__(self, name: str, scopes: Iterable[Parameters], used: set[int] | None = None) -> None:
        """Prepare the lookup.

        Args:
            name: The recipe's name of the parameter.
            scopes: Innermost first.
            used: Collects ``id(entry)`` of every entry that decided a value; may be shared between lookups.
        """
        self.used = used if used is not None else set()
        self._candidates: list[tuple[Callable[[Part], bool] | None, Entry, dict[float, Resolved]]] = []
        for entry in _reachable(name, scopes):
            test = entry.filter
            self._candidates.append((None if test is None or test.everywhere else test.matches, entry, {}))
        self.absent = not self._candidates
        self.where: Where | None = self._candidates[0][1].where if self._candidates else None
        self.constant: Resolved | None = None
        if self._candidates:
            first, entry, _ = self._candidates[0]
            if first is None and not isinstance(entry.value, tuple):
                self.constant = Resolved(entry.value, entry.where, entry)
                self.used.add(id(entry))

    def at(self, part: Part, t: float) -> Resolved | None:
        """The answer for one tensor; arguments and result as in `resolve_parameter`."""
        if self.constant is not None:
            return self.constant
        for test, entry, answers in self._candidates:
            if test is None or test(part):
                answer = answers.get(t)
                if answer is None:
                    self.used.add(id(entry))
                    answer = answers[t] = Resolved(entry.at(t), entry.where, entry)
                return answer
        return None


def unused_entries(recipe: Recipe, used: set[int]) -> tuple[Unused, ...]:
    """The entries with a filter that have decided no value, in the recipe's order.

    Args:
        recipe: The recipe that was resolved.
        used: ``id(entry)`` of the entries that have, as `Lookup` collects them.
    """
    return tuple(
        Unused(name, entry)
        for scope in recipe.scopes()
        for name, setting in scope.items()
        for entry in setting.entries
        if entry.filter is not None and not entry.filter.everywhere and id(entry) not in used
    )


def check_filters(
    recipe: Recipe, used: set[int], parts: Iterable[Part], tied: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """Refuse filters that match no tensor, which are misspelt or meant for another model.

    Args:
        recipe: The recipe that was resolved.
        used: As `Lookup` collects it while the whole plan is resolved.
        parts: All tensors of the inputs and of the output.
        tied: Names that are not stored → the tensors that they stand for.

    Returns:
        Notes about filters that do match something but decide nothing, because an earlier entry or an inner scope has
        taken their tensors. With ``compat: mergekit`` also about those that match nothing.

    Raises:
        RecipeError: A filter matches no tensor.
    """
    unused = unused_entries(recipe, used)
    if not unused:
        return ()
    tensors = list(parts)
    notes = []
    for parameter, entry in unused:
        assert entry.filter is not None
        if any(entry.filter.matches(part) for part in tensors):
            rule = recipe.components.get(entry.filter.component or "")
            why = "others come before it" if rule is None or rule.copy is None else "the component is copied"
            notes.append(f"{entry.where}: '{entry.filter}' of {parameter!r} decides nothing: {why}")
            continue
        what = f"'{entry.filter}' of {parameter!r} matches no tensor"
        if recipe.compat != "mergekit":
            hint = f"for example {tensors[len(tensors) // 2].name!r} is a tensor's name" if tensors else None
            components = sorted({part.component for part in tensors} - {""})
            if entry.filter.component is not None and entry.filter.component not in components:
                hint = did_you_mean(entry.filter.component, components) or (
                    f"the components are: {', '.join(components)}"
                    if components
                    else "the models have but one component"
                )
            for part in tensors:
                alias = next((a for a, stored in (tied or {}).items() if stored == part.name), None)
                if alias is not None and any(
                    entry.filter.matches(replace(part, name=alias, role=r)) for r in (part.role, "head")
                ):
                    hint = f"{alias} is tied to {part.name}, which is stored once and goes by this name"
            raise RecipeError(what, where=str(entry.where), hint=hint)
        notes.append(f"{entry.where}: {what}")
    return tuple(notes)


def _reachable(name: str, scopes: Iterable[Parameters]) -> Iterator[Entry]:
    """The entries for a parameter in the order of precedence, up to the first that is for every tensor."""
    for scope in scopes:
        setting = scope.get(name)
        for entry in setting.entries if setting is not None else ():
            yield entry
            if entry.filter is None or entry.filter.everywhere:
                return
