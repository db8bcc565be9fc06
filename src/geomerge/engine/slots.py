"""Which tensors the output has, in their order, and what each of them is called in every model that goes into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from geomerge import anatomy
from geomerge.anatomy import Part
from geomerge.engine.alignment import Alignment
from geomerge.engine.lineup import Entrant, Lineup
from geomerge.engine.models import Model
from geomerge.errors import RecipeError
from geomerge.recipe.resolve import layer_t
from geomerge.recipe.values import Module


class Slots:
    """The output's tensors of one recipe.

    Args:
        members: All models of the recipe.
        donor: The model whose names and order the output follows where it takes part.

    Attributes:
        untied: Tied pairs that the output stores apart, alias → stored name.
        alignment: Set once it is known; it may add a head of its own.
        block_maps: Sliced stack → the source block of each block of the output.
        taken: What the slices take: (id of the model, stack, block or "pre" or "post").
        covered: Module → who makes it; `None` for the whole model.
    """

    def __init__(self, members: Sequence[Model], donor: Model) -> None:
        self.members, self.donor = members, donor
        self.untied = self._untied()
        self.alignment: Alignment | None = None
        self.block_maps: dict[str, list[int]] = {}
        self._numbers: dict[str, int] = {}
        self.taken: set[tuple[int, str, int | str]] = set()
        self.covered: dict[str | None, list[Lineup]] = {}

    def tensors(self, module: Module, lineups: list[Lineup]) -> Iterator[tuple[Part, Lineup, list[str], float]]:
        """Output part, who makes it, its name in each entrant, its depth in its slice."""
        first = lineups[0]
        template = self._template(first)
        name = self.module_name(module, template)
        self.covered[name] = lineups
        parts = [p for p in self.parts(template) if name in (None, p.module)]
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
        post = self.parts(self._template(last))
        self.taken |= {(id(e.model), stack, "pre") for e in lineups[0].entrants}
        self.taken |= {(id(e.model), stack, "post") for e in last.entrants}
        for p in parts:
            if p.position == "pre" or p.module != stack:
                yield p, lineups[0], [p.name] * len(lineups[0].entrants), 0.0
        blocks: list[int] = []
        total = self._numbers[stack] = sum(self._length(lineup, stack) for lineup in lineups)
        if not total:
            raise RecipeError(
                "the slices hold no block: the output would be a model without layers",
                where=str(lineups[0].slice.where),
                hint="ranges are half open: `layer_range: [0, 16]` is blocks 0 to 15",
            )
        for lineup in lineups:
            template = self._template(lineup)
            by_block: dict[int, list[Part]] = {}
            for p in self.parts(template):
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

    def blocks(self, module: str) -> int:
        """How many blocks a module of the output has."""
        return self._numbers.get(module, self.donor.anatomy.depth.get(module, 0))

    def parts(self, template: Model) -> list[Part]:
        """A model's tensors, with the tied names that the output must store because not all models tie them."""
        parts = list(template.anatomy.parts.values())
        for alias in self.untied:
            if alias not in template.tensors:
                owner = next((m for m in self.members if alias in m.tensors), None)
                if owner is not None:
                    parts.append(owner.anatomy.parts[alias])
                elif self.alignment is not None and alias in self.alignment.untied:
                    parts.append(self.alignment.head(alias))
        return parts

    def module_name(self, module: Module, template: Model) -> str | None:
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

    def stored_once(self, name: str) -> str | None:
        if name in self.untied:
            return None
        stored = self.donor.anatomy.tied.get(name)
        return stored if stored is not None and stored in self.donor.tensors else None


def _number(part: Part) -> int:
    """The number that stands in a tensor's name at its slot."""
    numbers = [component for component in part.name.split(".") if component.isdigit()]
    return int(numbers[part.slot or 0])
