"""What differs between two models beside their weights' values, in words, and what to do about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from geomerge.checkpoint.dtypes import recipe_name
from geomerge.engine.models import Model

if TYPE_CHECKING:
    from geomerge.diagnose.parents import Parents
    from geomerge.diagnose.tokens import TokenComparison

Severity = Literal["note", "warning", "blocking"]

_IGNORED = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "architectures",
        "auto_map",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "vocab_size",
        "tie_word_embeddings",
        "quantization_config",
        "compression_config",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "_attn_implementation",
        "attn_implementation",
    }
)
_NAMED: dict[str, tuple[Severity, str, str]] = {
    "model_type": (
        "warning",
        "the model types",
        "the tensors have the same names and shapes, but another program computes with them: check that the output answers",
    ),
    "hidden_act": (
        "warning",
        "the activation functions",
        "the same MLP weights mean something else: expect a worse merge than the angles say, and score it",
    ),
    "num_attention_heads": (
        "blocking",
        "the numbers of attention heads",
        "the same matrices are cut into other heads: their rows do not correspond, so do not merge them",
    ),
    "num_key_value_heads": (
        "blocking",
        "the numbers of key and value heads",
        "the same matrices are cut into other heads: their rows do not correspond, so do not merge them",
    ),
    "head_dim": (
        "blocking",
        "the widths of the attention heads",
        "the same matrices are cut into other heads: their rows do not correspond, so do not merge them",
    ),
    "norm_eps": (
        "note",
        "the epsilons of the normalisations",
        "the output gets the first model's; the difference is small unless activations are",
    ),
    "rope": (
        "warning",
        "the rotary position embeddings",
        "queries and keys are turned by other angles: the output gets the first model's, so put the longer context first",
    ),
    "max_position_embeddings": (
        "note",
        "the context lengths",
        "the output gets the first model's: put the one with the longer context first, or edit config.json",
    ),
    "sliding_window": ("note", "the attention windows", "the output gets the first model's"),
    "attention_bias": ("warning", "the attention biases", "the output's config is the first model's: check it loads"),
}
_ALIASES = {
    "rms_norm_eps": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "layer_norm_epsilon": "norm_eps",
    "layernorm_epsilon": "norm_eps",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        severity: ``note``; ``warning``: it may hurt the merge; ``blocking``: the models must not be merged.
        subject: What it is about: a key of the config, ``dtype``, ``tokenizer``, …
        what: In words, with both values.
        advice: What to do.
    """

    severity: Severity
    subject: str
    what: str
    advice: str

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {"severity": self.severity, "subject": self.subject, "what": self.what, "advice": self.advice}


def differences(parents: Parents, a: int, b: int, tokens: TokenComparison) -> list[Difference]:
    """All differences of two of the models, the worst first."""
    one, other = parents.models[a], parents.models[b]
    names = parents.names[a], parents.names[b]
    found = [
        *config_differences(one, other, names),
        *_dtypes(one, other, names),
        *_vocabulary(one, other, names, tokens),
        *_tied(one, other, names),
        *_lacking(parents, names),
        *_quantised(one, other, names),
    ]
    order = {"blocking": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda d: order[d.severity])


def config_differences(a: Model, b: Model, names: tuple[str, str]) -> list[Difference]:
    """What the configurations of two models say differently of the network."""
    here, there = _plain(a.config), _plain(b.config)
    if not here or not there:
        if bool(here) == bool(there):
            return []
        without = names[0] if not here else names[1]
        advice = "its architecture is known from tensor names only: copy the config.json that belongs to it"
        return [Difference("note", "config", f"{without} has no config.json", advice)]
    made = []
    for key in sorted(here.keys() | there.keys()):
        x, y = here.get(key), there.get(key)
        if x == y or (key not in _NAMED and (key not in here or key not in there)):
            continue
        said = f"{_value(x)} in {names[0]}, {_value(y)} in {names[1]}"
        if key in _TOKEN_IDS:
            advice = "the output gets the first model's: a wrong end token makes answers run on"
            made.append(Difference("note", key, f"the config's {key} differs: {said}", advice))
        elif key.rpartition(".")[2] in _NAMED:
            severity, subject, advice = _NAMED[key.rpartition(".")[2]]
            if x is None or y is None:
                # Absent means the library's default, which may well be the other one's value.
                severity = "note"
            made.append(Difference(severity, key, f"{subject} differ: {said}", advice))
        else:
            advice = "the output gets the first model's config"
            made.append(Difference("note", key, f"the config's {key} differs: {said}", advice))
    return made


def _plain(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """A config as flat keys under one spelling, without what says nothing about the network."""
    found: dict[str, Any] = {}

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        rope = _rope(values)
        if rope is not None:
            found[f"{prefix}rope"] = rope
        for key, value in values.items():
            name = _ALIASES.get(key, key)
            if key in _IGNORED or (isinstance(value, list) and len(value) > 16):
                continue
            if isinstance(value, dict):
                if key.endswith("_config"):
                    walk(f"{prefix}{key}.", value)
                continue
            found[prefix + name] = value

    walk("", config or {})
    return found


def _rope(config: Mapping[str, Any]) -> str | None:
    """Base and scaling of the rotary embedding, whichever version of the library wrote them."""
    parameters = config.get("rope_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    theta = config.get("rope_theta", parameters.get("rope_theta"))
    scaling = config.get("rope_scaling") or {k: v for k, v in parameters.items() if k != "rope_theta"}
    if isinstance(scaling, dict):
        scaling = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
        if scaling.get("rope_type") == "default":
            scaling = {}
    if theta is None and not scaling:
        return None
    base = f"base {float(theta):g}" if isinstance(theta, int | float) else "the default base"
    return f"{base}, {json.dumps(scaling, sort_keys=True)}" if scaling else base


def _value(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _dtypes(a: Model, b: Model, names: tuple[str, str]) -> list[Difference]:
    here, there = main_dtype(a), main_dtype(b)
    if here == there:
        return []
    return [
        Difference(
            "note",
            "dtype",
            f"the number formats differ: {here} in {names[0]}, {there} in {names[1]}",
            "the merge is computed in float64 anyway; set `dtype:` to what the output shall have",
        )
    ]


def main_dtype(model: Model) -> str:
    """The dtype of most of a model's elements, as recipes write it."""
    from math import prod

    counts: Counter[str] = Counter()
    for kind in model.tensors.values():
        counts[kind.dtype] += prod(kind.shape)
    return recipe_name(counts.most_common(1)[0][0])


def _vocabulary(a: Model, b: Model, names: tuple[str, str], tokens: TokenComparison) -> list[Difference]:
    made = []
    rows_a, rows_b = a.embedding_rows(), b.embedding_rows()
    policy = "choose a policy: `tokenizer_source: base`, `union`, or a model"
    if rows_a != rows_b:
        what = f"the embeddings have different heights: {_rows(rows_a)} in {names[0]}, {_rows(rows_b)} in {names[1]}"
        if tokens.assumed and None not in (rows_a, rows_b):
            advice = "nothing says which rows belong together: put the tokenizers' files into both directories"
            made.append(Difference("blocking", "vocabulary", what, advice))
        else:
            made.append(Difference("warning", "vocabulary", what, policy))
    if tokens.only_a or tokens.only_b:
        what = f"the vocabularies differ: {tokens.only_a:,} tokens only in {names[0]}, {tokens.only_b:,} only in {names[1]}"
        made.append(Difference("warning", "tokenizer", what, policy))
    if tokens.same_ids is not None and tokens.same_ids < 1:
        what = f"{100 * (1 - tokens.same_ids):.3g} % of the common tokens have different ids"
        advice = f"rows must be put in one order before they are merged: {policy}"
        made.append(Difference("warning", "token ids", what, advice))
    if tokens.assumed and rows_a is not None:
        advice = "put the tokenizer's files into both directories, or know that they are the same"
        made.append(Difference("note", "tokenizer", tokens.assumed, advice))
    for role, (x, y) in (tokens.specials_differ or {}).items():
        what = f"the {role} tokens differ: {x or 'none'} in {names[0]}, {y or 'none'} in {names[1]}"
        advice = "the output gets the first model's tokenizer: put the model whose prompts you will use first"
        made.append(Difference("note", f"{role} token", what, advice))
    said = {
        "differ": "the chat templates differ",
        "first only": f"only {names[0]} has a chat template",
        "second only": f"only {names[1]} has a chat template",
    }
    if tokens.chat in said:
        advice = "the output gets the first model's; `chat_template: auto` or a file's name chooses another"
        made.append(Difference("note", "chat template", said[tokens.chat], advice))
    return made


def _rows(rows: int | None) -> str:
    return "none" if rows is None else f"{rows:,} rows"


def _tied(a: Model, b: Model, names: tuple[str, str]) -> list[Difference]:
    ties_a, ties_b = bool(a.anatomy.tied), bool(b.anatomy.tied)
    if ties_a == ties_b:
        return []
    tying = names[0] if ties_a else names[1]
    advice = "the output gets a head of its own, merged from the head of one and the embedding of the other"
    return [Difference("warning", "tied weights", f"only {tying} ties its head to its embedding", advice)]


def _lacking(parents: Parents, names: tuple[str, str]) -> list[Difference]:
    made: dict[str, list[str]] = {}
    for tensor, without in parents.lacking.items():
        for name in names:
            if name in without:
                made.setdefault(name, []).append(tensor)
    return [
        Difference(
            "warning",
            "tensors",
            f"{name} lacks {len(tensors):,} tensor{'s' if len(tensors) > 1 else ''} that the other has: {tensors[0]}"
            + (", …" if len(tensors) > 1 else ""),
            "`unmatched: copy` takes them from the model that has them",
        )
        for name, tensors in made.items()
    ]


def _quantised(a: Model, b: Model, names: tuple[str, str]) -> list[Difference]:
    coded = [n for m, n in zip((a, b), names, strict=True) if m.checkpoint is not None and m.checkpoint.coded]
    advice = "codes are decoded for the merge; the original 16-bit model gives a better one"
    return [Difference("note", "quantisation", f"{name} is stored as codes", advice) for name in coded]
