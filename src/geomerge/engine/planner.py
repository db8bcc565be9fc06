"""From a recipe to a plan: which tensors there will be, and what each is made from.

Everything that can be wrong with a recipe and its models is found here, before a byte is written: missing tensors, shapes
that differ, vocabularies that do not fit, parameters that are out of range, filters that match nothing. Every tensor of
every parent is accounted for: it is merged, copied by a stated rule, left out by a stated rule, or the plan is refused.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from geomerge import anatomy
from geomerge.anatomy import Part
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.collector import collector_paused
from geomerge.checkpoint.dtypes import DTYPES, parse_dtype
from geomerge.engine.activations import Activations
from geomerge.engine.alignment import FOLDED, Alignment
from geomerge.engine.chain import Chain
from geomerge.engine.encoding import Encoding
from geomerge.engine.lineup import Entrant, Lineup
from geomerge.engine.matrices import rest, weighs
from geomerge.engine.models import Kind, Model, Models
from geomerge.engine.output import describe_output, licence_of
from geomerge.engine.plan import BUFFER, InputModel, Node, Operand, Plan, Rotation, Rows, Stage, Transform
from geomerge.engine.schedule import Schedule
from geomerge.engine.steps import Steps
from geomerge.engine.vocabularies import Vocabularies
from geomerge.errors import IncompatibleModels, RecipeError
from geomerge.methods import registry
from geomerge.methods.base import Matrix, Method, Span
from geomerge.recipe.resolve import check_filters, layer_t
from geomerge.recipe.values import ModelRef, Module, Pipeline, Recipe

_WIDER = {frozenset({"BF16", "F16"}): "F32"}


@collector_paused()
def make_plan(
    pipeline: Pipeline, *, models: Mapping[str, Checkpoint] | None = None, allow_pickle: bool = False
) -> tuple[Plan, list[Checkpoint]]:
    """Resolve a recipe against its models.

    Args:
        pipeline: What `geomerge.recipe.load` gives.
        models: Models in memory by the name that the recipe uses.
        allow_pickle: Read pickled weights (weights only).

    Returns:
        The plan, and the opened inputs in its order (the caller closes them).

    Raises:
        RecipeError: The recipe asks for what cannot be done; the line is named.
        ModelError: A model cannot be used, or the models do not fit.
    """
    opened = Models(models, allow_pickle=allow_pickle)
    try:
        with contextlib.ExitStack() as scratch:
            return _Planner(pipeline, opened, scratch).plan(), opened.inputs
    except BaseException:
        for checkpoint in opened.inputs:
            checkpoint.close()
        raise


class _Planner:
    def __init__(self, pipeline: Pipeline, models: Models, scratch: contextlib.ExitStack) -> None:
        self.pipeline, self.models, self._scratch = pipeline, models, scratch
        self.nodes: list[Node] = []
        self.rows: list[Rows] = []
        self.transforms: list[Transform] = []
        self.rotations: list[Rotation] = []
        self.alignment: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = list(pipeline.notes)
        self.laid_out: dict[Path, Path | str] = {}

    def plan(self) -> Plan:
        stages = []
        for index, recipe in enumerate(self.pipeline.recipes):
            stage = _Recipe(self, recipe, index)
            made = stage.nodes()
            stages.append(
                Stage(recipe.name, registry.get(recipe.method).name, recipe.seed, recipe.rounding, recipe.compat)
            )
            if recipe is not self.pipeline.output:
                assert recipe.name is not None
                self.models.add_stage(recipe.name, stage.as_model(made))
        config, copies, texts, notes = stage.describe(made)
        self.notes += notes
        return Plan(
            inputs=tuple(input_model(c) for c in self.models.inputs),
            stages=tuple(stages),
            nodes=tuple(self.nodes),
            outputs=tuple(made),
            left_out=self.left_out,
            rows=tuple(self.rows),
            config=config,
            copies={name: str(path) for name, path in copies.items()},
            texts=texts,
            recipe=self.pipeline.output.text,
            notes=self._portable_notes(),
            transforms=tuple(self.transforms),
            rotations=tuple(self.rotations),
            alignment=tuple(self.alignment),
        )

    def _portable_notes(self) -> tuple[str, ...]:
        """The notes, each once, with the recipe's name in place of its path: they go into the output and the hash."""
        path = self.pipeline.output.where.file
        return tuple(dict.fromkeys(note.replace(f"{path}:", f"{Path(path).name}:") for note in self.notes))

    def lay_out(self, copies: Mapping[str, Path], texts: Mapping[str, str]) -> Path:
        """Put a stage's tokenizer and other side files into a directory that lives as long as the planning: later stages
        read them as they read a model's. `laid_out` says what each file really is."""
        folder = Path(self._scratch.enter_context(tempfile.TemporaryDirectory(prefix="geomerge-"))).resolve()
        files: dict[str, Path | str] = {**copies, **texts}
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content.read_bytes())
            self.laid_out[path] = content
        return folder


class _Recipe:
    """One recipe of the pipeline being planned."""

    def __init__(self, planner: _Planner, recipe: Recipe, stage: int) -> None:
        self.planner, self.recipe, self.stage = planner, recipe, stage
        self.used: set[int] = set()
        self.parts: dict[str, Part] = {}
        method = registry.get(recipe.method)
        self.schedule = _schedule(recipe, method)
        if self.schedule is not None and "t" not in method.parameters():
            raise RecipeError(
                f"a schedule sets the interpolation parameter t, which {recipe.method} does not have",
                where=str(recipe.at("schedule")),
            )
        self.lineups = [
            [Lineup(recipe, m, s, planner.models, self.used, self.schedule) for s in m.slices] for m in recipe.modules
        ]
        entrants = [e for row in self.lineups for lineup in row for e in lineup.entrants]
        self.members: list[Model] = list({id(e.model): e.model for e in entrants}.values())
        base = None if recipe.base_model is None else planner.models.get(recipe.base_model, recipe.at("base_model"))
        self.donor = base or self.members[0]
        if base is not None and base not in self.members:
            self.members.append(base)
        self.accounted: dict[int, set[str]] = {id(m): set() for m in self.members}
        self.missing: list[str] = []
        self.dtype = (
            parse_dtype(recipe.out_dtype or recipe.dtype, recipe.where) if recipe.out_dtype or recipe.dtype else None
        )
        self.untied = self._untied()
        self.statistics = [planner.models.get(ref, recipe.at("statistics")) for ref in recipe.statistics]
        if self.statistics and not (issubclass(method, Span) and method.takes_statistics):
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
        self.vocabularies = Vocabularies(recipe, self.members, base, planner.rows, planner.models)
        for model in self.vocabularies.outsiders:
            for name in model.tensors:
                used = name in model.anatomy.vocabulary and recipe.tokenizer and recipe.tokenizer.missing == "omp"
                why = "only shows how tokens are made of others" if used else "it only gives its tokenizer"
                planner.left_out[f"{model}: {name}"] = why
        self.alignment = Alignment(
            recipe,
            self.members,
            self.donor,
            planner.models,
            self.vocabularies,
            planner.transforms,
            planner.rotations,
        )
        self.vocabularies.operand = self.alignment.operand
        self.untied |= self.alignment.untied
        planner.notes += self.alignment.notes
        planner.alignment += self.alignment.facts
        self.chains = {
            id(lineup): Chain(m, lineup, self.used)
            for m, row in zip(recipe.modules, self.lineups, strict=True)
            for lineup in row
        }
        self.steps = Steps(recipe.steps, self.used)
        self.activations = self._activations(base)
        self.block_maps: dict[str, list[int]] = {}
        self.taken: set[tuple[int, str, int | str]] = set()
        self.covered: dict[str | None, list[Lineup]] = {}
        if self.donor.anatomy.guessed:
            planner.notes.append(
                f"the architecture of {self.donor} is not a known one: blocks and roles were guessed from tensor names"
            )

    # -- the output's tensors ------------------------------------------------------------------------------------------

    def nodes(self) -> list[int]:
        """Plan every tensor; returns their indices among the planner's nodes."""
        made: list[int] = []
        for module, lineups in zip(self.recipe.modules, self.lineups, strict=True):
            for part, lineup, entered, t in self._tensors(module, lineups):
                node = self._node(part, lineup, entered, t)
                for each in () if node is None else self.encoding.nodes(node, part):
                    self.parts[part.name] = part
                    made.append(len(self.planner.nodes))
                    self.planner.nodes.append(each)
        if self.recipe.modules[0].name is not None:
            made += self._other_modules()
        made += self._account()
        if self.missing:
            self._refuse_missing()
        if self.schedule is not None:
            self.schedule.check_used()
        self.planner.notes += [each.note for each in self.activations]
        everything = [*self.parts.values(), *(p for m in self.members for p in m.anatomy.parts.values())]
        self.planner.notes += check_filters(self.recipe, self.used, everything)
        return made

    def _tensors(self, module: Module, lineups: list[Lineup]) -> Iterator[tuple[Part, Lineup, list[str], float]]:
        """Output part, who makes it, its name in each entrant, its depth in its slice."""
        first = lineups[0]
        template = self._template(first)
        name = self._module_name(module, template)
        self.covered[name] = lineups
        parts = [p for p in self._parts(template) if name in (None, p.module)]
        if all(first.range(e) is None for e in first.entrants) and len(lineups) == 1:
            for p in parts:
                t = layer_t(p.block, template.anatomy.depth[p.module]) if p.block is not None else 0.0
                yield p, first, [p.name] * len(first.entrants), t
            return
        stacks = [m for m, depth in template.anatomy.depth.items() if depth and (name is None or m == name)]
        if len(stacks) != 1:
            raise RecipeError(
                f"slices at the top level need a model with one stack of blocks; {template} has {len(stacks)}: "
                f"{', '.join(stacks) or 'none'}",
                where=str(module.where),
                hint="put them under `modules:`, each under the name of its stack",
            )
        yield from self._sliced(stacks[0], parts, lineups)

    def _sliced(
        self, stack: str, parts: list[Part], lineups: list[Lineup]
    ) -> Iterator[tuple[Part, Lineup, list[str], float]]:
        last = lineups[-1]
        post = self._parts(self._template(last))
        self.taken |= {(id(e.model), stack, "pre") for e in lineups[0].entrants}
        self.taken |= {(id(e.model), stack, "post") for e in last.entrants}
        for p in parts:
            if p.position == "pre" or p.module != stack:
                yield p, lineups[0], [p.name] * len(lineups[0].entrants), 0.0
        blocks: list[int] = []
        total = sum(self._length(lineup, stack) for lineup in lineups)
        for lineup in lineups:
            template = self._template(lineup)
            by_block: dict[int, list[Part]] = {}
            for p in self._parts(template):
                if p.module == stack and p.block is not None:
                    by_block.setdefault(p.block, []).append(p)
            starts = [self._range(lineup, e, stack)[0] for e in lineup.entrants]
            first = starts[lineup.entrants.index(self._leader(lineup))]
            length = self._length(lineup, stack)
            for e, start in zip(lineup.entrants, starts, strict=True):
                self.taken |= {(id(e.model), stack, start + i) for i in range(length)}
            for i in range(length):
                out = len(blocks)
                blocks.append(first + i)
                depth = out / (total - 1) if total > 1 else 0.0
                for p in by_block.get(first + i, []):
                    if p.slot is None:
                        raise RecipeError(
                            f"the blocks of {template} are not numbered in its tensors' names ({p.name}): "
                            "they cannot be cut into slices",
                            where=str(lineup.slice.where),
                        )
                    names = [anatomy.rename(p.name, start + i, p) for start in starts]
                    made = replace(p, name=anatomy.rename(p.name, out, p), block=out, depth=depth)
                    yield made, lineup, names, layer_t(i, length)
        self.block_maps[stack] = blocks
        surplus = len(blocks) - self._template(last).anatomy.depth[stack]
        for p in post:
            if p.position == "post" and p.module == stack:
                # Layers for multi-token prediction are numbered on after the last block.
                made = p if p.slot is None else replace(p, name=anatomy.rename(p.name, _number(p) + surplus, p))
                yield made, last, [p.name] * len(last.entrants), 0.0

    def _leader(self, lineup: Lineup) -> Entrant:
        """The entrant whose tensor names a slice follows: the first that the recipe lists."""
        return next(e for e in lineup.entrants if e.source is lineup.slice.sources[0])

    def _template(self, lineup: Lineup) -> Model:
        """The model whose names and order the output follows: the donor where it takes part."""
        return self.donor if any(e.model is self.donor for e in lineup.entrants) else self._leader(lineup).model

    def _parts(self, template: Model) -> list[Part]:
        """A model's tensors, with the tied names that the output must store because not all models tie them."""
        parts = list(template.anatomy.parts.values())
        for alias in self.untied:
            if alias not in template.tensors:
                owner = next((m for m in self.members if alias in m.tensors), None)
                if owner is not None:
                    parts.append(owner.anatomy.parts[alias])
                elif alias in self.alignment.untied:
                    parts.append(self.alignment.head(alias))
        return parts

    def _module_name(self, module: Module, template: Model) -> str | None:
        if module.name is None:
            return None
        known = template.anatomy.depth
        # mergekit calls the only stack of a model "default".
        said = "" if module.name == "default" and "" in known else module.name
        close = [m for m in known if said in (m, m.removesuffix("_model"), m.split(".")[-1])]
        if not close:
            raise RecipeError(
                f"{template} has no module {module.name!r}",
                where=str(module.where),
                hint=f"its modules: {', '.join(m or '(one, without a name)' for m in known)}",
            )
        return close[0]

    def _range(self, lineup: Lineup, entrant: Entrant, stack: str) -> tuple[int, int]:
        said = lineup.range(entrant)
        depth = entrant.model.anatomy.depth.get(stack, 0)
        first, stop = said or (0, depth)
        if not 0 <= first <= stop <= depth:
            raise RecipeError(
                f"layer_range [{first}, {stop}) does not lie in {entrant.model}, which has {depth} blocks",
                where=str(entrant.source.where if entrant.source else lineup.slice.where),
                hint="ranges are half open and start at 0",
            )
        return first, stop

    def _length(self, lineup: Lineup, stack: str) -> int:
        lengths = {stop - first for first, stop in (self._range(lineup, e, stack) for e in lineup.entrants)}
        if len(lengths) != 1:
            raise RecipeError(
                f"the sources of a slice must have equally many blocks, not {sorted(lengths)}",
                where=str(lineup.slice.where),
            )
        return lengths.pop()

    # -- one tensor ----------------------------------------------------------------------------------------------------

    def _node(self, part: Part, lineup: Lineup, names: list[str], t: float) -> Node | None:
        alias_of = self._stored_once(part.name)
        if alias_of is not None:
            for model in self.members:
                if part.name in model.tensors:
                    self.accounted[id(model)].add(part.name)
                    self.planner.left_out[f"{model}: {part.name}"] = f"tied to {alias_of}, which is stored once"
            return None
        found: list[tuple[Model, str]] = []
        for entrant, name in zip(lineup.entrants, names, strict=True):
            stored = entrant.model.find(name)
            if stored is None:
                if self.recipe.unmatched == "copy" and self._copyable(part, lineup, names):
                    return self._copy_from_owner(part, lineup, names)
                self.missing.append(f"{entrant.model} has no {name}")
                return None
            self.accounted[id(entrant.model)].add(stored)
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
        scale, lift = self.steps.at(part, t)
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
            group=_group(part) if isinstance(method, Span) and method.grouped else "",
            statistics=self._statistics(names[0], shape),
            lift=lift,
            chain=self.chains[id(lineup)].at(part, inputs[1:], shape, t) if len(operands) > 1 else (),
            columns=tuple(columns),
        )

    def _activations(self, base: Model | None) -> list[Activations]:
        """The activations of the recipe's AIM steps."""
        found = []
        for step in (s for s in self.recipe.steps if s.name == "aim"):
            if base is None or not all(lineup.based for row in self.lineups for lineup in row):
                raise RecipeError(
                    f"the step 'aim' weighs the change of a base model's columns, and {self.recipe.method} has none",
                    where=str(step.where),
                    hint="add `base_model: PATH`, and take a method that works from it",
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

    # -- accounting ----------------------------------------------------------------------------------------------------

    def _untied(self) -> dict[str, str]:
        """Tied pairs that the output must store apart, because some models tie them and others do not."""
        pairs: dict[str, str] = {}
        for model in self.members:
            pairs |= model.anatomy.tied
        return {
            alias: stored
            for alias, stored in pairs.items()
            if any(alias not in m.anatomy.tied and alias in m.tensors for m in self.members)
        }

    def _stored_once(self, name: str) -> str | None:
        if name in self.untied:
            return None
        stored = self.donor.anatomy.tied.get(name)
        return stored if stored is not None and stored in self.donor.tensors else None

    def _copyable(self, part: Part, lineup: Lineup, names: list[str]) -> bool:
        return any(e.model.find(n) is not None for e, n in zip(lineup.entrants, names, strict=True))

    def _copy_from_owner(self, part: Part, lineup: Lineup, names: list[str]) -> Node:
        owner, stored = next(
            (e.model, s) for e, n in zip(lineup.entrants, names, strict=True) if (s := e.model.find(n)) is not None
        )
        for e, n in zip(lineup.entrants, names, strict=True):
            found = e.model.find(n)
            if found is not None:
                self.accounted[id(e.model)].add(found)
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

    def _other_modules(self) -> list[int]:
        """Tensors of modules that the recipe does not list are copied from the donor, so that the output is whole."""
        listed = {self._module_name(m, self.donor) for m in self.recipe.modules}
        made = []
        for part in self._parts(self.donor):
            if part.module in listed or part.name in self.parts:
                continue
            stored = self.donor.find(part.name)
            if stored is None or self._stored_once(part.name) is not None:
                continue
            made.append(len(self.planner.nodes))
            rule = f"copy: module {part.module!r} is not in the recipe, taken from {self.donor}"
            self.planner.nodes.append(self._copy(part.name, self.donor, stored, rule))
            self.accounted[id(self.donor)].add(stored)
            self.parts[part.name] = part
        for model in self.members:
            used = self.accounted[id(model)]
            for name, part in model.anatomy.parts.items():
                if part.module not in listed and name not in used:
                    used.add(name)
                    tied = model.anatomy.tied.get(name)
                    why = f"module {part.module!r} is not in the recipe, taken from {self.donor}"
                    self.planner.left_out[f"{model}: {name}"] = (
                        why if tied is None else f"tied to {tied}, which is stored once"
                    )
        return made

    def _account(self) -> list[int]:
        """See to the parents' tensors that the output has not used."""
        made: list[int] = []
        for model in self.members:
            if not any(e.model is model for row in self.lineups for lineup in row for e in lineup.entrants):
                continue
            used = self.accounted[id(model)]
            for name, part in model.anatomy.parts.items():
                if name in used:
                    continue
                key = f"{model}: {name}"
                if name in model.anatomy.tied:
                    self.planner.left_out[key] = f"tied to {model.anatomy.tied[name]}, which is stored once"
                elif name in model.anatomy.buffers:
                    self.planner.left_out[key] = "a buffer that the first model does not have"
                elif self._cut_away(model, part):
                    cut = part.module in self.block_maps or None in self.covered
                    why = "in none of the recipe's slices" if cut else "its module is taken from other models"
                    self.planner.left_out[key] = why
                elif part.module in self.block_maps:
                    # Copying has no place to offer: the slices may take this block to several places.
                    self.missing.append(f"{model} alone has {name} of what a slice merges")
                elif self.recipe.unmatched == "copy" and name not in self.parts:
                    made.append(len(self.planner.nodes))
                    self.planner.nodes.append(self._copy(name, model, name, f"copy: only in {model}"))
                    self.parts[name] = part
                else:
                    self.missing.append(f"{self.donor} has no {name}, which {model} has")
        return made

    def _cut_away(self, model: Model, part: Part) -> bool:
        """Whether the recipe takes nothing from this model at the place where the tensor stands."""
        if part.module in self.block_maps:
            place = part.block if part.block is not None else part.position
            return (id(model), part.module, place) not in self.taken
        lineups = self.covered.get(part.module) or self.covered.get(None)
        # Beside a sliced stack, everything else goes with the first slice.
        return lineups is not None and all(e.model is not model for e in lineups[0].entrants)

    def _refuse_missing(self) -> None:
        shown = "; ".join(self.missing[:4])
        more = f"; and {len(self.missing) - 4} more" if len(self.missing) > 4 else ""
        raise IncompatibleModels(
            f"{len(self.missing)} tensors are not in every model: {shown}{more}",
            where=str(self.recipe.where),
            hint="are they of one architecture? `unmatched: copy` takes such tensors from the model that has them",
        )

    def _shapes_differ(self, part: Part, found: list[tuple[Model, str]], kinds: list[Kind]) -> IncompatibleModels:
        if part.name in self.donor.anatomy.vocabulary or any(n in m.anatomy.vocabulary for m, n in found):
            refusal = self.vocabularies.refusal([m for m, _ in found])
            if refusal is not None:
                return refusal
        shapes = ", ".join(f"{m}: {list(k.shape)}" for (m, _), k in zip(found, kinds, strict=True))
        return IncompatibleModels(
            f"the shapes of {part.name} differ: {shapes}",
            where=str(self.recipe.where),
            hint="only models of one architecture and size can be merged",
        )

    # -- the whole -----------------------------------------------------------------------------------------------------

    def as_model(self, made: list[int]) -> Model:
        """The result as a parent of later stages."""
        nodes = {self.planner.nodes[i].name: i for i in made}
        tensors = {name: Kind(self.planner.nodes[i].dtype, self.planner.nodes[i].shape) for name, i in nodes.items()}
        config, copies, texts, _ = self.describe(made)
        assert self.recipe.name is not None
        folder = self.donor.folder
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
            block_maps=self.block_maps,
            untied=bool(self.untied),
            aligned=bool(self.alignment.untied),
        )
        if config is not None and any(self.planner.nodes[i].scales for i in made):
            config["quantization_config"] = self.encoding.statement([self.planner.nodes[i] for i in made])
        # What an earlier stage laid out is gone when the plan is carried out: name its originals.
        real = {name: self.planner.laid_out.get(path, path) for name, path in copies.items()}
        texts |= {name: content for name, content in real.items() if isinstance(content, str)}
        return config, {n: c for n, c in real.items() if isinstance(c, Path)}, texts, notes


def _schedule(recipe: Recipe, method: type[Method]) -> Schedule | None:
    """The recipe's schedule, or the method's own where the recipe leaves its coefficients open."""
    if recipe.schedule is not None:
        return Schedule(recipe.schedule, recipe.at("schedule"))
    own = method.default_schedule if issubclass(method, Span) else None
    given = any("t" in scope for scope in recipe.scopes())
    return Schedule(own, recipe.where) if own is not None and not given else None


def _informed(method: type[Method]) -> bool:
    return issubclass(method, Span) and method.takes_statistics


def _group(part: Part) -> str:
    """What shares an angle: a block's tensors of one role, or outside the blocks the tensors of one role and place."""
    return f"{part.module}/{part.position if part.block is None else part.block}/{part.role}"


def _passthrough() -> Method:
    return registry.get("passthrough").make({}, count=1)


def _number(part: Part) -> int:
    """The number that stands in a tensor's name at its slot."""
    numbers = [component for component in part.name.split(".") if component.isdigit()]
    return int(numbers[part.slot or 0])


def input_model(checkpoint: Checkpoint) -> InputModel:
    """What a plan says of an opened model."""
    return InputModel(
        ref=checkpoint.ref,
        path=str(checkpoint.path.resolve()) if checkpoint.path else "",
        adapter=str(checkpoint.adapter.resolve()) if checkpoint.adapter else "",
        hub_id=checkpoint.hub_id,
        revision=checkpoint.revision,
        files=tuple((f.path.name, f.size, f.header_sha256) for f in checkpoint.files),
        fingerprint=checkpoint.fingerprint(),
        licence=licence_of(checkpoint),
    )
