"""Three tiny models with different vocabularies, and the tokenizer rules that bring them together."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import yaml
from recipes import Case
from tiny_models import GRID, SMALL, base, draw, llama_shapes, scale_of, write_model

SHARED = ["<s>", "</s>", "<unk>", "a", "b", "c", "d", "e", "ab", "cd"]
VOCABULARIES = {
    "base": SHARED,
    "a": [*SHARED, "<chat>", "<only-a>"],
    "b": [*SHARED[:3], "b", "a", "c", "d", "e", "ab", "cd", "<only-b>", "<chat>"],
    "padded": SHARED,
}
"""Token by id. `b` has two ids exchanged; `padded` has more rows than tokens."""

ROWS = {"base": 10, "a": 12, "b": 12, "padded": 16}


def write_tokenizer(at: Path, tokens: list[str]) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of a two-merge BPE."""
    special = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, token in enumerate(tokens) if token.startswith("<")]  # fmt: skip
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [["a", "b"], ["c", "d"]],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 32,
    }
    (at / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1) + "\n")
    (at / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def write_all(root: Path) -> None:
    """Write the ``v_*`` models: the same network with deltas, embedding rows following the tokens."""
    wide = base(llama_shapes(SMALL | {"vocab_size": 16}), "v")
    vocabulary_tensors = ("model.embed_tokens.weight", "lm_head.weight")
    for name, tokens in VOCABULARIES.items():
        weights = {}
        for tensor, start in wide.items():
            generator = draw("v" + name, tensor)
            size = 0.0 if name == "base" else 0.1
            delta = (generator.standard_normal(start.shape) * scale_of(tensor) * size / GRID).round() * GRID
            values = (start + delta).astype("float32")
            weights[tensor] = values[: ROWS[name]] if tensor in vocabulary_tensors else values
        write_model(root / f"v_{name}", SMALL | {"vocab_size": ROWS[name]}, weights)
        write_tokenizer(root / f"v_{name}", tokens)


LINEAR = """
    models:
      - {model: models/v_a, parameters: {weight: 1.0}}
      - {model: models/v_b, parameters: {weight: 0.5}}
    merge_method: linear
    base_model: models/v_base
    parameters: {weight: 0.25}
"""
TIES = """
    models:
      - {model: models/v_a, parameters: {weight: 1.0, density: 0.5}}
      - {model: models/v_b, parameters: {weight: 0.5, density: 0.5}}
    merge_method: ties
    base_model: models/v_base
"""
NO_BASE = """
    models:
      - {model: models/v_a, parameters: {weight: 1.0}}
      - {model: models/v_b, parameters: {weight: 0.5}}
    merge_method: linear
"""


def with_policy(name: str, recipe: str, policy: str, notes: str = "") -> Case:
    """A recipe followed by a tokenizer policy."""
    return Case(f"tokenizer/{name}", dedent(recipe).lstrip() + dedent(policy).lstrip(), notes, copy_tokenizer=True)


def rule(tokens: str, more: str = "") -> str:
    """A ``tokenizer:`` block with explicit tokens, written as YAML flow values."""
    return f"tokenizer: {{source: union, tokens: {{{tokens}}}{more}}}\n"


CASES = [
    with_policy("union", LINEAR, "tokenizer_source: union\n"),
    with_policy("base", LINEAR, "tokenizer_source: base\n"),
    with_policy("model", LINEAR, "tokenizer_source: models/v_b\n", "ids as in the second model"),
    with_policy("union_ties", TIES, "tokenizer_source: union\n"),
    with_policy("base_ties", TIES, "tokenizer_source: base\n"),
    with_policy("union_no_base", NO_BASE, "tokenizer_source: union\n"),
    with_policy("model_no_base", NO_BASE, "tokenizer_source: models/v_a\n"),
    with_policy("mapping_union", LINEAR, "tokenizer: {source: union}\n"),
    with_policy("from_model", LINEAR, rule("<chat>: {source: models/v_a}"), "only where a model lacks the token"),
    with_policy("from_model_forced", LINEAR, rule("<chat>: {source: models/v_a, force: true}")),
    with_policy("from_model_forced_ties", TIES, rule("<chat>: {source: models/v_b, force: true}")),
    with_policy(
        "from_model_token", LINEAR, rule("<chat>: {source: {kind: model_token, model: models/v_base, token: ab}}")
    ),
    with_policy("from_token_id", LINEAR, rule("<chat>: {source: {kind: model_token, model: models/v_b, token_id: 4}}")),
    with_policy(
        "from_token_id_forced",
        LINEAR,
        rule("<chat>: {source: {kind: model_token, model: models/v_b, token_id: 4}, force: true}"),
    ),
    with_policy("zero", LINEAR, rule("<chat>: {source: {kind: zero}}")),
    with_policy("zero_forced", LINEAR, rule("<chat>: {source: {kind: zero}, force: true}")),
    with_policy("zero_common_token", LINEAR, rule("ab: {source: {kind: zero}, force: true}")),
    with_policy("padded_to_8", LINEAR, "tokenizer: {source: union, pad_to_multiple_of: 8}\n", "pad rows"),
    with_policy(
        "extra_rows",
        LINEAR.replace("v_b,", "v_padded,"),
        "tokenizer_source: union\n",
        "one input has more rows than tokens: cut to the tokenizer's length",
    ),
    with_policy(
        "slerp_union",
        """
    models: [{model: models/v_a}, {model: models/v_b}]
    merge_method: slerp
    base_model: models/v_a
    parameters: {t: 0.5}
""",
        "tokenizer_source: union\n",
    ),
]


def read(folder: Path) -> list[str]:
    """The tokens of a written ``tokenizer.json`` by id."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = dict(tokenizer["model"]["vocab"]) | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    return sorted(ids, key=lambda token: ids[token])


def canonical(recipe: str) -> list[str]:
    """The tokens of the result by id: the source model's, or a union in the order base, then models as listed."""
    parsed = yaml.safe_load(recipe)
    source = parsed.get("tokenizer_source") or parsed["tokenizer"]["source"]
    listed = [parsed["base_model"]] if "base_model" in parsed else []
    listed += [entry["model"] for entry in parsed["models"]]
    sources = listed if source == "union" else [parsed["base_model"] if source == "base" else source]
    tokens: dict[str, None] = {}
    for model in sources:
        tokens |= dict.fromkeys(VOCABULARIES[model.removeprefix("models/v_")])
    return list(tokens)
