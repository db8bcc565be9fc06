"""The JSON schema: it agrees with the parser about what people write and about what is misspelt."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from geomerge.errors import RecipeError
from geomerge.methods import registry
from geomerge.recipe import json_schema, loads
from geomerge.recipe.document import plain, read_documents
from geomerge.recipe.grammar import MODULE, RECIPE, SLICE, Shape

EXAMPLES = {
    "linear": """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {weight: 1.0}
  - model: WizardLM/WizardLM-13B-V1.2
    parameters: {weight: 0.3}
merge_method: linear
dtype: float16
""",
    "gradient slerp": """\
slices:
  - sources:
      - {model: psmathur/orca_mini_v3_13b, layer_range: [0, 40]}
      - {model: garage-bAInd/Platypus2-13B, layer_range: [0, 40]}
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float16
""",
    "ties": """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: garage-bAInd/Platypus2-13B
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "passthrough": """\
slices:
  - sources: [{model: garage-bAInd/Platypus2-13B, layer_range: [0, 24]}]
  - sources: [{model: psmathur/orca_mini_v3_13b, layer_range: [20, 40]}]
merge_method: passthrough
dtype: float16
""",
    "modules": """\
modules:
  text_decoder: {models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]}
  vision_tower: {slices: [{sources: [{model: a, layer_range: [0, 24]}], parameters: {weight: 1}}]}
merge_method: linear
""",
    "tokenizer": """\
models: [{model: a}, {model: {model: {path: b, revision: r}, lora: {path: c}}}]
merge_method: della
base_model: base@main
parameters: {weight: 1, density: 0.7, epsilon: "1e-5", lambda: 1.1}
tokenizer:
  source: base
  pad_to_multiple_of: 64
  tokens:
    x: {source: {kind: model_token, model: a, token_id: 4}, force: true}
    y: {source: {kind: zero}}
    z: {source: a}
chat_template: chatml
out_dtype: torch.bfloat16
""",
    "additions": """\
name: mine
models: [{model: a}, {model: b}]
merge_method: soup
parameters: {weight: {role: attention, block: 3-7, filter: "*.q_proj.*", value: [0, 1]}}
steps: [{scale: 0.7}, {lines: {alpha: 0.1, beta: [{block: 3, value: 1}]}}, lines: {beta: 0.5}]
schedule: {attention: [0, 1]}
compat: mergekit
seed: 3
guardrails: warn
rounding: stochastic
extrapolate: true
unmatched: copy
dtype: bf16
base_model: null
""",
}

MISSPELT = {
    "key": ("linear", "dtype: float16", "dtpye: float16"),
    "method": ("linear", "merge_method: linear", "merge_method: lineer"),
    "parameter of a model": ("ties", "density: 0.33", "dnesity: 0.33"),
    "parameter of the recipe": ("ties", "normalize: true", "normalise: true"),
    "parameter of a slice": ("modules", "parameters: {weight: 1}", "parameters: {wieght: 1}"),
    "another method's parameter": ("gradient slerp", "  t:", "  density:"),
    "entry": ("ties", "{filter: mlp, value", "{fliter: mlp, value"),
    "role": ("additions", "role: attention", "role: atention"),
    "dtype": ("linear", "dtype: float16", "dtype: floot16"),
    "step": ("additions", "{scale: 0.7}", "{scael: 0.7}"),
    "range": ("passthrough", "[0, 24]", "[0, 24, 25]"),
    "two of three": ("passthrough", "slices:", "models: [{model: a}]\nslices:"),
    "none of three": ("modules", "modules:", "name: x\nschedule:"),
    "choice": ("additions", "unmatched: copy", "unmatched: drop"),
    "missing": ("linear", "  - model: WizardLM/WizardLM-13B-V1.2\n    parameters", "  - parameters"),
    "token": ("tokenizer", "kind: zero", "kind: zeros"),
}
# With mergekit's profile the parser only notes misspelt keys; the schema still marks them.
STRICT = {name: text.replace("compat: mergekit\n", "") for name, text in EXAMPLES.items()}


def data(text: str) -> Any:
    """The YAML as an editor's plugin sees it."""
    (document,) = read_documents(text, "r.yml")
    return json.loads(json.dumps(plain(document)))


@pytest.fixture(scope="module")
def validator() -> Any:
    """A validator, where the `jsonschema` package is installed."""
    if importlib.util.find_spec("jsonschema") is None:
        pytest.skip("jsonschema is not installed")
    import jsonschema

    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_recipes(name: str) -> None:
    """The parser takes every example (which the validator must take, too)."""
    assert loads(EXAMPLES[name]).output.method


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_validate(name: str, validator: Any) -> None:
    """The schema takes every example."""
    assert [error.message for error in validator.iter_errors(data(EXAMPLES[name]))] == []


@pytest.mark.parametrize("name", MISSPELT)
def test_misspelt_is_refused_by_the_parser(name: str) -> None:
    """Each slip is an error of the parser."""
    example, right, wrong = MISSPELT[name]
    assert right in STRICT[example]
    with pytest.raises(RecipeError):
        loads(STRICT[example].replace(right, wrong, 1))


@pytest.mark.parametrize("name", MISSPELT)
def test_misspelt_does_not_validate(name: str, validator: Any) -> None:
    """Each slip is an error of the schema."""
    example, right, wrong = MISSPELT[name]
    assert not validator.is_valid(data(STRICT[example].replace(right, wrong, 1)))


def references(node: Any) -> set[str]:
    """All `$ref` in a schema."""
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    return set().union(*(references(item) for item in node)) if isinstance(node, list) else set()


def test_structure_by_hand() -> None:
    """Without a validator: all references lead somewhere, all keys are described, and it is JSON."""
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(schema)) == schema
    assert references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}
    assert list(schema["properties"]) == list(RECIPE.names())
    assert schema["additionalProperties"] is False

    def same(found: dict[str, Any], shape: Shape) -> bool:
        described = all(prop["description"].endswith((".", "]")) for prop in found["properties"].values())
        return described and tuple(found["properties"]) == shape.names() and not found["additionalProperties"]

    assert same(schema, RECIPE)
    assert same(schema["$defs"]["slices"]["items"], SLICE)
    assert same(schema["$defs"]["modules"]["additionalProperties"], MODULE)


def test_methods_come_from_the_registry() -> None:
    """Every method and alias is a choice, and each method's parameters are described."""
    schema = json_schema()
    offered = {choice["const"] for choice in schema["properties"]["merge_method"]["oneOf"]}
    methods = registry.all_methods()
    assert offered == {word for name, method in methods.items() for word in (name, *method.aliases)}
    for name, method in methods.items():
        known = schema["$defs"][f"parameters-{name}"]
        assert set(method.parameters()) <= set(known["propertyNames"]["enum"])
        for parameter in method.parameters().values():
            assert known["properties"][parameter.name]["description"].startswith(parameter.doc.rstrip("."))
    assert "density" in schema["$defs"]["parameters-task_arithmetic"]["properties"]
