"""From YAML text to `Recipe` values: every key checked, every error with its file and line.

The tables of `geomerge.recipe.grammar` say which keys may stand where; a method ``read_<kind>`` reads each kind of
value. Unknown keys are refused. With ``compat: mergekit`` they become notes, as that tool ignores them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from geomerge.errors import RecipeError, UsageError, did_you_mean
from geomerge.recipe import grammar
from geomerge.recipe.document import Items, Node, Table, Text, plain, read_documents, read_text, said_kind
from geomerge.recipe.grammar import Key, Shape
from geomerge.recipe.patterns import classify
from geomerge.recipe.pipeline import in_order
from geomerge.recipe.references import expand_home, parse_reference
from geomerge.recipe.values import (
    AlignSpec,
    Component,
    Entry,
    Filter,
    ModelRef,
    Module,
    Parameters,
    Pipeline,
    Recipe,
    Scalar,
    Setting,
    Slice,
    Source,
    Step,
    TokenizerSpec,
    TokenRule,
    Where,
)

if TYPE_CHECKING:
    from geomerge.methods.base import Parameter

_BLOCKS = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")
_LAX = "mergekit ignores unknown keys; with 'compat: mergekit' they become warnings here"


def load(path: str | Path, *, compat: str | None = None) -> Pipeline:
    """Read a recipe file.

    Args:
        path: A YAML file; one document, or several that build on each other.
        compat: ``"mergekit"`` overrides what the file says about ``compat``.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or is not a recipe; the message has the line.
        UsageError: `compat` is not a profile.
    """
    return loads(read_text(Path(path), str(path)), str(path), compat=compat)


def loads(text: str, file: str = "<recipe>", *, compat: str | None = None) -> Pipeline:
    """Read a recipe from text. `file` is what messages call it; otherwise as `load`."""
    if compat not in (None, "mergekit"):
        raise UsageError(f"there is no profile {compat!r}", hint=did_you_mean(str(compat), ("mergekit",)))
    documents = read_documents(text, file)
    names = {
        node.text
        for document in documents
        if isinstance(node := document.entries.get("name", (None, None))[1], Text) and not node.empty
    }
    return in_order([_Reader(document, names, compat).recipe(text) for document in documents])


def method_parameters(name: str) -> Mapping[str, Parameter]:
    """The parameters of a merge method by their recipe names; raises `UsageError` for an unknown method."""
    from geomerge.methods import registry

    return registry.get(name).parameters()


class _Reader:
    """Reads one document."""

    def __init__(self, document: Table, names: Collection[str], compat: str | None) -> None:
        self.document, self.names = document, names
        self.notes: list[str] = []
        # The profile decides what happens to unknown keys, and the method which parameters there are: both come first.
        self.compat = compat
        keys = {key.name: key for key in grammar.RECIPE.keys}
        written = document.entries.get("compat")
        if compat is None and written is not None and not _empty(written[1]):
            self.compat = self.read_choice(written[1], keys["compat"])
        method = document.entries.get("merge_method")
        self.method, self.known = "", cast("Mapping[str, Parameter]", {})
        if method is not None and not _empty(method[1]):
            self.method = self.read_word(method[1], keys["merge_method"])
            try:
                self.known = method_parameters(self.method)
            except UsageError as error:
                raise RecipeError(error.what, where=str(method[1].where), hint=error.hint) from None

    def recipe(self, text: str) -> Recipe:
        """The document's recipe; `text` is stored in it."""
        where = self.document.where
        found = self._table(self.document, grammar.RECIPE)
        modules = found.pop("modules", None)
        if modules is None:
            modules = self._one_module(None, found, where, "'models', 'slices' and 'modules'")
        elif "models" in found or "slices" in found:
            raise _refuse(where, "a recipe has exactly one of 'models', 'slices' and 'modules'")
        if "components" in found and (len(modules) > 1 or "models" not in found):
            at = self.document.entries["components"][0]
            raise _refuse(at, "'components' goes with 'models': slices and modules say themselves what is taken", None)
        for key in ("models", "slices"):
            found.pop(key, None)
        source = found.pop("tokenizer_source", None)
        if source is not None:
            at = self.document.entries["tokenizer_source"][0]
            if "tokenizer" in found:
                raise _refuse(at, "'tokenizer_source' and 'tokenizer' exclude each other", "keep one of them")
            found["tokenizer"] = TokenizerSpec(source, where=at)
        policy = found.pop("tokens", None)
        if policy is not None:
            if "tokenizer" in found:
                at = self.document.entries["tokens"][0]
                raise _refuse(at, "'tokens' excludes 'tokenizer' and 'tokenizer_source'", "keep one of them")
            found["tokenizer"], template = policy
            if template is not None and "chat_template" in found:
                at = self.document.entries["chat_template"][0]
                raise _refuse(at, "'chat_template' is given twice, also within 'tokens'", "keep one of them")
            if template is not None:
                found["chat_template"] = template
        found["compat"] = self.compat
        return Recipe(
            name=found.pop("name", None),
            method=found.pop("merge_method"),
            modules=modules,
            text=text,
            where=where,
            notes=tuple(self.notes),
            lines={key: at for key, (at, _) in self.document.entries.items()},
            **found,
        )

    # Mappings with fixed keys

    def _table(self, node: Node, shape: Shape) -> dict[str, Any]:
        """The values of a mapping by key; keys without a value count as absent."""
        if not isinstance(node, Table):
            names = ", ".join(shape.names()[:4])
            raise _refuse(
                node.where, f"{shape.title} must be a mapping, not {said_kind(node)}", f"with the keys {names}"
            )
        keys = {key.name: key for key in shape.keys}
        found: dict[str, Any] = {}
        for name, (where, value) in node.entries.items():
            key = keys.get(name)
            if key is None:
                hint = grammar.UNIMPLEMENTED.get(name)
                self._unknown(f"{shape.title} has no key {name!r}", where, hint or did_you_mean(name, keys))
            elif not _empty(value):
                found[name] = getattr(self, f"read_{key.kind}")(value, key)
        for key in shape.keys:
            if key.required and key.name not in found:
                raise _refuse(node.where, f"{shape.title} needs {key.name!r}", key.hint)
        return found

    def _unknown(self, what: str, where: Where, hint: str | None) -> None:
        if self.compat != "mergekit":
            raise _refuse(where, what, f"{hint}\n  {_LAX}" if hint else _LAX)
        self._note(where, f"{what}; it is ignored" + (f" ({hint})" if hint else ""))

    def _note(self, where: Where, what: str) -> None:
        self.notes.append(f"{where}: {what}")

    # Models, slices, modules

    def _one_module(self, name: str | None, found: Mapping[str, Any], where: Where, of: str) -> tuple[Module, ...]:
        sources, slices = found.get("models"), found.get("slices")
        if (sources is None) == (slices is None):
            whose = "a recipe" if name is None else f"the module {name!r}"
            raise _refuse(where, f"{whose} has exactly one of {of}", "'models: [{model: path}, …]' takes whole models")
        if sources is not None:
            slices = (Slice(sources, where=sources[0].where),)
        # At the top level the recipe's own parameters are the outermost scope already.
        parameters = found.get("parameters", {}) if name is not None else {}
        return (Module(name, cast("tuple[Slice, ...]", slices), parameters, where),)

    def read_models(self, node: Node, key: Key) -> tuple[Source, ...]:
        return tuple(self._source(item, grammar.MODEL) for item in _items(node, key))

    def read_sources(self, node: Node, key: Key) -> tuple[Source, ...]:
        sources = tuple(self._source(item, grammar.SOURCE) for item in _items(node, key))
        lengths = [(s.layer_range[1] - s.layer_range[0], s) for s in sources if s.layer_range]
        for length, source in lengths:
            if length != lengths[0][0]:
                raise _refuse(
                    source.where,
                    f"the sources of a slice have {lengths[0][0]} and {length} blocks",
                    "their layer ranges must have the same length; ranges are half open: [0, 8] has 8 blocks",
                )
        return sources

    def _source(self, node: Node, shape: Shape) -> Source:
        found = self._table(node, shape)
        parameters: Parameters = found.get("parameters", {})
        for name, setting in parameters.items():
            if name in self.known and not self.known[name].per_model:
                self._note(setting.where, f"{name!r} is one value for all models and has no effect beside one of them")
        return Source(found["model"], found.get("layer_range"), parameters, node.where)

    def read_slices(self, node: Node, key: Key) -> tuple[Slice, ...]:
        slices = []
        for item in _items(node, key):
            found = self._table(item, grammar.SLICE)
            if "residual_weight" in found:
                self._note(item.where, "'residual_weight' has no effect")
            slices.append(Slice(found["sources"], found.get("base_model"), found.get("parameters", {}), item.where))
        return tuple(slices)

    def read_modules(self, node: Node, key: Key) -> tuple[Module, ...]:
        modules: list[Module] = []
        if isinstance(node, Table) and not node.entries:
            raise _refuse(node.where, "'modules' is empty")
        for name, (where, value) in _entries(node, key).items():
            modules += self._one_module(name, self._table(value, grammar.MODULE), where, "'models' and 'slices'")
        return tuple(modules)

    def read_model(self, node: Node, _: Key) -> ModelRef:
        if isinstance(node, Text):
            return parse_reference(node.text, node.where, self.names)
        found = self._table(node, grammar.REFERENCE)
        if "override_architecture" in found:
            self._note(node.where, "'override_architecture' has no effect: models are read by their tensors' names")
        model: ModelRef = found["model"]
        return ModelRef(model.path, model.revision, found.get("lora"), model.subfolder)

    def read_references(self, node: Node, key: Key) -> tuple[ModelRef, ...]:
        return tuple(self.read_model(item, key) for item in _items(node, key))

    def read_place(self, node: Node, _: Key) -> ModelRef:
        if isinstance(node, Text):
            return parse_reference(node.text, node.where, self.names)
        found = self._table(node, grammar.PLACE)
        return ModelRef(expand_home(found["path"]), found.get("revision"), subfolder=found.get("subfolder"))

    def read_layer_range(self, node: Node, key: Key) -> tuple[int, int]:
        ends = [item.value() if isinstance(item, Text) else None for item in _items(node, key)]
        if len(ends) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
            raise _refuse(node.where, "'layer_range' must be two whole numbers", "as in [0, 16]: blocks 0 to 15")
        first, last = cast("list[int]", ends)
        if first > last:
            raise _refuse(node.where, f"'layer_range' [{first}, {last}] ends before it starts", "as in [0, 16]")
        return first, last

    # Parameters

    def read_parameters(self, node: Node, key: Key) -> dict[str, Setting]:
        settings = {}
        inert = (*grammar.INERT["*"], *grammar.INERT.get(self.method, ()))
        for name, (where, value) in _entries(node, key).items():
            if name in self.known:
                settings[name] = self._setting(name, value, where)
            elif name in inert:
                self._setting(name, value, where)
                self._note(where, f"the parameter {name!r} has no effect")
            elif self.method:
                self._unknown(f"{self.method} has no parameter {name!r}", where, did_you_mean(name, self.known))
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
            raise _refuse(node.where, f"the parameter {name!r} {error}") from None

    def _entry(self, node: Node) -> Entry:
        found = self._table(node, grammar.ENTRY)
        name, kind = found.get("filter", (None, "substring"))
        chosen = Filter(name, found.get("role"), found.get("block"), kind, found.get("component"))
        return Entry(None if chosen == Filter() else chosen, found["value"], node.where)

    def read_value(self, node: Node, _: Key) -> Scalar | tuple[Scalar, ...]:
        try:
            return _value(node)
        except ValueError as error:
            raise _refuse(node.where, f"'value' {error}") from None

    def read_filter(self, node: Node, key: Key) -> tuple[str, str]:
        try:
            return classify(self.read_template(node, key))
        except ValueError as error:
            raise _refuse(node.where, str(error), "a plain piece of the tensor's name is a filter, too") from None

    def read_role(self, node: Node, key: Key) -> str:
        return self.read_choice(node, key)

    def read_block(self, node: Node, _: Key) -> tuple[int, int]:
        match = _BLOCKS.fullmatch(node.text) if isinstance(node, Text) else None
        if match is None:
            raise _refuse(node.where, f"'block' must be a number or a range, not {said_kind(node)}", "as in 3 or 3-7")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise _refuse(node.where, f"the block range {first}-{last} ends before it starts", f"write {last}-{first}")
        return first, last

    def read_steps(self, node: Node, key: Key) -> tuple[Step, ...]:
        steps = []
        for item in _items(node, key):
            if isinstance(item, Text):
                name, where, value = item.text, item.where, None
            elif isinstance(item, Table) and len(item.entries) == 1:
                ((name, (where, value)),) = item.entries.items()
            else:
                raise _refuse(item.where, "a step is a mapping with one key, its name", "as in '- scale: 0.7'")
            if name not in grammar.STEPS:
                raise _refuse(where, f"there is no step {name!r}", did_you_mean(name, grammar.STEPS))
            steps.append(Step(name, self._step_parameters(name, value), where))
        return tuple(steps)

    def _step_parameters(self, step: str, node: Node | None) -> dict[str, Setting]:
        known = grammar.STEPS[step]
        if node is None or _empty(node):
            return {}
        if len(known) == 1:
            return {known[0]: self._setting(known[0], node, node.where)}
        if not isinstance(node, Table):
            raise _refuse(node.where, f"the step {step!r} takes {' and '.join(known)}, not {said_kind(node)}")
        settings = {}
        for name, (where, value) in node.entries.items():
            if name not in known:
                raise _refuse(where, f"the step {step!r} has no parameter {name!r}", did_you_mean(name, known))
            settings[name] = self._setting(name, value, where)
        return settings

    def read_schedule(self, node: Node, _: Key) -> Mapping[str, Any] | str:
        if isinstance(node, Text):
            return node.text
        if isinstance(node, Table):
            return cast("dict[str, Any]", plain(node))
        raise _refuse(node.where, "'schedule' must be a preset's name or a mapping, not a list")

    # Tokenizer

    def read_tokenizer_source(self, node: Node, key: Key) -> Literal["union", "base"] | ModelRef:
        if isinstance(node, Text) and node.text in ("union", "base"):
            return cast('Literal["union", "base"]', node.text)
        return self.read_model(node, key)

    def read_tokenizer(self, node: Node, _: Key) -> TokenizerSpec:
        found = self._table(node, grammar.TOKENIZER)
        return TokenizerSpec(
            found.get("source", "union"), found.get("tokens", ()), found.get("pad_to_multiple_of"), node.where
        )

    def read_tokens_policy(self, node: Node, key: Key) -> tuple[TokenizerSpec, str | None]:
        """The policy, and the chat template that it names."""
        if isinstance(node, Text):
            return TokenizerSpec(self.read_vocabulary(node, key), where=node.where), None
        found = self._table(node, grammar.TOKENS)
        missing = found.get("missing", "default")
        if "sparsity" in found and missing != "omp":
            at = cast("Table", node).entries["sparsity"][0]
            raise _refuse(at, "'sparsity' is for `missing: omp`", "remove it, or add `missing: omp`")
        spec = TokenizerSpec(
            found["policy"],
            found.get("rules", ()),
            found.get("pad_to"),
            node.where,
            missing,
            found.get("sparsity", 64),
        )
        return spec, found.get("chat_template")

    def read_vocabulary(self, node: Node, key: Key) -> Literal["union", "base", "intersection"] | ModelRef:
        if isinstance(node, Text) and node.text == "intersection":
            return "intersection"
        return self.read_tokenizer_source(_after(node, "model:"), key)

    def read_missing(self, node: Node, key: Key) -> Literal["mean", "zero", "average", "omp"] | ModelRef:
        if isinstance(node, Text) and node.text in ("mean", "zero", "average", "omp"):
            return cast('Literal["mean", "zero", "average", "omp"]', node.text)
        if isinstance(node, Text) and node.text.startswith("copy:"):
            return self.read_model(_after(node, "copy:"), key)
        raise _refuse(node.where, "'missing' is mean, zero, average, omp or copy:<model>", None)

    def read_align(self, node: Node, key: Key) -> AlignSpec:
        if isinstance(node, Text):
            scope = next(k for k in grammar.ALIGN.keys if k.name == "scope")
            return AlignSpec(cast('Literal["embedding", "residual"]', self.read_choice(node, scope)), where=node.where)
        return AlignSpec(**self._table(node, grammar.ALIGN), where=node.where)

    def read_components(self, node: Node, key: Key) -> dict[str, Component]:
        rules = {}
        for name, (where, value) in _entries(node, key).items():
            if isinstance(value, Table):
                rules[name] = Component(self._table(value, grammar.COMPONENT)["copy"], where)
            elif isinstance(value, Text) and value.text == "merge":
                rules[name] = Component(None, where)
            else:
                raise _refuse(where, f"the component {name!r} is either 'merge' or '{{copy: model}}'")
        if not rules:
            raise _refuse(node.where, "'components' is empty")
        return rules

    def read_tokens(self, node: Node, key: Key) -> tuple[TokenRule, ...]:
        rules = []
        for token, (where, value) in _entries(node, key).items():
            found = self._table(value, grammar.TOKEN)
            if "source" in found:
                rules.append(TokenRule(token, force=found.get("force", False), where=where, **found["source"]))
            else:
                self._note(where, f"the rule for the token {token!r} names no source and has no effect")
        return tuple(rules)

    def read_token_source(self, node: Node, key: Key) -> dict[str, Any]:
        """The fields of a `TokenRule` that tell its source."""
        if not isinstance(node, Table) or "kind" not in node.entries:
            return {"kind": "model", "model": self.read_model(node, key)}
        found = self._table(node, grammar.TOKEN_SOURCE)
        if found["kind"] == "zero":
            if len(found) > 1:
                raise _refuse(node.where, "a token's source of the kind 'zero' takes nothing else")
            return {"kind": "zero"}
        if "model" not in found or ("token" in found) == ("token_id" in found):
            raise _refuse(
                node.where,
                "a token's source of the kind 'model_token' needs 'model' and either 'token' or 'token_id'",
            )
        return {
            "kind": "model_token",
            "model": found["model"],
            "source_token": found.get("token"),
            "source_token_id": found.get("token_id"),
        }

    # Single values

    def read_template(self, node: Node, key: Key) -> str:
        if not isinstance(node, Text):
            raise _refuse(node.where, f"{key.name!r} must be text, not {said_kind(node)}")
        return node.text

    def read_word(self, node: Node, key: Key) -> str:
        text = self.read_template(node, key)
        if not text.strip():
            raise _refuse(node.where, f"{key.name!r} is empty")
        return text

    def read_name(self, node: Node, key: Key) -> str:
        name = self.read_word(node, key)
        # A name may become a directory's name when an intermediate result is kept.
        if name.startswith(("/", "~")) or ".." in re.split(r"[/\\]", name):
            raise _refuse(node.where, f"the name {name!r} looks like a path", "a name is a plain word")
        return name

    def read_choice(self, node: Node, key: Key) -> str:
        text = self.read_template(node, key)
        if text not in key.choices:
            raise _refuse(node.where, f"{key.name!r} cannot be {text!r}", did_you_mean(text, key.choices))
        return text

    def read_dtype(self, node: Node, key: Key) -> str:
        from geomerge.checkpoint.dtypes import parse_dtype, recipe_name

        return recipe_name(parse_dtype(self.read_template(node, key), node.where))

    def read_flag(self, node: Node, key: Key) -> bool:
        value = node.value() if isinstance(node, Text) else None
        if not isinstance(value, bool):
            raise _refuse(node.where, f"{key.name!r} must be true or false, not {said_kind(node)}")
        return value

    def read_number(self, node: Node, key: Key) -> float:
        value = node.value() if isinstance(node, Text) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refuse(node.where, f"{key.name!r} must be a number, not {said_kind(node)}")
        return value

    def _whole(self, node: Node, key: Key, least: int, most: int = 2**63 - 1) -> int:
        value = node.value() if isinstance(node, Text) else None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _refuse(node.where, f"{key.name!r} must be a whole number of at least {least}, not {said_kind(node)}")
        return value

    def read_seed(self, node: Node, key: Key) -> int:
        return self._whole(node, key, 0)

    def read_id(self, node: Node, key: Key) -> int:
        return self._whole(node, key, 0)

    def read_positive(self, node: Node, key: Key) -> int:
        return self._whole(node, key, 1)


def _after(node: Node, prefix: str) -> Node:
    """A text without its prefix."""
    if isinstance(node, Text) and node.text.startswith(prefix):
        return replace(node, text=node.text.removeprefix(prefix).strip())
    return node


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


def _items(node: Node, key: Key) -> tuple[Node, ...]:
    if not isinstance(node, Items):
        raise _refuse(node.where, f"{key.name!r} must be a list, not {said_kind(node)}")
    if not node.items:
        raise _refuse(node.where, f"{key.name!r} is empty")
    return node.items


def _entries(node: Node, key: Key) -> Mapping[str, tuple[Where, Node]]:
    if not isinstance(node, Table):
        raise _refuse(node.where, f"{key.name!r} must be a mapping, not {said_kind(node)}")
    return node.entries


def _empty(node: Node) -> bool:
    return isinstance(node, Text) and node.empty


def _refuse(where: Where, what: str, hint: str | None = None) -> RecipeError:
    return RecipeError(what, where=str(where), hint=hint)
