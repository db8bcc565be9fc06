"""From YAML text to `Recipe` values: every key checked, every error with its file and line.

The tables of `geomerge.recipe.grammar` say which keys may stand where; a method ``read_<kind>`` reads each kind of
value. Unknown keys are refused. With ``compat: mergekit`` they become notes, as that tool ignores them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from geomerge.errors import UsageError, did_you_mean, together
from geomerge.recipe import grammar
from geomerge.recipe.document import Node, Table, Text, plain, read_documents, read_text, said_kind
from geomerge.recipe.grammar import Key, Shape
from geomerge.recipe.pipeline import in_order
from geomerge.recipe.references import expand_home, parse_reference
from geomerge.recipe.settings import Abandoned, Reader, entries, items, refuse
from geomerge.recipe.values import (
    AlignSpec,
    Component,
    ModelRef,
    Module,
    Parameters,
    Pipeline,
    Recipe,
    Slice,
    Source,
    TokenizerSpec,
    TokenRule,
    Where,
)


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


class _Reader(Reader):
    """Reads one document."""

    def __init__(self, document: Table, names: Collection[str], compat: str | None) -> None:
        super().__init__(document, compat)
        self.names = names

    def recipe(self, text: str) -> Recipe:
        """The document's recipe; `text` is stored in it."""
        where = self.document.where
        try:
            found = self._table(self.document, grammar.RECIPE)
        except Abandoned:
            found = {}
        if self.problems:
            raise together(self.problems)
        modules = found.pop("modules", None)
        if modules is None:
            modules = self._one_module(None, found, where, "'models', 'slices' and 'modules'")
        elif "models" in found or "slices" in found:
            raise refuse(where, "a recipe has exactly one of 'models', 'slices' and 'modules'")
        if "components" in found and (len(modules) > 1 or "models" not in found):
            at = self.document.entries["components"][0]
            raise refuse(at, "'components' goes with 'models': slices and modules say themselves what is taken", None)
        for key in ("models", "slices"):
            found.pop(key, None)
        source = found.pop("tokenizer_source", None)
        if source is not None:
            at = self.document.entries["tokenizer_source"][0]
            if "tokenizer" in found:
                raise refuse(at, "'tokenizer_source' and 'tokenizer' exclude each other", "keep one of them")
            found["tokenizer"] = TokenizerSpec(source, where=at)
        policy = found.pop("tokens", None)
        if policy is not None:
            if "tokenizer" in found:
                at = self.document.entries["tokens"][0]
                raise refuse(at, "'tokens' excludes 'tokenizer' and 'tokenizer_source'", "keep one of them")
            found["tokenizer"], template = policy
            if template is not None and "chat_template" in found:
                at = self.document.entries["chat_template"][0]
                raise refuse(at, "'chat_template' is given twice, also within 'tokens'", "keep one of them")
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

    # Models, slices, modules

    def _one_module(self, name: str | None, found: Mapping[str, Any], where: Where, of: str) -> tuple[Module, ...]:
        sources, slices = found.get("models"), found.get("slices")
        if (sources is None) == (slices is None):
            whose = "a recipe" if name is None else f"the module {name!r}"
            raise refuse(where, f"{whose} has exactly one of {of}", "'models: [{model: path}, …]' takes whole models")
        if sources is not None:
            slices = (Slice(sources, where=sources[0].where),)
        # At the top level the recipe's own parameters are the outermost scope already.
        parameters = found.get("parameters", {}) if name is not None else {}
        return (Module(name, cast("tuple[Slice, ...]", slices), parameters, where),)

    def read_models(self, node: Node, key: Key) -> tuple[Source, ...]:
        sources = self.each(items(node, key), lambda item: self._source(item, grammar.MODEL))
        for k, source in enumerate(sources):
            if any(source.model == before.model for before in sources[:k]):
                self._note(source.where, f"{source.model} is given twice, and counts twice")
        return sources

    def read_sources(self, node: Node, key: Key) -> tuple[Source, ...]:
        sources = self.each(items(node, key), lambda item: self._source(item, grammar.SOURCE))
        lengths = [(s.layer_range[1] - s.layer_range[0], s) for s in sources if s.layer_range]
        for length, source in lengths:
            if length != lengths[0][0]:
                raise refuse(
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
                what = f"{name!r} is one value for all models and has no effect beside one of them"
                if self.compat != "mergekit":
                    raise refuse(setting.where, what, "move it to the recipe's own `parameters`")
                self._note(setting.where, what)
        return Source(found["model"], found.get("layer_range"), parameters, node.where)

    def read_slices(self, node: Node, key: Key) -> tuple[Slice, ...]:
        slices = []
        for item in items(node, key):
            found = self._table(item, grammar.SLICE)
            if "residual_weight" in found:
                self._note(item.where, "'residual_weight' has no effect")
            slices.append(Slice(found["sources"], found.get("base_model"), found.get("parameters", {}), item.where))
        return tuple(slices)

    def read_modules(self, node: Node, key: Key) -> tuple[Module, ...]:
        modules: list[Module] = []
        if isinstance(node, Table) and not node.entries:
            raise refuse(node.where, "'modules' is empty")
        for name, (where, value) in entries(node, key).items():
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
        return tuple(self.read_model(item, key) for item in items(node, key))

    def read_place(self, node: Node, _: Key) -> ModelRef:
        if isinstance(node, Text):
            return parse_reference(node.text, node.where, self.names)
        found = self._table(node, grammar.PLACE)
        return ModelRef(expand_home(found["path"]), found.get("revision"), subfolder=found.get("subfolder"))

    def read_layer_range(self, node: Node, key: Key) -> tuple[int, int]:
        ends = [item.value() if isinstance(item, Text) else None for item in items(node, key)]
        if len(ends) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
            raise refuse(node.where, "'layer_range' must be two whole numbers", "as in [0, 16]: blocks 0 to 15")
        first, last = cast("list[int]", ends)
        if first > last:
            raise refuse(node.where, f"'layer_range' [{first}, {last}] ends before it starts", "as in [0, 16]")
        return first, last

    def read_schedule(self, node: Node, _: Key) -> Mapping[str, Any] | str:
        if isinstance(node, Text):
            return node.text
        if isinstance(node, Table):
            return cast("dict[str, Any]", plain(node))
        raise refuse(node.where, "'schedule' must be a preset's name or a mapping, not a list")

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
            raise refuse(at, "'sparsity' is for `missing: omp`", "remove it, or add `missing: omp`")
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
        suggestion = did_you_mean(node.text, ("mean", "zero", "average", "omp")) if isinstance(node, Text) else None
        raise refuse(node.where, "'missing' is mean, zero, average, omp or copy:<model>", suggestion)

    def read_align(self, node: Node, key: Key) -> AlignSpec:
        if isinstance(node, Text):
            scope = next(k for k in grammar.ALIGN.keys if k.name == "scope")
            return AlignSpec(cast('Literal["embedding", "residual"]', self.read_choice(node, scope)), where=node.where)
        return AlignSpec(**self._table(node, grammar.ALIGN), where=node.where)

    def read_components(self, node: Node, key: Key) -> dict[str, Component]:
        rules = {}
        for name, (where, value) in entries(node, key).items():
            if isinstance(value, Table):
                rules[name] = Component(self._table(value, grammar.COMPONENT)["copy"], where)
            elif isinstance(value, Text) and value.text == "merge":
                rules[name] = Component(None, where)
            else:
                said = value.text if isinstance(value, Text) and value.text not in ("copy", "keep") else "MODEL"
                raise refuse(
                    where,
                    f"the component {name!r} is either merged or copied from a model, not {said_kind(value)}",
                    f"write '{name}: merge' or '{name}: {{copy: {said or 'MODEL'}}}'",
                )
        if not rules:
            raise refuse(node.where, "'components' is empty")
        return rules

    def read_tokens(self, node: Node, key: Key) -> tuple[TokenRule, ...]:
        rules = []
        for token, (where, value) in entries(node, key).items():
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
                raise refuse(node.where, "a token's source of the kind 'zero' takes nothing else")
            return {"kind": "zero"}
        if "model" not in found or ("token" in found) == ("token_id" in found):
            raise refuse(
                node.where,
                "a token's source of the kind 'model_token' needs 'model' and either 'token' or 'token_id'",
            )
        return {
            "kind": "model_token",
            "model": found["model"],
            "source_token": found.get("token"),
            "source_token_id": found.get("token_id"),
        }


def _after(node: Node, prefix: str) -> Node:
    """A text without its prefix."""
    if isinstance(node, Text) and node.text.startswith(prefix):
        return replace(node, text=node.text.removeprefix(prefix).strip())
    return node
