"""Tensor names as patterns: boxes of numbers, and rows that say no more than is true."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from geomerge.cli.patterns import Group, Row, boxes, folded, grouped, split, written


def rows(treatment: dict[str, str]) -> dict[str, str]:
    """Pattern → treatment."""
    groups = grouped(treatment, lambda name: name, treatment.__getitem__)
    found: list[Row[str, str]] = folded(groups, lambda group: treatment[group.items[0]])
    assert sorted(name for row in found for name in row.items) == sorted(treatment)
    return {row.pattern: row.key for row in found}


def test_split_finds_whole_components_only() -> None:
    """A number is a component of its own, without leading zeros; what is glued to letters stays text."""
    assert split("h.3.attn.q2.weight") == (("h.", ".attn.q2.weight"), (3,))
    assert split("7.x.0") == (("", ".x.", ""), (7, 0))
    assert split("a.007.b") == (("a.007.b",), ())


def test_written() -> None:
    """One value stands as it is, a range in braces."""
    assert written(("h.", ".e.", ".w"), ((0, 23), (5, 5))) == "h.{0-23}.e.5.w"


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, unique=True))
def test_boxes_hold_exactly_the_numbers(numbers: list[tuple[int, int]]) -> None:
    """Every combination is in one box, and no other."""
    found = [n for box in boxes(sorted(numbers)) for n in product(*(range(a, b + 1) for a, b in box))]
    assert sorted(found) == sorted(numbers)


def test_a_full_grid_is_one_box() -> None:
    """Experts of all layers are one pattern."""
    assert boxes(list(product(range(4), range(8)))) == [((0, 3), (0, 7))]


def test_equal_blocks_are_one_row() -> None:
    """Two templates with the same treatment in all blocks fold into ``.*``."""
    names = [f"m.{i}.{t}.weight" for i in range(3) for t in ("q", "k")]
    assert rows(dict.fromkeys(names, "x") | {"norm": "x"}) == {"m.{0-2}.*": "x", "norm": "x"}


def test_parts_of_a_block_fold_by_their_component() -> None:
    """When attention and MLP differ, each is a row; a lone tensor keeps its name."""
    treatment = {}
    for i in range(2):
        treatment |= {f"m.{i}.attn.{t}": "x" for t in "qk"} | {f"m.{i}.mlp.{t}": "y" for t in "ud"}
        treatment[f"m.{i}.ln"] = "x"
    assert rows(treatment) == {"m.{0-1}.attn.*": "x", "m.{0-1}.mlp.*": "y", "m.{0-1}.ln": "x"}


def test_blocks_with_another_treatment_are_rows_of_their_own() -> None:
    """Ranges are cut where the treatment changes, and stand in the order of the blocks."""
    treatment = {f"m.{i}.{t}": "y" if i in (2, 3) else "x" for i in range(6) for t in "ab"}
    assert list(rows(treatment).items()) == [("m.{0-1}.*", "x"), ("m.{2-3}.*", "y"), ("m.{4-5}.*", "x")]


def test_a_star_never_covers_another_treatment() -> None:
    """Overlapping ranges with different treatments are not folded over each other."""
    treatment = {f"m.{i}.a.w": "x" for i in range(4)}
    treatment |= {f"m.{i}.b.w": "x" if i < 2 else "y" for i in range(4)}
    assert rows(treatment) == {"m.{0-3}.a.w": "x", "m.{0-1}.b.w": "x", "m.{2-3}.b.w": "y"}


def test_a_coarser_key_is_taken_when_the_fine_one_cuts_too_much() -> None:
    """With a value for each block the groups follow the coarse key; with few values the fine one."""
    names = [f"m.{i}.w" for i in range(8)]
    values = {name: i for i, name in enumerate(names)}
    one: list[Group[str]] = grouped(names, lambda n: n, values.__getitem__, lambda n: None, most=4)
    assert [g.pattern for g in one] == ["m.{0-7}.w"]
    assert one[0].items == tuple(names)
    halves = grouped(names, lambda n: n, lambda n: values[n] // 4, lambda n: None, most=4)
    assert [g.pattern for g in halves] == ["m.{0-3}.w", "m.{4-7}.w"]
