"""YAML that is empty, broken, hostile or not YAML at all: one clear error each, and no object is ever constructed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from geomerge.errors import RecipeError
from geomerge.recipe import load
from geomerge.recipe.document import MAX_ALIASED, MAX_BYTES, MAX_DEPTH, plain, read_documents


def refused(text: str) -> str:
    """The message of the error that the text gives."""
    with pytest.raises(RecipeError) as caught:
        read_documents(text, "r.yml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def tree(text: str) -> object:
    """The only document as plain data."""
    (document,) = read_documents(text, "r.yml")
    return plain(document)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "---\n---\n", "null", "~"])
def test_empty(text: str) -> None:
    """A text without content is an empty recipe."""
    assert refused(text).startswith("r.yml: the recipe is empty\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\n", "r.yml:2: this is not YAML"),
        ("a:\n\tb: c", "r.yml:2: this is not YAML"),
        ("a:\n\tb: c", "does not allow tabs for indentation: use spaces"),
        ("a: b: c", "r.yml:1: this is not YAML"),
        ("x: 1\ny: 'open", "r.yml:2: this is not YAML"),
        ("x: 1\n\x01", "r.yml:2: this is not YAML"),
        ('a: "\\UFFFFFFFF"', "this is not YAML"),
        ("%YAML 3.0\n---\na: 1", "this is not YAML"),
        ("- a\n- b", "r.yml:1: a recipe is a mapping of keys, not a list"),
        ("just words", "r.yml:1: a recipe is a mapping of keys, not 'just words'"),
        ("a: 1\n---\n\n- b", "r.yml:4: a recipe is a mapping of keys, not a list"),
        ("? [a, b]\n: 1", "r.yml:1: a key must be a plain word"),
    ],
)
def test_not_a_recipe(text: str, message: str) -> None:
    """Broken YAML and other documents are refused with the line."""
    assert message in refused(text)


def test_duplicate_keys() -> None:
    """A key given twice is refused at any depth, with both lines."""
    assert refused("a: 1\nb: 2\na: 3") == ("r.yml:3: the key 'a' is given twice\n  the first is on line 1; remove one")
    assert "r.yml:3: the key 'x'" in refused("a:\n  - x: 1\n    x: 1")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "a: !custom {b: 1}",
        "!thing\na: 1",
        "a: !!binary aGk=",
        "a: !!set {b, c}",
        "a: !!timestamp 2020-01-01",
        "a: !!int [1]",
    ],
)
def test_tags_are_refused(text: str) -> None:
    """No tag can construct anything."""
    assert "is not allowed" in refused(text)


def test_plain_tags() -> None:
    """The tags of plain values are harmless and mean what they say."""
    assert tree("a: !!str 1\nb: !!int 2\nc: !!seq [1]\nd: !!map {e: ! yes}") == {
        "a": 1,  # a quoted number is a number, see Text.value
        "b": 2,
        "c": [1],
        "d": {"e": "yes"},
    }


def test_anchors_and_merge_keys() -> None:
    """Shared blocks work as in any YAML file: what stands beside a merge key wins over what is merged."""
    text = "base: &b {x: 1, y: 2}\nother: &o {y: 8, z: 9}\nuse: *b\nmore:\n  <<: [*b, *o]\n  x: 5\n"
    assert tree(text) == {
        "base": {"x": 1, "y": 2},
        "other": {"y": 8, "z": 9},
        "use": {"x": 1, "y": 2},
        "more": {"y": 2, "z": 9, "x": 5},
    }
    assert tree("'<<': 1") == {"<<": 1}
    assert "'<<' takes a mapping" in refused("a: {<<: 1}")


@pytest.mark.parametrize("text", ["a: *b", "a: &a [*a]", "a: &x {b: *x}", "a: &x 1\n---\nb: *x"])
def test_aliases_without_an_anchor(text: str) -> None:
    """An alias to nothing, to itself, or to another document is refused."""
    assert "has no anchor" in refused(text)


@pytest.mark.parametrize(
    "line", ["a{i}: &a{i} [{ten}]", "a{i}: &a{i} {{{named}}}", "a{i}: &a{i} {{<<: *a0, x: [{ten}]}}"]
)
def test_bombs(line: str) -> None:
    """Aliases of aliases are counted, not expanded: a billion-laughs file is refused at once."""
    first = "a0: &a0 {k: v}\n"
    lines = []
    for i in range(1, 30):
        alias = f"*a{i - 1}"
        ten, named = ", ".join([alias] * 10), ", ".join(f"n{k}: {alias}" for k in range(10))
        lines.append(line.format(i=i, ten=ten, named=named))
    start = time.thread_time()
    message = refused(first + "\n".join(lines))
    assert f"aliases expand to more than {MAX_ALIASED:,} values" in message
    assert time.thread_time() - start < 2


def test_depth() -> None:
    """Nesting is bounded: directly, in blocks, and through aliases; 50 levels are allowed."""
    allowed = "a: " + "[" * (MAX_DEPTH - 2) + "1" + "]" * (MAX_DEPTH - 2)
    read_documents(allowed, "r.yml")
    for text in ("a: " + "[" * (MAX_DEPTH - 1) + "1", "a: " + "{a: " * 5000, "- " * 5000):
        assert f"nested more than {MAX_DEPTH} levels deep" in refused(text)
    half = MAX_DEPTH // 2
    chain = "a: &a " + "[" * half + "]" * half + "\nb: " + "[" * half + "*a" + "]" * half
    assert f"r.yml:2: the recipe is nested more than {MAX_DEPTH} levels deep" in refused(chain)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x00\x01\x02", "this is a binary file"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{}", "this is a binary file"),
        (b"a: 1\nb: \xff\xfe", "r.yml:2: the recipe is not UTF-8 text"),
        (b"PK\x03\x04\xff\xff", "is not UTF-8 text"),
        (b"a: 1\n" + b"# " + b"x" * MAX_BYTES, "the recipe is larger than 10 MB"),
        (b"", "the recipe is empty"),
    ],
)
def test_files(tmp_path: Path, data: bytes, message: str) -> None:
    """Binary, oversized and empty files are refused before they are parsed."""
    path = tmp_path / "r.yml"
    path.write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert message in str(caught.value)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    """A path that is no file says so."""
    with pytest.raises(RecipeError, match="there is no such file"):
        load(tmp_path / "missing.yml")
    with pytest.raises(RecipeError, match="this is a directory"):
        load(tmp_path)


def test_huge_numbers_stay_cheap() -> None:
    """A number with a hundred thousand digits is no whole number and costs nothing."""
    assert tree("a: " + "9" * 100_000) == {"a": float("inf")}
