"""The books of a recipe's parents: which of their tensors are used, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from geomerge.anatomy import Part
from geomerge.anatomy.components import inner_name
from geomerge.engine.components import Components
from geomerge.engine.lineup import Lineup
from geomerge.engine.models import Model
from geomerge.engine.plan import Node
from geomerge.engine.slots import Slots
from geomerge.errors import IncompatibleModels
from geomerge.recipe.values import Recipe

if TYPE_CHECKING:
    from geomerge.engine.planner import Planner


class Accounts:
    """Every tensor of every parent is merged, copied by a stated rule, left out by a stated rule, or refused.

    Args:
        planner: Takes nodes, and the rule of what is left out.
        recipe: The recipe.
        slots: The output's tensors.
        lineups: Who goes into them.
        copy: Makes a node that copies a model's tensor: name, model, stored name, rule.
        components: The recipe's rules for components, if it has any.

    Attributes:
        parts: The output's tensors that have a node.
        missing: What some model should have and has not.
    """

    def __init__(
        self,
        planner: Planner,
        recipe: Recipe,
        slots: Slots,
        lineups: Sequence[Sequence[Lineup]],
        copy: Callable[[str, Model, str, str], Node],
        components: Components | None = None,
    ) -> None:
        self.planner, self.recipe, self.slots, self.lineups = planner, recipe, slots, lineups
        self.members, self.donor, self._copy = slots.members, slots.donor, copy
        self.parts: dict[str, Part] = {}
        self.missing: list[str] = []
        self.components = components
        self._odd: Model | None = None
        self._deeper: Model | None = None
        owners = [] if components is None else [m for m in components.owners.values() if m is not None]
        self._used: dict[int, set[str]] = {id(m): set() for m in (*self.members, *owners)}

    def lack(self, model: Model, what: str) -> None:
        """A parent has too little, or more than the others."""
        self._odd = self._odd or model
        self.missing.append(what)

    def use(self, model: Model, stored: str) -> None:
        """A parent's tensor goes into the output."""
        self._used[id(model)].add(stored)

    def leave(self, model: Model, name: str, why: str) -> None:
        """A parent's tensor does not go into the output."""
        self._used[id(model)].add(name)
        self.planner.left_out[f"{model}: {model.own.get(name, name)}"] = why

    def other_modules(self) -> list[int]:
        """Tensors of modules that the recipe does not list are copied from the donor, so that the output is whole."""
        listed = {self.slots.module_name(m, self.donor) for m in self.recipe.modules}
        made = []
        for part in self.slots.parts(self.donor):
            if part.module in listed or part.name in self.parts:
                continue
            stored = self.donor.find(part.name)
            if stored is None or self.slots.stored_once(part.name) is not None:
                continue
            made.append(len(self.planner.nodes))
            rule = f"copy: module {part.module!r} is not in the recipe, taken from {self.donor}"
            self.planner.nodes.append(self._copy(part.name, self.donor, stored, rule))
            self._used[id(self.donor)].add(stored)
            self.parts[part.name] = part
        for model in self.members:
            used = self._used[id(model)]
            for name, part in model.anatomy.parts.items():
                if part.module not in listed and name not in used:
                    used.add(name)
                    tied = model.anatomy.tied.get(name)
                    why = f"module {part.module!r} is not in the recipe, taken from {self.donor}"
                    self.planner.left_out[f"{model}: {name}"] = (
                        why if tied is None else f"tied to {tied}, which is stored once"
                    )
        return made

    def rest(self) -> list[int]:
        """See to the parents' tensors that the output has not used."""
        made: list[int] = []
        if self.components is not None:
            self._leave_components(self.components)
        for model in self.members:
            if not any(e.model is model for row in self.lineups for lineup in row for e in lineup.entrants):
                continue
            used = self._used[id(model)]
            for name, part in model.anatomy.parts.items():
                if name in used:
                    continue
                key = f"{model}: {model.own.get(name, name)}"
                if name in model.anatomy.tied:
                    self.planner.left_out[key] = f"tied to {model.anatomy.tied[name]}, which is stored once"
                elif name in model.anatomy.buffers:
                    self.planner.left_out[key] = "a buffer that the first model does not have"
                elif self._cut_away(model, part):
                    cut = part.module in self.slots.block_maps or None in self.slots.covered
                    why = "in none of the recipe's slices" if cut else "its module is taken from other models"
                    self.planner.left_out[key] = why
                elif part.module in self.slots.block_maps:
                    # Copying has no place to offer: the slices may take this block to several places.
                    self.lack(model, f"{model} alone has {name} of what a slice merges")
                elif self._beyond(part):
                    self._deeper = model
                    self.lack(model, f"{self.donor} has no {model.own.get(name, name)}, which {model} has")
                elif self.recipe.unmatched == "copy" and name not in self.parts:
                    made.append(len(self.planner.nodes))
                    self.planner.nodes.append(self._copy(name, model, name, f"copy: only in {model}"))
                    self.parts[name] = part
                else:
                    self.lack(model, f"{self.donor} has no {model.own.get(name, name)}, which {model} has")
        return made

    def _beyond(self, part: Part) -> bool:
        """Whether a block comes after the last one that the output's configuration, which is the donor's, knows of."""
        return part.block is not None and 0 < self.donor.anatomy.depth.get(part.module, 0) <= part.block

    def _leave_components(self, components: Components) -> None:
        """The components that are taken from other models; all but its component of a model that only gives one."""
        entered = {id(e.model) for row in self.lineups for lineup in row for e in lineup.entrants}
        owners = {id(m): m for m in components.owners.values() if m is not None}
        for model in ({id(m): m for m in self.members} | owners).values():
            if id(model) not in entered and id(model) not in owners:
                continue
            for name, part in model.anatomy.parts.items():
                if name in self._used[id(model)] or name in model.anatomy.tied:
                    continue
                owner = components.owner(part)
                if owner is not None and owner is not model:
                    self.leave(model, name, f"component {part.component!r} is taken from {owner}")
                elif owner is None and id(model) not in entered:
                    given = [c for c, m in components.owners.items() if m is model]
                    self.leave(model, name, f"only its {' and '.join(given)} is taken")
                elif owner is model and id(model) not in entered:
                    self.lack(model, f"{self.donor} has no {model.own.get(name, name)}, which {model} has")

    def _cut_away(self, model: Model, part: Part) -> bool:
        """Whether the recipe takes nothing from this model at the place where the tensor stands."""
        if part.module in self.slots.block_maps:
            place = part.block if part.block is not None else part.position
            return (id(model), part.module, place) not in self.slots.taken
        lineups = self.slots.covered.get(part.module) or self.slots.covered.get(None)
        # Beside a sliced stack, everything else goes with the first slice.
        return lineups is not None and all(e.model is not model for e in lineups[0].entrants)

    def _other_names(self) -> str | None:
        """A hint for models that differ by the prefixes of their components' names: two versions of transformers, or a language
        model beside a vision-language model."""
        if self.components is not None or self.recipe.modules[0].name is not None or self.slots.block_maps:
            return None
        most = max(self.members, key=lambda m: len(m.anatomy.components()))
        if most.anatomy.components() == ("",):
            return None
        names = {inner_name(name) for name in most.tensors}
        others = [m for m in self.members if m.tensors.keys() != most.tensors.keys()]
        if not others or not all(names & {inner_name(n) for n in m.tensors} for m in others):
            return None
        lacking = [c for c in most.anatomy.components() if any(c not in m.anatomy.components() for m in others)]
        if lacking == list(most.anatomy.components()):  # models of one part: they may be the language model
            lacking = [c for c in lacking if c != "language"]
        copied = [f"{c}: {{copy: {most}}}" for c in lacking]
        merged = "language" if "language" in most.anatomy.components() else most.anatomy.components()[0]
        rules = ", ".join([f"{merged}: merge", *copied])
        return f"the names may differ by prefixes alone, which `components: {{{rules}}}` sees through"

    def _other_architectures(self) -> str | None:
        """A hint for models whose configurations name different types and that have no tensor in common."""
        types = {str(m.config["model_type"]): m for m in self.members if m.config and m.config.get("model_type")}
        if len(types) < 2 or set[str].intersection(*(set(m.tensors) for m in self.members)):
            return None
        named = " and ".join(f"{name} ({model})" for name, model in types.items())
        return f"they are of different architectures, whose weights cannot be merged: {named}"

    def _more_blocks(self) -> str | None:
        """A hint for models of one architecture and different depths."""
        if self._deeper is None:
            return None
        return (
            f"{self._deeper} has more blocks than {self.donor}, whose configuration the output gets: say with `slices:` which "
            "blocks to take, or let the deeper model come first and keep what it alone has by `unmatched: copy`"
        )

    def refuse_missing(self) -> None:
        shown = "; ".join(self.missing[:4])
        more = f"; and {len(self.missing) - 4} more" if len(self.missing) > 4 else ""
        count = "1 tensor is" if len(self.missing) == 1 else f"{len(self.missing)} tensors are"
        raise IncompatibleModels(
            f"{count} not in every model: {shown}{more}",
            where=str(self.recipe.line_of(self._odd.ref if self._odd is not None else None)),
            hint=self._other_names()
            or self._other_architectures()
            or self._more_blocks()
            or "are they of one architecture? `unmatched: copy` takes such tensors from the model that has them",
        )
