"""Reading a recipe's mappings, its parameters and its steps: what every part of a recipe is made of.

`geomerge.recipe.parse` says what a recipe consists of; here is how its values are read. A method ``read_<kind>`` reads each
kind of value that the tables of `geomerge.recipe.grammar` name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from geomerge.errors import RecipeError, UsageError, did_you_mean
from geomerge.recipe import grammar
from geomerge.recipe.document import Items, Node, Table, Text, said_kind
from geomerge.recipe.grammar import Key, Shape
from geomerge.recipe.patterns import classify
from geomerge.recipe.values import Entry, Filter, ModelRef, Scalar, Setting, Step, Where

if TYPE_CHECKING:
    from geomerge.methods.base import Parameter

T = TypeVar("T")
W = TypeVar("W")

_BLOCKS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")
_LAX = "mergekit ignores unknown keys; with 'compat: mergekit' they become notes here"


def method_parameters(name: str) -> Mapping[str, Parameter]:
    """The parameters of a merge method by their recipe names; raises `UsageError` for an unknown method."""
    from geomerge.methods import registry

    return registry.get(name).parameters()


class Abandoned(RecipeError):
    """What was read cannot be used; why is among the reader's `problems`."""


class Reader:
    """Reads the mappings, parameters, steps and single values of one document.

    What is wrong with one key does not hide what is wrong with the next: errors are kept in `problems`, and raised
    `together` in the end.
    """

    def __init__(self, document: Table, compat: str | None) -> None:
        self.document = document
        self.notes: list[str] = []
        self.problems: list[RecipeError] = []
        # The profile decides what happens to unknown keys, and the method which parameters there are: both come first.
        self.compat = compat
        keys = {key.name: key for key in grammar.RECIPE.keys}
        written = document.entries.get("compat")
        if compat is None and written is not None and not empty(written[1]):
            self.compat = self.read_choice(written[1], keys["compat"])
        method = document.entries.get("merge_method")
        self.method, self.known = "", cast("Mapping[str, Parameter]", {})
        if method is not None and not empty(method[1]):
            self.method = self.read_word(method[1], keys["merge_method"])
            try:
                self.known = method_parameters(self.method)
            except UsageError as error:
                hint = _elsewhere(self.method) or error.hint
                self.problems.append(refuse(method[1].where, error.what, hint))
                self.method = ""  # whose parameters nobody knows

    # Several problems at once

    def _keep(self, problem: RecipeError) -> None:
        if not isinstance(problem, Abandoned):
            self.problems.append(problem)

    def each(self, written: Iterable[W], read: Callable[[W], T]) -> tuple[T, ...]:
        """What is read of every one of them."""
        found, whole = [], True
        for one in written:
            try:
                found.append(read(one))
            except RecipeError as problem:
                self._keep(problem)
                whole = False
        if not whole:
            raise Abandoned("")
        return tuple(found)

    # Mappings with fixed keys

    def _table(self, node: Node, shape: Shape) -> dict[str, Any]:
        """The values of a mapping by key; keys without a value count as absent."""
        if not isinstance(node, Table):
            names = ", ".join(shape.names()[:4])
            raise refuse(
                node.where, f"{shape.title} must be a mapping, not {said_kind(node)}", f"with the keys {names}"
            )
        keys = {key.name: key for key in shape.keys}
        found: dict[str, Any] = {}
        failed: set[str] = set()
        for name, (where, value) in node.entries.items():
            key = keys.get(name)
            if key is None:
                what = f"{shape.title} has no key {name!r}"
                hint = grammar.UNIMPLEMENTED.get(name)
                if "parameters" in keys and self.compat != "mergekit" and hint is None and _is_parameter(name):
                    self.problems.append(refuse(where, what, "it is a parameter: put it under `parameters:`"))
                else:
                    self._unknown(what, where, hint or did_you_mean(name, keys))
            elif not empty(value):
                try:
                    found[name] = getattr(self, f"read_{key.kind}")(value, key)
                except RecipeError as problem:
                    self._keep(problem)
                    failed.add(name)
        for key in shape.keys:
            if key.required and key.name not in found and key.name not in failed:
                self.problems.append(refuse(node.where, f"{shape.title} needs {key.name!r}", key.hint))
                failed.add(key.name)
        if failed:
            raise Abandoned("")
        return found

    def _unknown(self, what: str, where: Where, hint: str | None) -> None:
        if self.compat != "mergekit":
            self.problems.append(refuse(where, what, f"{hint}\n  {_LAX}" if hint else _LAX))
        else:
            self._note(where, f"{what}; it is ignored" + (f" ({hint})" if hint else ""))

    def _note(self, where: Where, what: str) -> None:
        self.notes.append(f"{where}: {what}")

    # Parameters

    def read_parameters(self, node: Node, key: Key) -> dict[str, Setting]:
        settings = {}
        beside = _beside(self.document)
        inert = (*grammar.INERT["*"], *grammar.INERT.get(self.method, ()))

        def read(written: tuple[str, tuple[Where, Node]]) -> None:
            name, (where, value) = written
            if name in self.known or name in beside:
                settings[name] = self._setting(name, value, where)
            elif name in inert:
                self._setting(name, value, where)
                self._note(where, f"the parameter {name!r} has no effect")
            elif self.method:
                self._unknown(f"{self.method} has no parameter {name!r}", where, _meant(name, (*self.known, *beside)))

        self.each(entries(node, key).items(), read)
        return settings

    def _setting(self, name: str, node: Node, where: Where) -> Setting:
        """A value, a gradient, an entry, or a list of entries."""
        if isinstance(node, Table):
            return Setting((self._entry(node),), where)
        if isinstance(node, Items) and any(isinstance(item, Table) for item in node.items):
            return Setting(tuple(self._entry(item) for item in node.items), where)
        try:
            return Setting((Entry(None, _value(node), node.where),), where)
        except ValueError as error:
            raise refuse(node.where, f"the parameter {name!r} {error}") from None

    def _entry(self, node: Node) -> Entry:
        found = self._table(node, grammar.ENTRY)
        name, kind = found.get("filter", (None, "substring"))
        chosen = Filter(name, found.get("role"), found.get("block"), kind, found.get("component"))
        return Entry(None if chosen == Filter() else chosen, found["value"], node.where)

    def read_value(self, node: Node, _: Key) -> Scalar | tuple[Scalar, ...]:
        try:
            return _value(node)
        except ValueError as error:
            raise refuse(node.where, f"'value' {error}") from None

    def read_filter(self, node: Node, key: Key) -> tuple[str, str]:
        try:
            return classify(self.read_template(node, key))
        except ValueError as error:
            raise refuse(node.where, str(error), "a plain piece of the tensor's name is a filter, too") from None

    def read_role(self, node: Node, key: Key) -> str:
        return self.read_choice(node, key)

    def read_block(self, node: Node, _: Key) -> tuple[int, int]:
        match = _BLOCKS.fullmatch(node.text) if isinstance(node, Text) else None
        if match is None:
            raise refuse(node.where, f"'block' must be a number or a range, not {said_kind(node)}", "as in 3 or 3-7")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise refuse(node.where, f"the block range {first}-{last} ends before it starts", f"write {last}-{first}")
        return first, last

    def read_steps(self, node: Node, key: Key) -> tuple[Step, ...]:
        steps: list[Step] = []
        if not isinstance(node, Items):
            raise refuse(node.where, f"'steps' must be a list, not {said_kind(node)}", "as in 'steps: [{dare: 0.5}]'")
        for item in items(node, key):
            written, where, value = _step(item)
            if written not in grammar.STEPS:
                raise refuse(where, f"there is no step {written!r}", did_you_mean(written, grammar.STEPS))
            name = grammar.STEP_ALIASES.get(written, written)
            if name in grammar.BEFORE:
                self._check_place(name, where, steps)
            settings, statistics = self._step_parameters(name, value)
            needed = "statistics" if name == "aim" else _NEEDED.get(name)
            if needed is not None and needed not in settings and statistics is None:
                raise refuse(where, f"the step {name!r} needs {_NAMED.get(needed, needed)}", _shown(name))
            steps.append(Step(name, settings, where, statistics))
        return tuple(steps)

    def _check_place(self, name: str, where: Where, before: list[Step]) -> None:
        """Refuse a sparsifier after a step on the merged task vector, or a second time."""
        late = next((s for s in before if s.name in grammar.AFTER), None)
        if late is not None:
            raise refuse(
                where,
                f"the step {name!r} comes after {late.name!r}",
                f"{name!r} thins the models' task vectors before the method, {late.name!r} scales the merged one after it: "
                f"write {name!r} first",
            )
        if any(s.name == name for s in before):
            raise refuse(
                where, f"the step {name!r} is given twice", "one step with the product of the densities does it"
            )

    def _step_parameters(self, step: str, node: Node | None) -> tuple[dict[str, Setting], ModelRef | None]:
        known = grammar.STEPS[step]
        if node is None or empty(node):
            return {}, None
        bare = not isinstance(node, Table) or "value" in node.entries
        if len(known) == 1 or (known[0] == "density" and bare):
            return {known[0]: self._setting(known[0], node, node.where)}, None
        if not isinstance(node, Table):
            taken = " and ".join((", ".join(known[:-1]), known[-1]))
            raise refuse(node.where, f"the step {step!r} takes {taken}, not {said_kind(node)}", _shown(step))
        settings: dict[str, Setting] = {}
        statistics = None
        for name, (where, value) in node.entries.items():
            if name not in known:
                raise refuse(where, f"the step {step!r} has no parameter {name!r}", did_you_mean(name, known))
            if name == "statistics":
                statistics = self.read_model(value, Key("statistics", "model", ""))
            else:
                settings[name] = self._setting(name, value, where)
        return settings, statistics

    def read_model(self, node: Node, key: Key) -> ModelRef:
        """A model, or another file of tensors."""
        raise NotImplementedError

    # Single values

    def read_template(self, node: Node, key: Key) -> str:
        if not isinstance(node, Text):
            raise refuse(node.where, f"{key.name!r} must be text, not {said_kind(node)}")
        return node.text

    def read_word(self, node: Node, key: Key) -> str:
        text = self.read_template(node, key)
        if not text.strip():
            raise refuse(node.where, f"{key.name!r} is empty")
        return text

    def read_name(self, node: Node, key: Key) -> str:
        name = self.read_word(node, key)
        # A name may become a directory's name when an intermediate result is kept.
        if name.startswith(("/", "~")) or ".." in re.split(r"[/\\]", name):
            raise refuse(node.where, f"the name {name!r} looks like a path", "a name is a plain word")
        return name

    def read_choice(self, node: Node, key: Key) -> str:
        text = self.read_template(node, key)
        if text not in key.choices:
            raise refuse(node.where, f"{key.name!r} cannot be {text!r}", did_you_mean(text, key.choices))
        return text

    def read_dtype(self, node: Node, key: Key) -> str:
        from geomerge.checkpoint.dtypes import parse_dtype, recipe_name

        return recipe_name(parse_dtype(self.read_template(node, key), node.where))

    def read_flag(self, node: Node, key: Key) -> bool:
        value = node.value() if isinstance(node, Text) else None
        if not isinstance(value, bool):
            raise refuse(node.where, f"{key.name!r} must be true or false, not {said_kind(node)}")
        return value

    def read_number(self, node: Node, key: Key) -> float:
        value = node.value() if isinstance(node, Text) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse(node.where, f"{key.name!r} must be a number, not {said_kind(node)}")
        return value

    def _whole(self, node: Node, key: Key, least: int, most: int = 2**63 - 1) -> int:
        value = node.value() if isinstance(node, Text) else None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            bound = f"at most {most}" if isinstance(value, int) and value > most else f"at least {least}"
            raise refuse(node.where, f"{key.name!r} must be a whole number of {bound}, not {said_kind(node)}")
        return value

    def read_seed(self, node: Node, key: Key) -> int:
        return self._whole(node, key, 0)

    def read_id(self, node: Node, key: Key) -> int:
        return self._whole(node, key, 0)

    def read_positive(self, node: Node, key: Key) -> int:
        return self._whole(node, key, 1)


def _value(node: Node) -> Scalar | tuple[Scalar, ...]:
    """A scalar or a gradient; `ValueError` says what is wrong in words that follow the key's name."""
    if isinstance(node, Items):
        if not node.items:
            raise ValueError("is an empty list")
        return tuple(_scalar(item) for item in node.items)
    return _scalar(node)


def _scalar(node: Node) -> Scalar:
    value = node.value() if isinstance(node, Text) else None
    if value is None:
        raise ValueError(f"must be a value or a list of values, not {said_kind(node)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be finite, not {said_kind(node)}")
    return value


_NEEDED = {"scale": "value", "lines": "beta"}
"""What a step after the method cannot do without."""

_NAMED = {"value": "a value"}

_SHOWN = {
    "scale": "scale: 0.7",
    "lines": "lines: {alpha: 0.3, beta: 0.7}",
    "aim": "aim: {statistics: ./act.safetensors}",
    "svd_compress": "svd_compress: {energy: 0.9}",
}


def _shown(step: str) -> str | None:
    """A step as it may be written."""
    shown = _SHOWN.get(_plain(step))
    return None if shown is None else f"as in '- {shown}'"


def _step(item: Node) -> tuple[str, Where, Node | None]:
    """A step's name, its place, and its parameters."""
    if isinstance(item, Text):
        return item.text, item.where, None
    if isinstance(item, Table) and len(item.entries) == 1:
        ((name, (where, value)),) = item.entries.items()
        return name, where, value
    raise refuse(item.where, "a step is a mapping with one key, its name", "as in '- scale: 0.7'")


def _is_parameter(name: str) -> bool:
    """Whether a method has a parameter of this name."""
    from geomerge.methods import registry

    return any(name in method.parameters() for method in registry.all_methods().values())


def _beside(document: Table) -> tuple[str, ...]:
    """The parameters of the document's steps that a model may have values of its own for."""
    written = document.entries.get("steps", (None, None))[1]
    found = []
    for item in written.items if isinstance(written, Items) else ():
        name = item.text if isinstance(item, Text) else next(iter(item.entries), "") if isinstance(item, Table) else ""
        known = grammar.BEFORE.get(name, ())
        found += [f"{grammar.STEP_ALIASES.get(name, name)}.{p}" for p in known if p in grammar.BESIDE]
    return tuple(found)


def _elsewhere(name: str) -> str | None:
    """What a method is that recipes do not know, but `geomerge methods` does."""
    from geomerge.continual import RULES
    from geomerge.search.soup import GreedySoup

    step = name.removeprefix("step_")
    if step in grammar.STEPS:
        return f"it is a step: `steps: [{_SHOWN.get(_plain(step), f'{step}: 0.5')}]` beside a method"
    rule = name.removeprefix("continual_")
    if rule in RULES:
        return f"experts are merged by it one after the other: `geomerge continue STATE EXPERT --method {rule}`"
    return "a soup needs scores: `geomerge soup`" if name in (GreedySoup.name, *GreedySoup.aliases) else None


def _plain(step: str) -> str:
    return grammar.STEP_ALIASES.get(step, step)


def _meant(name: str, known: Sequence[str]) -> str | None:
    """The hint for an unknown parameter; one that a step has is written with the step's name."""
    owner, _, parameter = name.partition(".")
    if parameter in grammar.BESIDE and owner in grammar.BEFORE and f"{_plain(owner)}.{parameter}" not in known:
        return f"there is no step {owner!r} before the method: add `steps: [{{{owner}: …}}]`"
    step = next((k for k in known if k.endswith(f".{name}")), None)
    return f"the step's is written {step}" if step is not None else did_you_mean(name, known)


def items(node: Node, key: Key) -> tuple[Node, ...]:
    if not isinstance(node, Items):
        raise refuse(node.where, f"{key.name!r} must be a list, not {said_kind(node)}")
    if not node.items:
        raise refuse(node.where, f"{key.name!r} is empty")
    return node.items


def entries(node: Node, key: Key) -> Mapping[str, tuple[Where, Node]]:
    if not isinstance(node, Table):
        raise refuse(node.where, f"{key.name!r} must be a mapping, not {said_kind(node)}")
    return node.entries


def empty(node: Node) -> bool:
    return isinstance(node, Text) and node.empty


def refuse(where: Where, what: str, hint: str | None = None) -> RecipeError:
    return RecipeError(what, where=str(where), hint=hint)
