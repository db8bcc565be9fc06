"""Who goes into a tensor: a slice's sources in the order that its method wants, and the method's parameters for each tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from geomerge.engine.models import Model, Models
from geomerge.engine.schedule import Schedule
from geomerge.errors import RecipeError, UsageError, did_you_mean, together
from geomerge.methods import registry
from geomerge.methods.base import Method, Span
from geomerge.recipe.resolve import Lookup, Resolved, scopes
from geomerge.recipe.values import Module, Recipe, Slice, Source, Where

if TYPE_CHECKING:
    from geomerge.anatomy import Part


@dataclass(frozen=True)
class Entrant:
    """One input of a slice: a model, and the source that names it (`None` for a base that no source names)."""

    model: Model
    source: Source | None


class Lineup:
    """The inputs of one slice in order, base first where the method has one, and the parameters of its method.

    Raises:
        RecipeError: A missing base, a wrong number of models, a slice whose base has no layer range.
    """

    def __init__(
        self,
        recipe: Recipe,
        module: Module,
        each: Slice,
        models: Models,
        used: set[int],
        schedule: Schedule | None,
    ) -> None:
        self.recipe, self.slice = recipe, each
        self.method: type[Method] = registry.get(recipe.method)
        self.extrapolate = recipe.extrapolate or recipe.compat is not None
        self.schedule = schedule
        entrants = [Entrant(models.get(s.model, s.where), s) for s in each.sources]
        base_ref = each.base_model or recipe.base_model
        base = None if base_ref is None else models.get(base_ref, recipe.at("base_model"))
        use = self.method.base_use
        self.based = use == "required" or (use == "optional" and base is not None)
        if use == "required" and base is None:
            raise RecipeError(
                f"{self.method.name} needs a base model",
                where=str(recipe.at("merge_method")),
                hint="add `base_model: PATH`, "
                + (
                    "one of the two: the one that the merge starts from"
                    if self.method.interpolates
                    else "the model that the others were fine-tuned from"
                ),
            )
        if self.based:
            first = next((e for e in entrants if e.model is base), None) or self._unlisted(base, entrants)
            self.entrants = [first, *(e for e in entrants if e is not first)]
            if any(e.model is base for e in self.entrants[1:]):
                raise RecipeError(f"the base {base} is two sources of one slice", where=str(each.where))
        else:
            listed = base is None or any(e.model is base for e in entrants)
            whole = all(e.source is not None and e.source.layer_range is None for e in entrants)
            # mergekit counts an unlisted base as one more model of a method that knows no base.
            appended = not listed and whole and self.method.models[1] is None
            self.entrants = entrants + ([Entrant(base, None)] if appended and base is not None else [])
        self.others = self.entrants[1:] if self.based else self.entrants
        self._check_count()
        if self.based and recipe.compat is None:
            self._check_base()
        shared = scopes(recipe, module, each)
        self._shared: dict[str, Lookup] = {}
        self._each: dict[str, list[Lookup]] = {}
        for name, p in self.method.parameters().items():
            if p.per_model:
                self._each[name] = [
                    Lookup(name, scopes(recipe, module, each, e.source) if e.source else shared, used)
                    for e in self.others
                ]
            else:
                self._shared[name] = Lookup(name, shared, used)
        self._made: dict[tuple[Any, ...], Method] = {}

    def _unlisted(self, base: Model | None, entrants: list[Entrant]) -> Entrant:
        """A base that no source names stands in with the range of blocks that all sources agree on."""
        assert base is not None
        ranges = {e.source.layer_range for e in entrants if e.source}
        if len(ranges) > 1:
            raise RecipeError(
                f"the base {base} is none of this slice's sources, and their layer ranges differ",
                where=str(self.slice.where),
                hint="list the base among the sources with its own layer_range",
            )
        return Entrant(base, None)

    def _check_count(self) -> None:
        low, high = self.method.models
        count = len(self.others)
        if count < low or (high is not None and count > high):
            given = ", ".join(str(e.model) for e in self.others) or "none"
            beside = " beside the base" if self.based else ""
            raise RecipeError(
                f"{self.method.name} takes {self.method.models_text()}; {count} {'is' if count == 1 else 'are'} "
                f"given{beside}: {given}",
                where=str(self.slice.where),
            )

    def _check_base(self) -> None:
        """Refuse the base as an expert, with a weight or under another name: its task vector would be zero, and counted.

        Where the base is an endpoint (SLERP and its like) the other may well be the same model: the result is that model.
        """
        if not self.method.adds_to_base():
            return
        listed = self.entrants[0].source
        if listed is not None and listed.parameters:
            name, setting = next(iter(listed.parameters.items()))
            raise RecipeError(
                f"{name!r} stands beside the base {self.entrants[0].model}, which is no expert here",
                where=str(setting.where),
                hint="leave out the base's parameters, or all of its entry: the others are compared with it",
            )
        base = _place(self.entrants[0].model)
        for entrant in self.others:
            if base is not None and entrant.source is not None and _place(entrant.model) == base:
                raise RecipeError(
                    f"the base {self.entrants[0].model} is one of the experts, as {entrant.model}",
                    where=str(entrant.source.where),
                    hint="leave it out: what the others are compared with is no expert",
                )

    def range(self, entrant: Entrant) -> tuple[int, int] | None:
        """An entrant's range of blocks."""
        if entrant.source is not None:
            return entrant.source.layer_range
        return next((e.source.layer_range for e in self.entrants if e.source), None)

    def make(self, part: Part, inputs: list[Part], t: float) -> Method:
        """The method with its parameters for one tensor.

        Args:
            part: The output's tensor, which shared parameters' filters test.
            inputs: The tensor of each non-base model, which its own parameters' filters test.
            t: The depth in the slice.

        Raises:
            RecipeError: A missing or impossible value, with the line that gives it.
        """
        values: dict[str, Any] = {}
        key: list[Any] = []
        places: dict[str, list[Where]] = {}
        answers: list[Resolved] = []
        for name, lookup in self._shared.items():
            found = lookup.at(part, t)
            if self.schedule is not None and name == "t":
                values[name] = self.schedule(part)
                key.append(values[name])
                continue
            if found is not None:
                values[name] = found.value
                places[name] = [found.where]
                answers.append(found)
                if self.method.parameters()[name].expert and isinstance(found.value, str):
                    values[name] = self._number(found.value, name, found.where)
            key.append(None if found is None else found.value)
        for name, lookups in self._each.items():
            several = [lookup.at(p, t) for lookup, p in zip(lookups, inputs, strict=True)]
            if any(s is not None for s in several):
                values[name] = self._fill(name, several)
                places[name] = [s.where if s is not None else self.slice.where for s in several]
                answers += [s for s in several if s is not None]
            key.append(tuple(None if s is None else s.value for s in several))
        frozen = tuple(key)
        made = self._made.get(frozen)
        if made is None:
            try:
                made = self.method.make(
                    values,
                    count=len(self.others),
                    compat=self.recipe.compat,
                    extrapolate=self.extrapolate,
                )
            except UsageError as error:
                self._check_given(part, values)
                said = {id(answer.where): answer.said_of(part) for answer in answers}
                raise together(
                    [
                        RecipeError(f"{what}{said.get(id(place), '')}", where=str(place), hint=error.hint)
                        for place, what in self._impossible(values, places)
                        or [self._together(values, places, error.what)]
                    ]
                ) from None
            if made.adapters_only:
                self._check_adapters()
            self._made[frozen] = made
        return made

    def _check_given(self, part: Part, values: Mapping[str, Any]) -> None:
        """Refuse a parameter that the recipe gives for some tensors, and not for this one, which needs it."""
        for name, each in self.method.parameters().items():
            lookup = self._shared.get(name) or next(
                (found for found in self._each.get(name, ()) if not found.absent), None
            )
            if each.required and name not in values and lookup is not None and not lookup.absent:
                raise RecipeError(
                    f"{name!r} has no value for {part.name}: no filter lets it in",
                    where=str(lookup.where),
                    hint="add an entry without a filter after the others: `- value: ...`",
                )

    def _check_adapters(self) -> None:
        """Refuse whole checkpoints where the method is made for LoRA adapters."""
        for entrant in self.others:
            files = entrant.model.checkpoint
            if files is None or files.adapter is None:
                raise RecipeError(
                    f"{self.method.name} merges LoRA adapters here, and {entrant.model} is a whole checkpoint",
                    where=str(entrant.source.where if entrant.source else self.slice.where),
                    hint="name it as BASE+ADAPTER (`geomerge adapter extract` makes an adapter of a fine-tuned model); for a "
                    "checkpoint that an adapter was merged into set the parameter `full_weights: true`",
                )

    def _number(self, name: str, parameter: str, where: Where) -> int:
        """Which expert is meant by a name: its reference as the recipe writes it, or the last part of that; from 1."""
        called = [_names(entrant.model) for entrant in self.others]
        found = [k for k, names in enumerate(called, 1) if name in names]
        if len(found) == 1:
            return found[0]
        if found:
            raise RecipeError(
                f"{len(found)} experts are called {name!r}",
                where=str(where),
                hint=f"write `{parameter}: {found[0]}` for the first of them",
            )
        raise RecipeError(
            f"{parameter} names no expert: {name!r}",
            where=str(where),
            hint=did_you_mean(name, [each for names in called for each in names]) or "an expert's number will do, too",
        )

    def _impossible(self, values: Mapping[str, Any], places: Mapping[str, list[Where]]) -> list[tuple[Where, str]]:
        """Where the values stand that are impossible by themselves, and why, first lines first."""
        found: dict[tuple[Where, str], None] = {}
        for name, where in places.items():
            several = values[name] if isinstance(values[name], list) else [values[name]]
            for value, place in zip(several, where, strict=True):
                try:
                    self.method.parameters()[name].check(value, compat=self.recipe.compat, extrapolate=self.extrapolate)
                except ValueError as problem:
                    found[place, f"{self.method.name}: {problem}"] = None
        return sorted(found, key=lambda problem: problem[0].line)

    def _together(self, values: Mapping[str, Any], places: Mapping[str, list[Where]], what: str) -> tuple[Where, str]:
        """Where the last of the values that do not go together stands, and why: of those that the reason names, and of values
        for each model those of the first model for which they do not.
        """
        count = len(self.others)
        several = [name for name in places if isinstance(values[name], list)]

        def fails(i: int) -> bool:
            alone = {**values, **{name: [values[name][i]] * count for name in several}}
            try:
                self.method.make(alone, count=count, compat=self.recipe.compat, extrapolate=self.extrapolate)
            except UsageError:
                return True
            return False

        blamed = [i for i in range(count) if fails(i)] if several else []
        named = [name for name in places if re.search(rf"\b{re.escape(name)}\b", what)] or list(places)
        of = ""
        if 0 < len(blamed) < count:  # what sets it apart
            named = [n for n in named if n in several and len(set(values[n])) > 1] or named
            of = f" (of {self.others[blamed[0]].model})"
        found = [places[name][blamed[0] if blamed and name in several else 0] for name in named]
        return max(found, key=lambda where: where.line, default=self.recipe.at("merge_method")), what + of

    def _fill(self, name: str, several: list[Any]) -> list[Any]:
        """Values of a per-model parameter, where some models leave it to the default."""
        p = self.method.parameters()[name]
        values = []
        for entrant, found in zip(self.others, several, strict=True):
            if found is not None:
                values.append(found.value)
            elif p.required:
                raise RecipeError(
                    f"{self.method.name} needs {name!r} for {entrant.model}",
                    where=str(entrant.source.where if entrant.source else self.slice.where),
                    hint=f"add `parameters: {{{name}: …}}` beside that model, or for all models at the top level",
                )
            else:
                defaults: Mapping[str, Any] = self.method.mergekit if self.recipe.compat == "mergekit" else {}
                values.append(defaults.get(name, p.default))
        return values


def _names(model: Model) -> set[str]:
    """What a recipe may call a model: its whole reference, or the last part of its path or its adapter's."""
    ref = model.ref
    return {str(ref), PurePath(ref.path).name, *((PurePath(ref.lora.path).name,) if ref.lora else ())}


def _place(model: Model) -> tuple[Path, Path | None] | None:
    """Where a model's weights and its adapter lie; `None` in memory or for an earlier stage's."""
    if model.checkpoint is None or model.checkpoint.path is None:
        return None
    adapter = model.checkpoint.adapter
    return model.checkpoint.path.resolve(), adapter.resolve() if adapter else None


def schedule_of(recipe: Recipe, method: type[Method]) -> Schedule | None:
    """The recipe's schedule, or the method's own where the recipe leaves its coefficients open."""
    if recipe.schedule is not None:
        return Schedule(recipe.schedule, recipe.at("schedule"))
    own = method.default_schedule if issubclass(method, Span) else None
    given = any("t" in scope for scope in recipe.scopes())
    return Schedule(own, recipe.where) if own is not None and not given else None
