"""Reading a model's anatomy from its tensors' names and shapes, and renaming tensors to another block."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from geomerge.anatomy import components, families, generic, unet
from geomerge.anatomy.families import Family, Module
from geomerge.anatomy.roles import (
    Position,
    buffer_rank,
    position_outside,
    role_in_block,
    role_outside,
    vocabulary_axis,
)
from geomerge.anatomy.ties import tied
from geomerge.errors import UsageError

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_SPLIT = re.compile(r"(?<![^.])(\d+)(?![^.])").split
# Speculative-decoding layers beside the model proper: numbered from 0 again, so they must not pass for its blocks.
_BESIDE = re.compile(r"(?:^|\.)mtp(?:_[a-z]+)?\.")

_Split = tuple[str, str, list[str]]
"""A tensor's name, its template, the numbers that the template masks."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where one tensor stands in its model.

    Attributes:
        name: The tensor's name.
        role: One of `roles.ROLES`.
        module: The part of the model with a block numbering of its own ("encoder", "text_decoder"); "" when there is
            but one.
        block: The index of its block in the module, None outside the blocks.
        depth: block / (blocks - 1), 0 when there is one block; 0 before the blocks, 1 after them.
        position: "pre" (before the blocks), "block" or "post".
        slot: Which of the name's components that are numbers holds the block's index, counted from 0; None when none
            does. Layers behind the last block (multi-token prediction) have no block, position "post" and a slot.
        component: The component of a composite model: "language", "vision", "projector", …; "" when there is but one.
    """

    name: str
    role: str
    module: str
    block: int | None
    depth: float | None
    position: Position
    slot: int | None = None
    component: str = ""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What every tensor of a model is.

    Attributes:
        family: The row's name in `families.FAMILIES`, or "generic".
        guessed: No row fitted: stacks, roles and pairs were found from names alone.
        parts: One part for each tensor, in the given order.
        depth: Module → number of blocks (0 for a module without blocks).
        tied: Alias → stored name, for the pairs that hold; either may be missing from the checkpoint.
        vocabulary: Tensor → the axis that runs over the vocabulary.
        layer_keys: Module → configuration keys (dotted when nested) that hold its number of blocks.
        buffers: Tensors that are computed or count steps and are never merged.
    """

    family: str
    guessed: bool
    parts: Mapping[str, Part]
    depth: Mapping[str, int]
    tied: Mapping[str, str]
    vocabulary: Mapping[str, int]
    layer_keys: Mapping[str, tuple[str, ...]]
    buffers: frozenset[str] = field(default_factory=frozenset)

    def components(self) -> tuple[str, ...]:
        """The components' names in the order of their first tensors; ("",) for a model that is none but itself."""
        return tuple(dict.fromkeys(part.component for part in self.parts.values()))


class _Rule(NamedTuple):
    """What one template says about all tensors that share it."""

    module: Module
    stack: str  # what stands before the block's number ("." for nothing), "" outside the blocks
    inside: str  # the base model's prefix, in blocks only
    slot: int | None
    role: str
    position: Position
    buffer: int | None
    axis: int | None


def _before_number(alternatives: str) -> re.Pattern[str]:
    """Finds the earliest number that follows one of the alternatives and no other number: (prefix, alternative)."""
    if not alternatives:
        return re.compile(r"^()()#(?:\.|$)")
    words = "|".join(re.escape(word) for word in alternatives.split("|"))
    return re.compile(rf"^((?:[^#.]+\.)*?)({words})\.#(?:\.|$)")


class _Reader:
    """The rules of one family, each worked out once for each template."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._within = [
            (module, re.compile(rf"(?:^|\.)(?:{module.within})(?:\.|$)")) for module in family.modules if module.within
        ]
        self._rest = next((m for m in family.modules if not m.within), family.modules[-1])
        self._blocks = {
            module.name: _before_number(module.blocks)
            for module in family.modules
            if module.blocks is not None and module.numbering != "unet"
        }

    def rule(self, template: str) -> _Rule:
        family, lower = self.family, template.lower()
        module = next((m for m, pattern in self._within if pattern.search(template)), self._rest)
        beside = _BESIDE.search(lower) is not None
        axis = None if beside or "#" in template else vocabulary_axis(lower, family.vocabulary)
        buffer = buffer_rank(lower)
        if module.numbering == "unet" and unet.place(template.replace("#", "0")) is not None:
            role = role_in_block(lower, family.roles)
            return _Rule(module, "unet", "", None, role, "block", buffer, axis)
        pattern = self._blocks.get(module.name)
        found = pattern.match(template) if pattern and not beside else None
        if found:
            role = role_in_block(lower[found.end() :], family.roles)
            return _Rule(module, found[1] + found[2] or ".", found[1], 0, role, "block", buffer, axis)
        role = role_outside(lower, family.loose_roles)
        position = "post" if beside else position_outside(lower, role, family.pre, family.post)
        return _Rule(module, "", "", None, role, position, buffer, axis)


def _count(module: Module, config: Mapping[str, Any] | None) -> int | None:
    """The number of blocks that the configuration states for a module."""
    for key in module.counts:
        value = lookup(config, key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def lookup(config: Mapping[str, Any] | None, dotted: str) -> Any:
    """What a configuration has under a key, which is dotted where it is nested."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _layer_keys(module: Module, config: Mapping[str, Any] | None) -> tuple[str, ...]:
    present = tuple(key for key in module.counts if lookup(config, key) is not None)
    if present or not module.counts:
        return present
    # None is there (its value is the library's default): the one to write, in a section that exists.
    homes = [key for key in module.counts if "." not in key or isinstance(lookup(config, key.rpartition(".")[0]), dict)]
    return (*homes, *module.counts)[:1]


def read(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None) -> Anatomy:
    """The anatomy of a model.

    Linear in the number of tensors: patterns run once for each template (the name with its numbers masked).

    Args:
        shapes: Tensor name → shape, as stored on disk.
        config: The parsed ``config.json``, or None. A family is recognised by ``model_type`` or ``_class_name``;
            without one, or when the family's blocks are not found in the names, everything is read off the names.

    Returns:
        The anatomy; it covers every name in `shapes`.
    """
    split: list[_Split] = []
    tensors: Counter[str] = Counter()
    first: dict[str, set[str]] = defaultdict(set)
    for name in shapes:
        pieces = _SPLIT(name)
        numbers = pieces[1::2]
        template = "#".join(pieces[::2])
        split.append((name, template, numbers))
        tensors[template] += 1
        if numbers:
            first[template].add(numbers[0])
    family = families.find(config)
    rules = _rules(family, tensors) if family is not None else {}
    guessed = False
    if family is None or not any(rule.stack for rule in rules.values()):
        guess = _guess(tensors, first, config)
        found = _rules(guess, tensors)
        if family is None or any(rule.stack for rule in found.values()):
            family, rules, guessed = guess, found, True
    return _assemble(family, guessed, split, rules, shapes, config)


def _rules(family: Family, templates: Iterable[str]) -> dict[str, _Rule]:
    reader = _Reader(family)
    return {template: reader.rule(template) for template in templates}


def _guess(tensors: Mapping[str, int], first: Mapping[str, set[str]], config: Mapping[str, Any] | None) -> Family:
    """The family to use for names that no row claims."""
    sides = ("down_blocks.#.", "mid_block.", "up_blocks.#.")
    if all(any(template.startswith(side) for template in tensors) for side in sides):
        return next(row for row in families.FAMILIES if row.name == "unet")
    return generic.guess(((t, tuple(first.get(t, ())), n) for t, n in tensors.items()), config)


def _assemble(
    family: Family,
    guessed: bool,
    split: list[_Split],
    rules: Mapping[str, _Rule],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None,
) -> Anatomy:
    modules = {module.name: module for module in family.modules}
    names = _module_names(rules, split)
    raw: list[int | None] = []
    seen: dict[str, set[int]] = defaultdict(set)
    for name, template, numbers in split:
        rule = rules[template]
        number = None
        if rule.slot is not None:
            number = int(numbers[rule.slot])
        elif rule.stack:
            number = unet.place(name)
        raw.append(number)
        if number is not None:
            seen[names[template]].add(number)
    renumbered, depth = _number_blocks(modules, seen, config)

    guesses = components.guess(shapes) if guessed else {}
    parts: dict[str, Part] = {}
    vocabulary: dict[str, int] = {}
    buffers: list[str] = []
    for (name, template, _), number in zip(split, raw, strict=True):
        rule, module = rules[template], names[template]
        component = guesses[name] if guessed else _component(rule.module)
        if number is None:
            where = 0.0 if rule.position == "pre" else 1.0
            parts[name] = Part(name, rule.role, module, None, where, rule.position, None, component)
        else:
            new = renumbered.get(module)
            block, slot = (number, rule.slot) if new is None else (new[number], None)
            blocks = depth[module]
            if block >= blocks:
                parts[name] = Part(name, rule.role, module, None, 1.0, "post", slot, component)
            else:
                where = block / (blocks - 1) if blocks > 1 else 0.0
                parts[name] = Part(name, rule.role, module, block, where, "block", slot, component)
        if rule.axis is not None and rule.axis < len(shapes[name]):
            vocabulary[name] = rule.axis
        if rule.buffer is not None and rule.buffer in (0, len(shapes[name])):
            buffers.append(name)

    loose = {name for name, template, _ in split if not rules[template].stack}
    prefixes = Counter(rule.inside for t, rule in rules.items() if rule.stack and names[t] == _language(family))
    inside = prefixes.most_common(1)[0][0] if prefixes else ""
    present = set(names.values())
    return Anatomy(
        family=family.name,
        guessed=guessed,
        parts=parts,
        depth={name: blocks for name, blocks in depth.items() if name in present},
        tied=tied(family, config, loose, inside),
        vocabulary=vocabulary,
        layer_keys={name: _layer_keys(module, config) for name, module in modules.items() if depth[name]},
        buffers=frozenset(buffers),
    )


def _component(module: Module) -> str:
    return module.name if module.component is None else module.component


def _number_blocks(
    modules: Mapping[str, Module], seen: Mapping[str, set[int]], config: Mapping[str, Any] | None
) -> tuple[dict[str, dict[int, int]], dict[str, int]]:
    """What numbers seen in names mean where they are not block numbers (module → number → block), and all depths."""
    renumbered: dict[str, dict[int, int]] = {}
    depth = dict.fromkeys(modules, 0)
    for name, numbers in seen.items():
        module = modules.get(name)
        if module is not None and module.numbering == "unet":
            renumbered[name] = unet.number(numbers)
        elif module is not None and module.numbering == "rank":
            renumbered[name] = {number: block for block, number in enumerate(sorted(numbers))}
        depth[name] = 1 + max(renumbered[name].values() if name in renumbered else numbers)
        stated = _count(module, config) if module is not None else None
        # DeepSeek-V3 and GLM-4-MoE keep their multi-token-prediction layers behind the last block.
        if stated and config and depth[name] - stated == config.get("num_nextn_predict_layers"):
            depth[name] = stated
    return renumbered, depth


def _language(family: Family) -> str:
    """The module whose prefix the tied names carry: the decoder or the language model."""
    with_blocks = [module.name for module in family.modules if module.blocks is not None]
    return with_blocks[-1] if with_blocks else ""


def _module_names(rules: Mapping[str, _Rule], split: list[_Split]) -> dict[str, str]:
    """Template → module name. When one module's pattern fits several stacks (two towers of the same kind), the largest
    keeps the module's name and each other stack becomes a module named by its path."""
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for _, template, _ in split:
        rule = rules[template]
        if rule.stack:
            sizes[rule.module.name, rule.stack] += 1
    main = dict(sorted(sizes, key=lambda key: sizes[key]))
    return {
        template: rule.stack if rule.stack and main[rule.module.name] != rule.stack else rule.module.name
        for template, rule in rules.items()
    }


def rename(name: str, block: int, part: Part) -> str:
    """The name of the same tensor in another block.

    Args:
        name: The tensor's name.
        block: The other block's index.
        part: The tensor's part, as `read` gave it.

    Raises:
        UsageError: The tensor is in a block whose index is not in its name (diffusers' U-shaped networks, lists with
            gaps).
    """
    if part.slot is None:
        if part.block is None:
            return name
        raise UsageError(
            f"tensor {name!r} is in block {part.block}, but its name does not hold that number: it cannot be moved",
            hint="merge this model with `models:`, without layer ranges",
        )
    found = list(_NUMBER.finditer(name))[part.slot]
    return f"{name[: found.start()]}{block}{name[found.end() :]}"
