"""The recipe's ``components``: what becomes of each component of a composite model, and models whose names differ by prefixes.

The output follows one of the models, the template: the base where it has all components, else the first that has most. Every
other model is looked at under the template's names: tensors are the same when they are in the same component and their names
are the same without the prefixes of `geomerge.anatomy.components`. A model of one part alone (a language model, a tower) is
taken for the component that it shares most names with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from geomerge.anatomy import Part
from geomerge.anatomy.components import inner_name
from geomerge.engine.models import Model, Models
from geomerge.errors import IncompatibleModels, RecipeError, did_you_mean
from geomerge.recipe.values import Component, ModelRef, Recipe

Key = tuple[str, str]
"""A component, and a tensor's name without prefixes."""


class Components(Models):
    """The models of a recipe with ``components``, under the template's names.

    Args:
        models: The models as they are.
        recipe: The recipe.

    Attributes:
        template: The model whose names, config and files the output has.
        owners: Component → the model that it is copied from; `None` where it is merged.

    Raises:
        RecipeError: A rule for a component that the template does not have.
        IncompatibleModels: A model that shares no tensor with any component.
    """

    def __init__(self, models: Models, recipe: Recipe) -> None:
        self._under = models
        self._seen: dict[int, Model] = {}
        self.inputs = models.inputs
        self.template = _template(models, recipe)
        self._names = {_key(part): name for name, part in self.template.anatomy.parts.items()}
        for alias, stored in self.template.anatomy.tied.items():
            part = self.template.anatomy.parts.get(stored)
            if part is not None:
                self._names.setdefault((part.component, inner_name(alias)), alias)
        known = self.template.anatomy.components()
        self.owners: dict[str, Model | None] = {}
        for name, rule in recipe.components.items():
            self._check(name, known, rule)
            self.owners[name] = None if rule.copy is None else self.get(rule.copy, rule.where)
            self._check_owner(name, rule)
        self.notes: list[str] = []
        if self.template.anatomy.guessed:
            self.notes.append(
                f"the components of {self.template} were guessed from the first words of its tensors' names: "
                f"{', '.join(c or '(one)' for c in known)}"
            )

    def get(self, ref: ModelRef, where: object = None) -> Model:
        """The model that a recipe names, under the template's names."""
        model = self._under.get(ref, where)
        if model is self.template:
            return model
        if id(model) not in self._seen:
            self._seen[id(model)] = self._under_the_template_s_names(model)
        return self._seen[id(model)]

    def owner(self, part: Part) -> Model | None:
        """The model that the tensor's component is copied from."""
        return self.owners.get(part.component)

    def check_members(self, entrants: Iterable[Model], recipe: Recipe) -> None:
        """Refuse to merge a component that one of the models lacks as a whole.

        Raises:
            RecipeError: Naming model, component, and what to write.
        """
        for model in entrants:
            has = model.anatomy.components()
            lacks = [c for c in self.template.anatomy.components() if c not in has and self.owners.get(c) is None]
            if lacks:
                rule = recipe.components.get(lacks[0])
                whole = ", ".join(f"{name}: {{copy: {self.template}}}" for name in lacks)
                raise RecipeError(
                    f"{model} has no component {lacks[0]!r}, which is to be merged",
                    where=str(recipe.at("components") if rule is None else rule.where),
                    hint=f"take what it lacks whole from one model: `components: {{{whole}}}`",
                )

    def _check(self, name: str, known: tuple[str, ...], rule: Component) -> None:
        if name in known:
            return
        if known == ("",):
            raise RecipeError(
                f"{self.template} is not made of several components", where=str(rule.where), hint="remove `components`"
            )
        close = did_you_mean(name, known)
        raise RecipeError(
            f"{self.template} has no component {name!r}",
            where=str(rule.where),
            hint=f"{close + ' ' if close else ''}its components are {', '.join(known)}",
        )

    def _check_owner(self, name: str, rule: Component) -> None:
        owner = self.owners[name]
        if owner is None or name in owner.anatomy.components():
            return
        found = [m for m in self._seen.values() if name in m.anatomy.components()]
        raise RecipeError(
            f"{owner} has no component {name!r} that could be copied from it",
            where=str(rule.where),
            hint=f"name a model that has it, such as {next(iter(found), self.template)}",
        )

    def _under_the_template_s_names(self, model: Model) -> Model:
        anatomy, template = model.anatomy, self.template.anatomy
        only = anatomy.components() == ("",) and template.components() != ("",)
        single = self._component_of(model) if only else None

        def renamed(name: str, component: str) -> str:
            return self._names.get((component, inner_name(name)), name)

        names: dict[str, str] = {}
        parts: dict[str, Part] = {}
        modules = {p.component: p.module for p in template.parts.values() if p.block is not None}
        for name, part in anatomy.parts.items():
            component = part.component if single is None else single
            new = renamed(name, component)
            if new in parts:
                raise IncompatibleModels(
                    f"{name} and {names[new]} would both be {new} of {self.template}",
                    where=str(model),
                    hint="save both models with one version of their library",
                )
            module = part.module if single is None else modules.get(single, part.module)
            parts[new] = template.parts.get(new) or replace(part, name=new, component=component, module=module)
            names[new] = name
        new_names = {old: new for new, old in names.items()}
        for alias, stored in anatomy.tied.items():
            twin = anatomy.parts.get(stored) or anatomy.parts.get(alias)
            component = single or ("" if twin is None else twin.component)
            for name in (alias, stored):
                new_names.setdefault(name, renamed(name, component))
        return replace(
            model,
            tensors={new: model.tensors[old] for new, old in names.items()},
            anatomy=replace(
                anatomy,
                parts=parts,
                depth=template.depth,
                tied={new_names[a]: new_names[s] for a, s in anatomy.tied.items()},
                vocabulary={new_names[n]: axis for n, axis in anatomy.vocabulary.items() if n in new_names},
                layer_keys=template.layer_keys,
                buffers=frozenset(new_names[n] for n in anatomy.buffers),
            ),
            operand=lambda name: model.operand(names[name]),
            own=names,
            _vocabulary=model._vocabulary,
        )

    def _component_of(self, model: Model) -> str:
        """Which of the template's components a model of one part is."""
        inner = {inner_name(name) for name in model.tensors}
        shared: dict[str, int] = {}
        for component, name in self._names:
            shared[component] = shared.get(component, 0) + (name in inner)
        best = max(shared, key=lambda component: shared[component])
        if not shared[best]:
            raise IncompatibleModels(
                f"it shares no tensor's name with any component of {self.template}, such as {next(iter(model.tensors))}",
                where=str(model),
                hint="only models of one architecture can be merged",
            )
        return best


def _key(part: Part) -> Key:
    return part.component, inner_name(part.name)


def _template(models: Models, recipe: Recipe) -> Model:
    """The base where it has as many components as any model, else the first that has most."""
    found = [models.get(ref, recipe.where) for ref in recipe.models()]
    if recipe.base_model is not None:
        found.insert(0, models.get(recipe.base_model, recipe.at("base_model")))
    return max(found, key=lambda model: len(model.anatomy.components()))  # of equals the first
