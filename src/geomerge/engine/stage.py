"""One recipe of a pipeline, planned: a node for each tensor of its result, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge.anatomy import Part
from geomerge.checkpoint.dtypes import DTYPES, parse_dtype
from geomerge.engine.accounts import Accounts
from geomerge.engine.activations import Activations
from geomerge.engine.alignment import FOLDED, Alignment
from geomerge.engine.chain import Chain
from geomerge.engine.components import Components
from geomerge.engine.encoding import Encoding
from geomerge.engine.lineup import Lineup, schedule_of
from geomerge.engine.matrices import rest, weighs
from geomerge.engine.models import Kind, Model
from geomerge.engine.output import describe_output
from geomerge.engine.plan import BUFFER, Node, Operand
from geomerge.engine.slots import Slots
from geomerge.engine.steps import Steps
from geomerge.engine.vocabularies import Vocabularies
from geomerge.errors import IncompatibleModels, RecipeError
from geomerge.methods import registry
from geomerge.methods.base import Matrix, Method, Span
from geomerge.recipe.resolve import check_filters
from geomerge.recipe.values import ModelRef, Recipe, Where

if TYPE_CHECKING:
    from geomerge.engine.planner import Planner

_WIDER = {frozenset({"BF16", "F16"}): "F32"}


def _named(recipe: Recipe) -> Iterator[tuple[ModelRef, Where]]:
    """The models that a recipe merges, in the order in which its slices ask for them, with their places."""
    for module in recipe.modules:
        for each in module.slices:
            yield from ((source.model, source.where) for source in each.sources)
            base = each.base_model or recipe.base_model
            if base is not None:
                yield base, recipe.at("base_model")


class RecipePlan:
    """One recipe of the pipeline being planned."""

    def __init__(self, planner: Planner, recipe: Recipe, stage: int) -> None:
        self.planner, self.recipe, self.stage = planner, recipe, stage
        self.used: set[int] = set()
        method = registry.get(recipe.method)
        self.schedule = schedule_of(recipe, method)
        if self.schedule is not None and "t" not in method.parameters():
            raise RecipeError(
                f"a schedule sets the interpolation parameter t, which {recipe.method} does not have",
                where=str(recipe.at("schedule")),
            )
        planner.models.open_all(_named(recipe))
        self.components = Components(planner.models, recipe) if recipe.components else None
        models = self.components or planner.models
        if self.components is not None and recipe.align is not None:
            raise RecipeError("`align` and `components` exclude each other", where=str(recipe.at("align")))
        if self.components is not None:
            models.open_all(_named(recipe))  # under the template's names
        self.lineups = [
            [Lineup(recipe, m, s, models, self.used, self.schedule) for s in m.slices] for m in recipe.modules
        ]
        entrants = [e for row in self.lineups for lineup in row for e in lineup.entrants]
        self.members: list[Model] = list({id(e.model): e.model for e in entrants}.values())
        base = None if recipe.base_model is None else models.get(recipe.base_model, recipe.at("base_model"))
        self.donor = base or self.members[0]
        if base is not None and base not in self.members:
            self.members.append(base)
        if self.components is not None:
            self.components.check_members((e.model for e in entrants), recipe)
            self.donor = self.components.template
            planner.notes += self.components.notes
        self.slots = Slots(self.members, self.donor)
        self.accounts = Accounts(planner, recipe, self.slots, self.lineups, self._copy, self.components)
        self.dtype = (
            parse_dtype(recipe.out_dtype or recipe.dtype, recipe.where) if recipe.out_dtype or recipe.dtype else None
        )
        self.statistics = [planner.models.get(ref, recipe.at("statistics")) for ref in recipe.statistics]
        if self.statistics and not _informed(method):
            raise RecipeError(
                f"{recipe.method} takes no statistics",
                where=str(recipe.at("statistics")),
                hint="methods that do: "
                + ", ".join(sorted(n for n, m in registry.all_methods().items() if _informed(m))),
            )
        if recipe.requantize and recipe is not planner.pipeline.output:
            raise RecipeError(
                "`requantize` is for the last recipe of a file: a later one would merge codes",
                where=str(recipe.at("requantize")),
            )
        self.encoding = Encoding(recipe, self.donor)
        for each in {id(m): m for m in (*self.members, self.donor)}.values():
            planner.notes += each.checkpoint.notes if each.checkpoint is not None else ()
        planner.notes += [note for m in self.members if (note := m.codes) is not None]
        self.vocabularies = Vocabularies(recipe, self.members, base, planner.rows, models)
        for model in self.vocabularies.outsiders:
            for name in model.tensors:
                used = name in model.anatomy.vocabulary and recipe.tokenizer and recipe.tokenizer.missing == "omp"
                why = "only shows how tokens are made of others" if used else "it only gives its tokenizer"
                planner.left_out[f"{model}: {name}"] = why
        self.alignment = Alignment(
            recipe,
            self.members,
            self.donor,
            models,
            self.vocabularies,
            planner.transforms,
            planner.rotations,
        )
        self.vocabularies.operand = self.alignment.operand
        self.slots.alignment = self.alignment
        self.slots.untied |= self.alignment.untied
        planner.notes += self.alignment.notes
        planner.alignment += self.alignment.facts
        self.chains = {
            id(lineup): Chain(m, lineup, self.used)
            for m, row in zip(recipe.modules, self.lineups, strict=True)
            for lineup in row
        }
        self.steps = Steps(recipe.steps, self.used)
        self.activations = self._activations(base)
        if self.donor.anatomy.guessed:
            planner.notes.append(
                f"the architecture of {self.donor} is not a known one: blocks and roles were guessed from tensor names"
            )

    # -- the output's tensors ------------------------------------------------------------------------------------------

    def nodes(self) -> list[int]:
        """Plan every tensor; returns their indices among the planner's nodes."""
        made: list[int] = []
        for module, lineups in zip(self.recipe.modules, self.lineups, strict=True):
            for part, lineup, entered, t in self.slots.tensors(module, lineups):
                node = self._node(part, lineup, entered, t)
                for each in () if node is None else self.encoding.nodes(node, part):
                    self.accounts.parts[part.name] = part
                    made.append(len(self.planner.nodes))
                    self.planner.nodes.append(each)
        if self.recipe.modules[0].name is not None:
            made += self.accounts.other_modules()
        made += self.accounts.rest()
        if self.accounts.missing:
            self.accounts.refuse_missing()
        if self.schedule is not None:
            self.schedule.check_used()
        self.planner.notes += [each.note for each in self.activations]
        everything = [*self.accounts.parts.values(), *(p for m in self.members for p in m.anatomy.parts.values())]
        tied = {alias: stored for m in self.members for alias, stored in m.anatomy.tied.items()}
        self.planner.notes += check_filters(self.recipe, self.used, everything, tied)
        return made

    # -- one tensor ----------------------------------------------------------------------------------------------------

    def _node(self, part: Part, lineup: Lineup, names: list[str], t: float) -> Node | None:
        alias_of = self.slots.stored_once(part.name)
        if alias_of is not None:
            for model in self.members:
                if part.name in model.tensors:
                    self.accounts.leave(model, part.name, f"tied to {alias_of}, which is stored once")
            return None
        owner = None if self.components is None else self.components.owner(part)
        if owner is not None:
            return self._taken(part, owner)
        found: list[tuple[Model, str]] = []
        for entrant, name in zip(lineup.entrants, names, strict=True):
            stored = entrant.model.find(name)
            if stored is None:
                if self.recipe.unmatched == "copy" and any(
                    e.model.find(n) for e, n in zip(lineup.entrants, names, strict=True)
                ):
                    return self._copy_from_owner(part, lineup, names)
                self.accounts.lack(entrant.model, f"{entrant.model} has no {name}")
                return None
            self.accounts.use(entrant.model, stored)
            found.append((entrant.model, stored))
        kinds = [model.tensors[name] for model, name in found]
        operands = [self.alignment.operand(m, s, n) for (m, s), n in zip(found, names, strict=True)]
        dtype = self._dtype(part.name, kinds)
        reason = self._copied(part, kinds, found)
        if reason is not None:
            method = _passthrough() if self._computed(operands[0]) else None
            kind, rule = kinds[0], f"copy: {reason}"
            return Node(part.name, kind.shape, kind.dtype, (operands[0],), method, rule=rule, stage=self.stage)
        shape = kinds[0].shape
        if self.vocabularies.reorders(found[0][0], found[0][1]):
            operands = [self.vocabularies.reordered(model, part.name) for model, _ in found]
            shape = (self.vocabularies.size, *shape[1:])
        elif any(k.shape != shape for k in kinds):
            raise self._shapes_differ(part, found, kinds)
        elif part.name in self.donor.anatomy.vocabulary:
            self.vocabularies.check(list(dict.fromkeys(m for m, _ in found)))
        inputs = [e.model.anatomy.parts[n] for e, (_, n) in zip(lineup.entrants, found, strict=True)]
        method = lineup.make(part, inputs[1:] if lineup.based else inputs, t)
        if self.alignment.folds(operands[0]):
            return Node(part.name, shape, dtype, tuple(operands[:1]), _passthrough(), rule=FOLDED, stage=self.stage)
        rule = "merge"
        if isinstance(method, Matrix) and not weighs(method, part, shape):
            rule, method, operands = rest(method, operands)
        scale, lift = self.steps.at(part, t, self.slots.blocks(part.module))
        columns = [c for a in self.activations if (c := a.at(part, names[0], shape, t)) is not None]
        return Node(
            part.name,
            shape,
            dtype,
            tuple(operands),
            method,
            scale,
            rule=rule,
            stage=self.stage,
            group=_group(part, method.grouped) if isinstance(method, Span) else "",
            statistics=self._statistics(names[0], shape),
            lift=lift,
            chain=self.chains[id(lineup)].at(part, inputs[1:], shape, t) if len(operands) > 1 else (),
            columns=tuple(columns),
        )

    def _taken(self, part: Part, owner: Model) -> Node | None:
        """A tensor of a component that is taken whole from one model."""
        stored = owner.find(part.name)
        if stored is None:
            self.accounts.lack(owner, f"{owner}, whose {part.component} is to be copied, has no {part.name}")
            return None
        own = self.donor.find(part.name)
        assert own is not None
        kinds = [self.donor.tensors[own], owner.tensors[stored]]
        if kinds[0].shape != kinds[1].shape:
            # The config of the output is the donor's: another tower would not fit it.
            raise self._shapes_differ(part, [(self.donor, own), (owner, stored)], kinds)
        self.accounts.use(owner, stored)
        return self._copy(part.name, owner, stored, f"copy: component {part.component!r} is taken from {owner}")

    def _activations(self, base: Model | None) -> list[Activations]:
        """The activations of the recipe's AIM steps."""
        found = []
        for step in (s for s in self.recipe.steps if s.name == "aim"):
            if base is None or not all(lineup.based for row in self.lineups for lineup in row):
                raise RecipeError(
                    f"the step 'aim' weighs the change of a base model's columns, and {self.recipe.method} has none",
                    where=str(step.where),
                    hint="take a method that works from a base model, and name that with `base_model`",
                )
            found.append(Activations(step, self.planner.models, base, self.used))
        return found

    def _statistics(self, name: str, shape: tuple[int, ...]) -> tuple[Operand, ...]:
        """The tensor's statistics in every file of them."""
        found = []
        for model in self.statistics:
            stored = model.find(name)
            if stored is None or model.tensors[stored].shape != shape:
                has = "no" if stored is None else f"{list(model.tensors[stored].shape)} values for"
                raise IncompatibleModels(
                    f"the statistics {model} have {has} {name}, which has the shape {list(shape)}",
                    where=str(self.recipe.at("statistics")),
                    hint="statistics hold one number for each weight of every tensor that is merged",
                )
            found.append(model.operand(stored))
        return tuple(found)

    def _copied(self, part: Part, kinds: list[Kind], found: list[tuple[Model, str]]) -> str | None:
        """Why a tensor is copied instead of merged, or `None`."""
        for kind, (model, _) in zip(kinds, found, strict=True):
            if DTYPES[kind.dtype].kind == "float8":
                raise IncompatibleModels(
                    f"{part.name} holds 8-bit codes without a known scale",
                    where=str(model),
                    hint="name the original 16-bit model, or dequantise it first",
                )
        if DTYPES[kinds[0].dtype].kind != "float":
            return f"{DTYPES[kinds[0].dtype].recipe} tensor of the first model"
        if part.name in self.donor.anatomy.buffers:
            return BUFFER.removeprefix("copy: ")
        for kind, (model, _) in zip(kinds, found, strict=True):
            if DTYPES[kind.dtype].kind != "float":
                first = f"{DTYPES[kinds[0].dtype].recipe} in {found[0][0]}"
                raise IncompatibleModels(
                    f"{part.name} is {DTYPES[kind.dtype].recipe} in {model}, but {first}",
                    where=str(self.recipe.line_of(model.ref)),
                    hint="weights are floating-point numbers: has something else been stored under their name?",
                )
        return None

    def _dtype(self, name: str, kinds: list[Kind]) -> str:
        if self.dtype is not None:
            return self.dtype
        widest = kinds[0].dtype
        for kind in kinds[1:]:
            if kind.dtype != widest:
                both = frozenset({widest, kind.dtype})
                widest = _WIDER.get(both) or max(both, key=lambda d: (DTYPES[d].itemsize, DTYPES[d].kind == "float", d))
        return widest

    def _copy_from_owner(self, part: Part, lineup: Lineup, names: list[str]) -> Node:
        owner, stored = next(
            (e.model, s) for e, n in zip(lineup.entrants, names, strict=True) if (s := e.model.find(n)) is not None
        )
        for e, n in zip(lineup.entrants, names, strict=True):
            found = e.model.find(n)
            if found is not None:
                self.accounts.use(e.model, found)
        return self._copy(part.name, owner, stored, f"copy: not in every model, taken from {owner}")

    def _copy(self, name: str, model: Model, stored: str, rule: str) -> Node:
        kind = model.tensors[stored]
        converts = DTYPES[kind.dtype].kind == "float" and self.dtype not in (None, kind.dtype)
        dtype = self.dtype if converts and self.dtype else kind.dtype
        operand = self.alignment.operand(model, stored, name)
        method = _passthrough() if converts or self._computed(operand) else None
        return Node(name, kind.shape, dtype, (operand,), method, rule=rule, stage=self.stage)

    def _computed(self, operand: Operand) -> bool:
        """Whether a tensor is computed (by an earlier stage, from codes, with an adapter): it has no bytes to copy."""
        if operand.transform >= 0:
            return True
        if operand.input >= 0:
            return self.planner.models.inputs[operand.input].computed(operand.tensor)
        return operand.node >= 0 and self.planner.nodes[operand.node].method is not None

    def _shapes_differ(self, part: Part, found: list[tuple[Model, str]], kinds: list[Kind]) -> IncompatibleModels:
        if part.name in self.donor.anatomy.vocabulary or any(n in m.anatomy.vocabulary for m, n in found):
            refusal = self.vocabularies.refusal([m for m, _ in found])
            if refusal is not None:
                return refusal
        shapes = ", ".join(f"{m}: {list(k.shape)}" for (m, _), k in zip(found, kinds, strict=True))
        odd = next((m for (m, _), k in zip(found, kinds, strict=True) if k.shape != kinds[0].shape), None)
        return IncompatibleModels(
            f"the shapes of {part.name} differ: {shapes}",
            where=str(self.recipe.line_of(odd.ref if odd is not None else None)),
            hint="only models of one architecture and size can be merged",
        )

    # -- the whole -----------------------------------------------------------------------------------------------------

    def as_model(self, made: list[int]) -> Model:
        """The result as a parent of later stages."""
        nodes = {self.planner.nodes[i].name: i for i in made}
        tensors = {name: Kind(self.planner.nodes[i].dtype, self.planner.nodes[i].shape) for name, i in nodes.items()}
        config, copies, texts, _ = self.describe(made)
        assert self.recipe.name is not None
        folder = self.donor.folder.absolute() if self.donor.folder is not None else None
        if texts or folder is None or any(not path.is_relative_to(folder) for path in copies.values()):
            folder = self.planner.lay_out(copies, texts) if texts or copies else None
        return Model(
            ref=ModelRef(self.recipe.name),
            tensors=tensors,
            anatomy=self.planner.models.anatomy(tensors, config),
            config=config,
            operand=lambda name: Operand(-1, name, nodes[name]),
            checkpoint=None,
            folder=folder,
        )

    def describe(self, made: list[int]) -> tuple[dict[str, Any] | None, dict[str, Path], dict[str, str], list[str]]:
        """The output's config and side files: see `geomerge.engine.output`."""
        dtypes = {self.planner.nodes[i].dtype for i in made}
        floats = [d for d in dtypes if DTYPES[d].kind == "float"]
        config, copies, texts, notes = describe_output(
            self.recipe,
            self.donor,
            self.members,
            self.vocabularies,
            dtype=self.dtype or (floats[0] if len(floats) == 1 else None),
            block_maps=self.slots.block_maps,
            untied=bool(self.slots.untied),
            aligned=bool(self.alignment.untied),
        )
        if config is not None and any(self.planner.nodes[i].scales for i in made):
            config["quantization_config"] = self.encoding.statement([self.planner.nodes[i] for i in made])
        # What an earlier stage laid out is gone when the plan is carried out: name its originals.
        real = {name: self.planner.laid_out.get(path, path) for name, path in copies.items()}
        texts |= {name: content for name, content in real.items() if isinstance(content, str)}
        # Absolute: a saved plan may be carried out from another directory.
        return config, {n: c.absolute() for n, c in real.items() if isinstance(c, Path)}, texts, notes


def _informed(method: type[Method]) -> bool:
    return issubclass(method, Span) and method.takes_statistics


def _group(part: Part, over: str) -> str:
    """What shares an angle: a block's tensors of one role, or outside the blocks the tensors of one role and place; or all."""
    if over != "group":
        return over
    return f"{part.module}/{part.position if part.block is None else part.block}/{part.role}"


def _passthrough() -> Method:
    return registry.get("passthrough").make({}, count=1)
