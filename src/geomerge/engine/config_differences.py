"""What the configurations of two models say differently of the network, in words, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from geomerge.engine.models import Model

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
