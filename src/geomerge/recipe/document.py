"""YAML text as a tree that knows its lines, read without constructing any object.

Only the event stream of ruamel.yaml is used, so no tag can make anything happen. What a tree may cost is bounded: the
file's size, the depth of nesting, and how many nodes aliases may add. Scalars keep their text; what a plain ``1e-5``,
``no`` or ``016`` means is decided by whoever reads the key, see `Text.value`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomerge.errors import RecipeError
from geomerge.recipe.values import Scalar, Where

MAX_BYTES = 10_000_000
MAX_DEPTH = 50
MAX_ALIASED = 100_000
"""How many nodes aliases and merge keys may add to a file: enough for any shared block, far too few for a bomb."""

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
_WHOLE = re.compile(r"[-+]?\d{1,300}")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TRUE, _FALSE, _NULL = (
    frozenset(form for word in words for form in (word, word.title(), word.upper()))
    for words in (("true", "yes", "on"), ("false", "no", "off"), ("null", "~", ""))
)
_CORE = "tag:yaml.org,2002:"
_SCALAR_TAGS = {f"{_CORE}{name}" for name in ("str", "int", "float", "bool", "null")} | {"!"}


@dataclass(frozen=True, slots=True)
class Text:
    """A scalar."""

    where: Where
    text: str
    quoted: bool
    size: int = 1
    height: int = 0

    @property
    def empty(self) -> bool:
        """Whether it is YAML's null."""
        return not self.quoted and self.text in _NULL

    def value(self) -> Scalar | None:
        """What the text means: truth values as in YAML 1.1 (``yes``, ``off``), numbers as in YAML 1.2 and ``1e-5``.

        Numbers count as numbers when quoted, too: other tools write ``"1e-5"``.
        """
        text = self.text
        if _NUMBER.fullmatch(text):
            return int(text) if _WHOLE.fullmatch(text) else float(text)
        if self.quoted:
            return text
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _NOT_FINITE.fullmatch(text):
            return math.nan if "n" in text[-1].lower() else float(text.replace(".", ""))
        return text


@dataclass(frozen=True, slots=True)
class Items:
    """A sequence."""

    where: Where
    items: tuple[Node, ...]
    size: int
    height: int


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping: for each key where it stands, and its value."""

    where: Where
    entries: Mapping[str, tuple[Where, Node]]
    size: int
    height: int


Node = Text | Items | Table


def plain(node: Node) -> Any:
    """The tree as dicts, lists and scalars."""
    if isinstance(node, Text):
        return node.value()
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    return {key: plain(value) for key, (_, value) in node.entries.items()}


def read_text(path: Path, file: str) -> str:
    """The text of a recipe's file.

    Raises:
        RecipeError: There is no such file, it is too large, or it is not text.
    """
    hint = "a recipe is a YAML text file"
    try:
        if path.is_dir():
            raise RecipeError("this is a directory, not a recipe", where=file, hint=hint)
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except RecipeError:
        raise
    except FileNotFoundError:
        raise RecipeError("there is no such file", where=file, hint="check the recipe's path") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=file) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"the recipe is larger than {MAX_BYTES // 1_000_000} MB", where=file, hint=hint)
    if b"\0" in data:
        raise RecipeError("this is a binary file, not a recipe", where=file, hint=hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError("the recipe is not UTF-8 text", where=f"{file}:{line}", hint=hint) from None


def read_documents(text: str, file: str) -> list[Table]:
    """The documents of a YAML text; empty ones are left out.

    Raises:
        RecipeError: The text is empty, too large or not YAML, a document is not a mapping, a key is given twice, a tag
            would construct an object, or the limits of nesting and aliases are exceeded.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > MAX_BYTES:
        raise RecipeError(f"the recipe is larger than {MAX_BYTES // 1_000_000} MB", where=file)
    try:
        documents = list(_Composer(YAML(typ="safe", pure=True).parse(text), file).documents())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        problem = ", ".join(str(said) for said in (error.context, error.problem) if said)
        tab = repr("\t") in problem
        hint = "YAML does not allow tabs for indentation: use spaces" if tab else "check indentation and quotes"
        raise RecipeError(f"this is not YAML: {problem}", where=where, hint=hint) from None
    except YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        reason = getattr(error, "reason", None) or str(error).splitlines()[0]
        raise RecipeError(f"this is not YAML: {reason}", where=f"{file}:{line}") from None
    except RecipeError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # The parser lets these through for malformed directives and escapes; to the user they are the same thing.
        raise RecipeError(f"this is not YAML: {error}", where=file) from None
    tables = []
    for document in documents:
        if isinstance(document, Text) and document.empty:
            continue
        if not isinstance(document, Table):
            raise RecipeError(
                f"a recipe is a mapping of keys, not {said_kind(document)}",
                where=str(document.where),
                hint="it starts with lines such as 'merge_method: linear' and 'models:'",
            )
        tables.append(document)
    if not tables:
        raise RecipeError("the recipe is empty", where=file, hint="it needs at least 'merge_method' and 'models'")
    return tables


def said_kind(node: Node) -> str:
    """A node in an error message."""
    if isinstance(node, Text):
        if node.empty:
            return "nothing"
        return repr(node.text if len(node.text) <= 60 else node.text[:60] + "…")
    return "a list" if isinstance(node, Items) else "a mapping"


@dataclass(slots=True)
class _Composer:
    """Builds trees from parser events."""

    events: Iterator[Any]
    file: str
    anchors: dict[str, Node] = field(default_factory=dict)
    aliased: int = 0

    def documents(self) -> Iterator[Node]:
        for event in self.events:
            if type(event).__name__ == "DocumentStartEvent":
                self.anchors.clear()
                yield self._node(next(self.events), depth=1)

    def _where(self, event: Any) -> Where:
        return Where(self.file, event.start_mark.line + 1)

    def _refuse(self, event: Any, what: str, hint: str | None = None) -> RecipeError:
        return RecipeError(what, where=str(self._where(event)), hint=hint)

    def _node(self, event: Any, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._refuse(event, f"the recipe is nested more than {MAX_DEPTH} levels deep")
        kind = type(event).__name__
        if kind == "AliasEvent":
            return self._alias(event, depth)
        tag = event.tag
        node: Node
        if kind == "ScalarEvent":
            if tag is not None and tag not in _SCALAR_TAGS:
                raise self._refuse(event, f"the tag {tag!r} is not allowed", "a recipe holds plain values only")
            quoted = tag in (f"{_CORE}str", "!") if tag is not None else not event.implicit[0]
            node = Text(self._where(event), event.value, quoted)
        elif kind == "SequenceStartEvent":
            self._check_tag(event, "seq")
            items = []
            for inner in self.events:
                if type(inner).__name__ == "SequenceEndEvent":
                    break
                items.append(self._node(inner, depth + 1))
            node = Items(self._where(event), tuple(items), *_extent(items))
        else:
            self._check_tag(event, "map")
            node = self._table(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _check_tag(self, event: Any, name: str) -> None:
        if event.tag is not None and event.tag not in (f"{_CORE}{name}", "!"):
            raise self._refuse(event, f"the tag {event.tag!r} is not allowed", "a recipe holds plain values only")

    def _alias(self, event: Any, depth: int) -> Node:
        node = self.anchors.get(event.anchor)
        if node is None:
            raise self._refuse(event, f"the alias *{event.anchor} has no anchor &{event.anchor} before it")
        if depth + node.height > MAX_DEPTH:
            raise self._refuse(event, f"the recipe is nested more than {MAX_DEPTH} levels deep")
        self._charge(event, node.size)
        return node

    def _charge(self, event: Any, size: int) -> None:
        self.aliased += size
        if self.aliased > MAX_ALIASED:
            raise self._refuse(event, f"aliases expand to more than {MAX_ALIASED:,} values", "write the values out")

    def _table(self, event: Any, depth: int) -> Table:
        entries: dict[str, tuple[Where, Node]] = {}
        merged: dict[str, tuple[Where, Node]] = {}
        for key in self.events:
            if type(key).__name__ == "MappingEndEvent":
                break
            if type(key).__name__ != "ScalarEvent":
                raise self._refuse(key, "a key must be a plain word")
            name, where = key.value, self._where(key)
            value = self._node(next(self.events), depth + 1)
            if name == "<<" and key.implicit[0]:
                self._merge(key, value, merged)
            elif name in entries:
                first = entries[name][0].line
                raise self._refuse(key, f"the key {name!r} is given twice", f"the first is on line {first}; remove one")
            else:
                entries[name] = (where, value)
            if key.anchor is not None:
                self.anchors[key.anchor] = Text(where, name, quoted=not key.implicit[0])
        entries = {**{name: pair for name, pair in merged.items() if name not in entries}, **entries}
        return Table(self._where(event), entries, *_extent([value for _, value in entries.values()]))

    def _merge(self, event: Any, value: Node, merged: dict[str, tuple[Where, Node]]) -> None:
        tables = value.items if isinstance(value, Items) else (value,)
        for table in tables:
            if not isinstance(table, Table):
                raise self._refuse(event, "'<<' takes a mapping or a list of mappings")
            self._charge(event, table.size)
            for name, pair in table.entries.items():
                merged.setdefault(name, pair)


def _extent(children: list[Node]) -> tuple[int, int]:
    """Number of nodes and height of a node with these children. (A bomb's size is an integer; nothing is expanded.)"""
    return 1 + sum(child.size for child in children), 1 + max((child.height for child in children), default=0)
