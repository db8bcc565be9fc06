"""Many tensor names as few patterns: ``model.layers.{0-23}.mlp.*``."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

_NUMBER = re.compile(r"(?<![^.])(0|[1-9]\d*)(?![^.])")

Template = tuple[str, ...]
"""What stands between a name's numbers."""

Box = tuple[tuple[int, int], ...]
"""For each number of a template its first and last value; the box holds every combination."""

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Group(Generic[T]):
    """Items whose names differ in their numbers only, in the order of these numbers.

    Attributes:
        template, box: The names.
        items: What they stand for.
    """

    template: Template
    box: Box
    items: tuple[T, ...]

    @property
    def pattern(self) -> str:
        return written(self.template, self.box)


def split(name: str) -> tuple[Template, tuple[int, ...]]:
    """A name's template and numbers: ``h.3.weight`` → ``("h.", ".weight")``, ``(3,)``."""
    pieces = _NUMBER.split(name)
    return tuple(pieces[::2]), tuple(int(n) for n in pieces[1::2])


def written(template: Template, box: Box) -> str:
    """A box of names as one pattern."""
    text = template[0]
    for (first, last), piece in zip(box, template[1:], strict=True):
        text += (str(first) if first == last else f"{{{first}-{last}}}") + piece
    return text


def grouped(
    items: Iterable[T], name: Callable[[T], str], *keys: Callable[[T], Hashable], most: int = 4
) -> list[Group[T]]:
    """Group items by the templates of their names, in the order of first appearance.

    Args:
        items: What is to be grouped; their names are distinct.
        name: An item's name.
        keys: What items of a group must have in common, the strictest first. The next key is taken where the one before
            cuts a template into more than `most` groups.
        most: See `keys`.
    """
    templates: dict[Template, dict[tuple[int, ...], T]] = {}
    for item in items:
        template, numbers = split(name(item))
        templates.setdefault(template, {})[numbers] = item
    found: list[Group[T]] = []
    for template, members in templates.items():
        groups: list[Group[T]] = []
        for key in keys:
            groups = list(_groups(template, members, key))
            if len(groups) <= most:
                break
        found += groups
    return found


def _groups(template: Template, members: dict[tuple[int, ...], T], key: Callable[[T], Hashable]) -> Iterator[Group[T]]:
    alike: dict[Hashable, list[tuple[int, ...]]] = {}
    for numbers in sorted(members):
        alike.setdefault(key(members[numbers]), []).append(numbers)
    made = [box for numbers in alike.values() for box in boxes(numbers)]
    for box in sorted(made):
        yield Group(template, box, tuple(members[n] for n in product(*(range(a, b + 1) for a, b in box))))


def boxes(numbers: Sequence[tuple[int, ...]]) -> list[Box]:
    """Boxes that together hold exactly the given combinations (sorted, distinct, of one length)."""
    if not numbers[0]:
        return [()]
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in numbers:
        by_first.setdefault(first, []).append(tuple(rest))
    runs: list[tuple[int, int, list[Box]]] = []
    for first, rests in by_first.items():
        inner = boxes(rests)
        if runs and runs[-1][1] == first - 1 and runs[-1][2] == inner:
            runs[-1] = (runs[-1][0], first, inner)
        else:
            runs.append((first, first, inner))
    return [((first, last), *box) for first, last, inner in runs for box in inner]


@dataclass(frozen=True)
class Row(Generic[T, K]):
    """Groups that are shown in one line.

    Attributes:
        pattern: Their names.
        items: Everything in them.
        key: What they have in common.
    """

    pattern: str
    items: tuple[T, ...]
    key: K


def folded(groups: Sequence[Group[T]], key: Callable[[Group[T]], K]) -> list[Row[T, K]]:
    """Put groups of the same blocks and the same key in one row where a pattern can say so.

    ``layers.{0-3}.*`` stands for all tensors of these blocks, ``layers.{0-3}.mlp.*`` for all of their ``mlp``.
    """
    stems: dict[tuple[str, bool], list[Group[T]]] = {}
    for group in groups:
        stems.setdefault((group.template[0], bool(group.box)), []).append(group)
    keys = {id(group): key(group) for group in groups}
    order = {id(group): i for i, group in enumerate(groups)}
    rows: list[tuple[tuple[int, int, int], Row[T, K]]] = []

    def add(pattern: str, together: list[Group[T]]) -> None:
        items = tuple(item for group in together for item in group.items)
        block = together[0].box[0][0] if together[0].box else 0
        rows.append(((start, block, min(order[id(g)] for g in together)), Row(pattern, items, keys[id(together[0])])))

    def fold(together: list[Group[T]], suffix: str) -> bool:
        """One row if that is true to what the pattern says."""
        if len({keys[id(g)] for g in together}) > 1:
            return False
        (first, last), stem = together[0].box[0], together[0].template[0]
        add(f"{written((stem, ''), ((first, last),))}{suffix}", together)
        return True

    for members in stems.values():
        start = min(order[id(g)] for g in members)
        if len(members) == 1 or not members[0].box:
            for group in members:
                add(group.pattern, [group])
            continue
        for blocks in _apart(members):
            if len(blocks) > 1 and _one_range(blocks) and fold(blocks, ".*"):
                continue
            parts: dict[str, list[Group[T]]] = {}
            for group in blocks:
                parts.setdefault(_component(group), []).append(group)
            for component, part in parts.items():
                for piece in _apart(part):
                    if len(piece) > 1 and component and _one_range(piece) and fold(piece, f".{component}.*"):
                        continue
                    for group in piece:
                        add(group.pattern, [group])
    return [row for _, row in sorted(rows, key=lambda r: r[0])]


def _component(group: Group[T]) -> str:
    """What follows the block's number: ``mlp`` of ``layers.3.mlp.up.weight``; nothing when it is the tensor itself."""
    rest = group.template[1].removeprefix(".").split(".")
    return rest[0] if len(rest) > 1 or len(group.template) > 2 else ""


def _one_range(groups: Sequence[Group[T]]) -> bool:
    return len({g.box[0] for g in groups}) == 1


def _apart(groups: Sequence[Group[T]]) -> list[list[Group[T]]]:
    """The groups by their blocks: those whose ranges of blocks overlap together, in the order of the blocks."""
    clusters: list[tuple[int, list[Group[T]]]] = []
    for group in sorted(groups, key=lambda g: g.box[0]):
        first, last = group.box[0]
        if clusters and first <= clusters[-1][0]:
            clusters[-1] = (max(clusters[-1][0], last), [*clusters[-1][1], group])
        else:
            clusters.append((last, [group]))
    return [members for _, members in clusters]
