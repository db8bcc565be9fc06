"""The recipe's JSON schema (draft 2020-12), for editors: completion, descriptions, and red lines under misspelt keys.

Written from the tables that the parser reads by (`geomerge.recipe.grammar`) and from the registry of methods, so it
knows each method's parameters. It says what one document may hold; what a schema cannot say (equal lengths of layer
ranges, names across documents) is left to the parser.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from geomerge.recipe import grammar
from geomerge.recipe.grammar import Key, Shape
from geomerge.recipe.patterns import MAX_PATTERN

if TYPE_CHECKING:
    from geomerge.methods.base import Parameter

_Schema = dict[str, Any]


def json_schema() -> _Schema:
    """The schema of one recipe document."""
    methods = _methods()
    definitions = _definitions()
    recipe = _object(grammar.RECIPE)
    for name, inert, known, _ in methods:
        definitions[f"parameters-{name}"] = _parameters_of(known, inert)
    recipe["properties"]["merge_method"]["oneOf"] = [
        {"const": word, "description": title} for name, _, _, words in methods for word, title in words.items()
    ]
    recipe["allOf"] = [
        *(
            {
                "if": {"properties": {"merge_method": {"enum": list(words)}}, "required": ["merge_method"]},
                "then": _everywhere({"$ref": f"#/$defs/parameters-{name}"}),
            }
            for name, _, _, words in methods
        ),
        *(
            {"not": {"required": list(both)}}
            for both in (("tokenizer", "tokenizer_source"), ("tokens", "tokenizer"), ("tokens", "tokenizer_source"))
        ),
    ]
    recipe["oneOf"] = [{"required": [key]} for key in ("models", "slices", "modules")]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "geomerge recipe",
        "description": "How to merge trained neural networks. mergekit's YAML files are recipes, too.",
        **recipe,
        "$defs": definitions,
    }


def _methods() -> list[tuple[str, tuple[str, ...], Mapping[str, Parameter], dict[str, str]]]:
    """Name, inert parameters, parameters, and all names with what they mean, of each method."""
    from geomerge.methods import registry

    return [
        (
            name,
            (*grammar.INERT["*"], *grammar.INERT.get(name, ())),
            method.parameters(),
            {name: method.title, **dict.fromkeys(method.aliases, f"{method.title} (same as {name})")},
        )
        for name, method in registry.all_methods().items()
    ]


def _object(shape: Shape) -> _Schema:
    properties: dict[str, _Schema] = {}
    for key in shape.keys:
        properties[key.name] = {"description": key.doc, **_of_kind(key)}
    required = [key.name for key in shape.keys if key.required]
    schema: _Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def _of_kind(key: Key) -> _Schema:
    """The schema of a key's value. A key without a value counts as absent, so optional keys may be null."""
    if key.choices:
        # YAML reads a bare 'off' as false.
        words: list[Any] = [*key.choices, *([False] if "off" in key.choices else [])]
        return {"enum": words if key.required else [*words, None]}
    simple = _SIMPLE.get(key.kind)
    schema = dict(simple) if simple is not None else {"$ref": f"#/$defs/{key.kind}"}
    if key.required:
        return schema
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return schema | {"type": [*types, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


_TEXT: _Schema = {"type": ["string", "number"]}
_DTYPE = r"^(torch\.)?((bfloat|bf)16|(float|fp|f)(16|32|64)|half|float|double)$"
_SIMPLE: Mapping[str, _Schema] = {
    "word": _TEXT | {"minLength": 1},
    "name": _TEXT | {"minLength": 1},
    "template": {"type": "string"},
    "filter": {"type": ["string", "number"], "maxLength": 100 * MAX_PATTERN},
    "block": {"type": ["integer", "string"], "minimum": 0, "pattern": r"^\s*\d+\s*(-\s*\d+\s*)?$"},
    "flag": {"type": "boolean"},
    "number": {"type": "number"},
    "seed": {"type": "integer", "minimum": 0},
    "id": {"type": "integer", "minimum": 0},
    "positive": {"type": "integer", "minimum": 1},
    "schedule": {"type": ["string", "object"]},
}


def _list(items: _Schema) -> _Schema:
    return {"type": "array", "minItems": 1, "items": items}


def _definitions() -> dict[str, _Schema]:
    """The schemas of the kinds that are more than a simple value."""
    scalar: _Schema = {"type": ["number", "boolean", "string"]}
    entry = _object(grammar.ENTRY)
    setting: _Schema = {"anyOf": [{"$ref": "#/$defs/value"}, entry, _list(entry)]}
    text: _Schema = {
        "type": "string",
        "minLength": 1,
        "description": "path[@revision][:subfolder][+lora[@revision][:subfolder]]",
    }
    from geomerge.checkpoint.dtypes import MERGEABLE

    steps: list[_Schema] = []
    for name, parameters in grammar.STEPS.items():
        inner: _Schema = {
            "type": "object",
            "properties": {p: {"$ref": f"#/$defs/{'model' if p == 'statistics' else 'setting'}"} for p in parameters},
            "additionalProperties": False,
        }
        given = {"$ref": "#/$defs/setting"} if len(parameters) == 1 else inner
        if parameters[0] == "density":
            given = {"anyOf": [{"$ref": "#/$defs/setting"}, inner]}
        steps.append({"type": "object", "properties": {name: given}, "required": [name], "additionalProperties": False})
    return {
        "value": {"anyOf": [scalar, _list(scalar)], "description": "A value, or a list of values over the depth."},
        "setting": setting,
        "parameters": {"type": "object", "additionalProperties": {"$ref": "#/$defs/setting"}},
        "place": {"anyOf": [text, _object(grammar.PLACE)]},
        "model": {"anyOf": [text, _object(grammar.REFERENCE)]},
        "references": _list({"$ref": "#/$defs/model"}),
        "layer_range": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "minItems": 2,
            "maxItems": 2,
        },
        "models": _list(_object(grammar.MODEL)),
        "sources": _list(_object(grammar.SOURCE)),
        "slices": _list(_object(grammar.SLICE)),
        "modules": {"type": "object", "minProperties": 1, "additionalProperties": _object(grammar.MODULE)},
        "dtype": {"anyOf": [{"enum": list(MERGEABLE)}, {"type": "string", "pattern": _DTYPE}]},
        "tokenizer_source": {"anyOf": [{"enum": ["union", "base"]}, {"$ref": "#/$defs/model"}]},
        "tokenizer": _object(grammar.TOKENIZER),
        "vocabulary": {"anyOf": [{"enum": ["union", "base", "intersection"]}, {"$ref": "#/$defs/model"}]},
        "missing": {"anyOf": [{"enum": ["mean", "zero", "average", "omp"]}, {"type": "string", "pattern": "^copy:."}]},
        "tokens_policy": {"anyOf": [{"$ref": "#/$defs/vocabulary"}, _object(grammar.TOKENS)]},
        "align": {"anyOf": [{"enum": ["embedding", "residual"]}, _object(grammar.ALIGN)]},
        "components": {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"anyOf": [{"const": "merge"}, _object(grammar.COMPONENT)]},
        },
        "tokens": {"type": "object", "additionalProperties": _object(grammar.TOKEN)},
        "token_source": {"anyOf": [{"$ref": "#/$defs/model"}, _object(grammar.TOKEN_SOURCE)]},
        "steps": _list({"anyOf": [{"enum": list(grammar.BEFORE)}, *steps]}),
    }


def _parameters_of(known: Mapping[str, Parameter], inert: tuple[str, ...]) -> _Schema:
    """The names that a method's ``parameters`` may hold, each with what it means."""
    properties: dict[str, _Schema] = {
        name: {"description": "Accepted for mergekit's sake; no effect."} for name in inert
    }
    for name, parameter in known.items():
        told = [parameter.doc.rstrip(".")]
        if parameter.choices:
            told.append(f"one of {', '.join(parameter.choices)}")
        if parameter.within:
            told.append("in [{:g}, {:g}]".format(*parameter.within))
        told.append("required" if parameter.required else f"default {parameter.default}")
        properties[name] = {"description": "; ".join(told)}
    for step, parameters in grammar.BEFORE.items():
        for each in (p for p in parameters if p in grammar.BESIDE and step not in grammar.STEP_ALIASES):
            properties[f"{step}.{each}"] = {"description": f"Of the step {step} before the method."}
    return {"properties": properties, "propertyNames": {"enum": list(properties)}}


def _everywhere(parameters: _Schema) -> _Schema:
    """A schema that holds for every ``parameters`` of a recipe."""
    direct: _Schema = {"parameters": {"anyOf": [{"type": "null"}, parameters]}}
    models: _Schema = {"items": {"properties": direct}}
    slices: _Schema = {"items": {"properties": {**direct, "sources": models}}}
    inner: _Schema = {**direct, "models": models, "slices": slices}
    return {"properties": {**inner, "modules": {"additionalProperties": {"properties": inner}}}}
