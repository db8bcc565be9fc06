"""The architectures that llama.cpp knows of a model: their metadata, from ``config.json``.

What llama.cpp has fixed in its code and a config may say otherwise (an activation, which blocks look through a window) is
checked: a file whose model would compute something else is not written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geomerge.errors import ModelError

Value = int | float | str | bool | list[Any]
"""A metadata value. Integers are written as uint32, floats as float32."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: llama.cpp's name.
        permuted: Its rotary embedding turns neighbouring elements where Hugging Face's turns the halves of a head, so the rows
            of the query and key projections are stored in another order.
        norms_plus_one: Its norms multiply by 1 + w in Hugging Face's model and by the stored number in llama.cpp's.
        activations: What the MLP may have: llama.cpp has no choice.
        fixed: Keys of the config that llama.cpp assumes a value for.
        defaults: What configs of this family leave out.
        window: Every so manieth block sees the whole context and the others a window; 0 where llama.cpp has no windows.
    """

    architecture: str
    permuted: bool = False
    norms_plus_one: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    window: int = 0


_GELU = ("gelu_pytorch_tanh", "gelu")
_GEMMA3 = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_gemma3 = Family("gemma3", norms_plus_one=True, activations=_GELU, defaults=_GEMMA3, window=6)

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "mixtral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen2_moe": Family("qwen2moe", fixed={"norm_topk_prob": False}),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe", fixed={"norm_topk_prob": True}),
    "gemma": Family("gemma", norms_plus_one=True, activations=_GELU),
    "gemma2": Family("gemma2", norms_plus_one=True, activations=_GELU, window=2),
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "phi3": Family("phi3"),
}
"""By the config's ``model_type``."""


@dataclass(frozen=True)
class Described:
    """What a config says of a model.

    Attributes:
        family: Its architecture.
        config: The language model's own part of the config.
        metadata: Key without the architecture's prefix → value.
        derived: Tensors that follow from the config: the factors of rotary frequencies.
        notes: What llama.cpp leaves out.
    """

    family: Family
    config: Mapping[str, Any]
    metadata: Mapping[str, Value]
    derived: Mapping[str, Tensor]
    notes: tuple[str, ...]


def describe(config: Mapping[str, Any] | None, rows: int, where: str) -> Described:
    """Turn a ``config.json`` into metadata.

    Args:
        config: The model's.
        rows: Of its embedding.
        where: The model, for messages.

    Raises:
        ModelError: llama.cpp has no such architecture, or computes it in another way.
    """
    kind = (config or {}).get("model_type")
    if config is None or kind not in FAMILIES:
        said = "has no config.json" if config is None else f"is a model of the type {kind!r:.50}"
        raise ModelError(f"{said}; GGUF files are written of {', '.join(FAMILIES)}", where=where)
    family = FAMILIES[kind]
    nested = config.get("text_config")
    own = {**family.defaults, **(nested if isinstance(nested, dict) else config)}
    _check(own, family, where)
    notes: list[str] = []
    metadata = _metadata(own, family, rows, where)
    scaling, derived = _rope(own, family, where, notes)
    window = own.get("sliding_window")
    if not family.window and window and own.get("use_sliding_window", True):
        notes.append(f"attention looks {window} tokens back in this model, and at everything in llama.cpp")
    if family.architecture in ("gemma2", "gemma3"):
        metadata |= _gemma(own, notes)
    elif family.architecture == "phi3":
        metadata["attention.sliding_window"] = int(window or 0)
    return Described(family, own, metadata | scaling, derived, tuple(notes))


def head_size(config: Mapping[str, Any]) -> int:
    """Elements of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def key_value_heads(config: Mapping[str, Any]) -> int:
    """How many key and value heads there are."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def experts(config: Mapping[str, Any]) -> int:
    """How many experts a block has; 0 for one MLP."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def _check(config: Mapping[str, Any], family: Family, where: str) -> None:
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activations[0]
    wrong = None
    if activation not in family.activations:
        wrong = f"the activation {activation}, and llama.cpp's {family.architecture} has {family.activations[0]}"
    for key, value in family.fixed.items():
        if config.get(key, False) != value:
            wrong = f"{key}: {config.get(key)}, and llama.cpp's {family.architecture} has {value}"
    kinds = config.get("layer_types")
    if family.window and isinstance(kinds, list):
        expected = ["sliding_attention" if (i + 1) % family.window else "full_attention" for i in range(len(kinds))]
        if kinds != expected:
            wrong = f"layer_types that llama.cpp's {family.architecture} has not: full attention every {family.window} blocks"
    if wrong:
        raise ModelError(f"has {wrong}: the file would be another model", where=where)


def _metadata(config: Mapping[str, Any], family: Family, rows: int, where: str) -> dict[str, Value]:
    def needed(key: str) -> Any:
        value = config.get(key)
        if value is None:
            raise ModelError(f"its config.json does not say {key}", where=where)
        return value

    size = needed("hidden_size") and needed("num_attention_heads") and head_size(config)
    found: dict[str, Value] = {
        "vocab_size": rows,
        "context_length": int(needed("max_position_embeddings")),
        "embedding_length": int(needed("hidden_size")),
        "block_count": int(needed("num_hidden_layers")),
        "feed_forward_length": int(needed("intermediate_size")),
        "attention.head_count": int(needed("num_attention_heads")),
        "attention.head_count_kv": key_value_heads(config),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(needed("rms_norm_eps")),
    }
    if experts(config):
        found["expert_count"] = experts(config)
        found["expert_used_count"] = int(needed("num_experts_per_tok"))
    if family.architecture in ("qwen2moe", "qwen3moe"):
        found["expert_feed_forward_length"] = int(needed("moe_intermediate_size"))
    if family.architecture == "qwen2moe":
        found["expert_shared_feed_forward_length"] = int(needed("shared_expert_intermediate_size"))
    return found


def _gemma(config: Mapping[str, Any], notes: list[str]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, theirs in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if config.get(key):
            found[theirs] = float(config[key])
    if config.get("sliding_window"):
        found["attention.sliding_window"] = int(config["sliding_window"])
    scalar = config.get("query_pre_attn_scalar")
    usual = {head_size(config), config["hidden_size"] // config["num_attention_heads"]}
    if scalar and scalar not in usual:
        notes.append(f"query_pre_attn_scalar is {scalar}, and llama.cpp scales queries by the size of a head")
    return found


def _rope(
    config: Mapping[str, Any], family: Family, where: str, notes: list[str]
) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """The metadata of the rotary embedding, and tensors of factors."""
    said = config.get("rope_parameters")
    local = config.get("rope_local_base_freq")
    if isinstance(said, dict) and isinstance(said.get("full_attention"), dict):  # one for each kind of block
        local = (said.get("sliding_attention") or {}).get("rope_theta", local)
        said = said["full_attention"]
    rope = {**(config.get("rope_scaling") or {}), **(said or {})}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 1e4)
    size = head_size(config)
    found: dict[str, Value] = {"rope.freq_base": base}
    if family.architecture == "gemma3" and local:
        found["rope.freq_base_swa"] = float(local)
    if family.architecture in ("llama", "phi3"):
        part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        found["rope.dimension_count"] = int(size * part)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            found["rope.scaling.original_context_length"] = int(original or config["max_position_embeddings"])
    elif kind == "llama3" and family.architecture == "llama":
        return found, {"rope_freqs.weight": llama3_factors(base, size, rope, int(original or 8192))}
    elif kind in ("longrope", "su") and family.architecture == "phi3":
        length = int(original or 4096)
        found["rope.scaling.original_context_length"] = length
        longer = config["max_position_embeddings"] / length
        attention = math.sqrt(1 + math.log(longer) / math.log(length)) if longer > 1 else 1.0
        found["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or attention)
        return found, {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float64)
            for which in ("long", "short")
        }
    elif kind == "dynamic":
        notes.append("frequencies that change with the length of the text (rope type 'dynamic') are not in llama.cpp")
    elif kind != "default":
        raise ModelError(
            f"has the rotary scaling {kind!r:.50}, which llama.cpp's {family.architecture} has not", where=where
        )
    if family.architecture == "phi3" and original:
        found["rope.scaling.original_context_length"] = int(original)
    return found, {}


def llama3_factors(base: float, size: int, rope: Mapping[str, Any], original: int) -> Tensor:
    """What each rotary frequency is divided by in Llama 3.1 and later: shape ``(size / 2,)``, float64.

    Wavelengths up to L/h keep their frequency, those from L/l on are divided by the factor, in between 1/f goes
    linearly in L/wavelength; L is the original context, l and h the low and high frequency factors.
    """
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    turns = original * base**-exponents / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
