"""A recipe's steps before the method, with their parameters for each tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geomerge.engine.matrices import is_weight
from geomerge.errors import RecipeError, UsageError
from geomerge.methods.base import Method
from geomerge.methods.chain import Step
from geomerge.recipe import grammar
from geomerge.recipe.resolve import Lookup, Resolved, scopes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geomerge.anatomy import Part
    from geomerge.engine.lineup import Lineup
    from geomerge.engine.plan import Node
    from geomerge.recipe import values
    from geomerge.recipe.values import Module


class Chain:
    """The steps before one slice's method, looked up for one tensor after the other.

    Args:
        module: The slice's module.
        lineup: The slice's inputs and method.
        used: Takes the filters that have matched a tensor.

    Raises:
        RecipeError: The method has no task vectors.
    """

    def __init__(self, module: Module, lineup: Lineup, used: set[int]) -> None:
        recipe = lineup.recipe
        steps = [s for s in recipe.steps if s.name in grammar.BEFORE]
        if steps and not lineup.based:
            name, use = lineup.method.name, lineup.method.base_use
            raise RecipeError(
                f"the step {steps[0].name!r} thins task vectors, and "
                + (f"{name} without a base has none" if use == "optional" else f"{name} works on none"),
                where=str(steps[0].where),
                hint="add `base_model: PATH`"
                if use == "optional"
                else "take a method that needs a base model, such as task_arithmetic",
            )
        drawn = next((s for s in steps if s.name in _RANDOM and _thins_by(lineup.method) == s.name), None)
        if drawn is not None:
            # The step has the masks of the method of its name: what it keeps would be kept again, and made up for twice.
            raise RecipeError(
                f"the step {drawn.name!r} comes before {lineup.method.name}, which is the same step and a method",
                where=str(drawn.where),
                hint=f"give {lineup.method.name} the product of the densities, or take the method of the chain "
                f"`{getattr(lineup.method, 'chain', '')}`",
            )
        self._lineup = lineup
        self._made: dict[tuple[Any, ...], Step] = {}
        self._steps: list[tuple[values.Step, type[Step], dict[str, Lookup], dict[str, list[Lookup]]]] = []
        if not steps:
            return
        from geomerge.methods import before

        for step in steps:
            cls = before.get(step.name)
            shared: dict[str, Lookup] = {}
            each: dict[str, list[Lookup]] = {}
            for name, p in cls.parameters().items():
                if not p.per_model:
                    shared[name] = Lookup(name, (step.parameters,), used)
                    continue
                key = f"{step.name}.{name}"
                own = {key: step.parameters[name]} if name in step.parameters else {}
                each[name] = [
                    Lookup(key, (*scopes(recipe, module, lineup.slice, e.source), own), used) for e in lineup.others
                ]
            self._steps.append((step, cls, shared, each))

    def at(self, part: Part, inputs: list[Part], shape: tuple[int, ...], t: float) -> tuple[Step, ...]:
        """The steps that change one tensor's task vectors.

        Args:
            part: The output's tensor, which shared parameters' filters test.
            inputs: The tensor of each expert, which its own parameters' filters test.
            shape: The tensor's shape.
            t: The depth in the slice.

        Raises:
            RecipeError: A missing or impossible value, with the line that gives it.
        """
        found = []
        for step, cls, shared, each in self._steps:
            values: dict[str, Any] = {}
            answers: list[Resolved] = []
            for name, lookup in shared.items():
                answer = lookup.at(part, t)
                if answer is not None:
                    values[name] = answer.value
                    answers.append(answer)
            for name, lookups in each.items():
                several = [lookup.at(p, t) for lookup, p in zip(lookups, inputs, strict=True)]
                if any(s is not None for s in several):
                    default = cls.parameters()[name].default
                    values[name] = [default if s is None else s.value for s in several]
                    answers += [s for s in several if s is not None]
            made = self._make(step, cls, values, answers, part).decided(is_weight(part, shape))
            if not made.idle:
                found.append(made)
        return tuple(found)

    def _make(
        self, step: values.Step, cls: type[Step], values: dict[str, Any], answers: list[Resolved], part: Part
    ) -> Step:
        key = (step.name, *((n, tuple(v) if isinstance(v, list) else v) for n, v in values.items()))
        made = self._made.get(key)
        if made is None:
            recipe = self._lineup.recipe
            try:
                for name, p in cls.parameters().items():
                    if p.per_model and p.required and None in values.get(name, ()):
                        raise UsageError(f"{cls.name} needs the parameter {name!r} for every model: {p.doc}")
                new = cls.make(values, count=len(self._lineup.others), compat=recipe.compat)
            except UsageError as error:
                blamed = next((a for a in answers if _impossible(cls, a, values)), None)
                place, said = (blamed.where, blamed.said_of(part)) if blamed is not None else (step.where, "")
                raise RecipeError(f"the step {error.what}{said}", where=str(place), hint=error.hint) from None
            assert isinstance(new, Step)
            made = self._made[key] = new
        return made


_RANDOM = ("dare", "della")
"""Steps that draw."""


def _thins_by(method: type[Method]) -> str | None:
    """The step that a published method begins with."""
    said: str = getattr(method, "chain", "")
    return said.split(" → ", maxsplit=1)[0] or None


def same_draws(nodes: Sequence[Node], stages: Sequence[values.Recipe]) -> str | None:
    """A note on a recipe that draws by the same seed for what an earlier recipe of the file has drawn for already: masks
    depend on the seed, the tensor and the place among the experts, so what the first keeps the second keeps, too, and
    rescaling makes up for it twice."""
    for node in nodes:
        for operand in node.operands[1:] if _draws(node) else ():
            earlier = nodes[operand.node] if operand.node >= 0 else None
            if earlier is None or not _draws(earlier) or node.name != earlier.name:
                continue
            first, second = stages[earlier.stage], stages[node.stage]
            if first.seed == second.seed:
                return (
                    f"{first.name!r} and the merge of it draw the same masks, so that what is left is made up for twice: "
                    f"give one of them another `seed` than {first.seed}"
                )
    return None


def _draws(node: Node) -> bool:
    own = None if node.method is None else _thins_by(type(node.method))
    return own in _RANDOM or any(step.name in _RANDOM for step in node.chain)


def _impossible(cls: type[Step], answer: Resolved, values: dict[str, Any]) -> bool:
    """Whether a value cannot be one of the parameter that has it."""
    for name, p in cls.parameters().items():
        given = values.get(name)
        if answer.value is given or (isinstance(given, list) and any(answer.value is g for g in given)):
            try:
                p.check(answer.value)
            except ValueError:
                return True
    return False
