"""The architectures that a mixture of dense experts can be written in: names of tensors, config keys, and what fits.

Experts are written one by one, as published checkpoints have them; transformers fuses them when it loads the model.

DeepSeek's architecture (Dai et al. 2024, DeepSeekMoE, arXiv:2401.06066: a shared expert that every token goes through, ungated,
beside routed ones) exists in transformers with ordinary attention as ``glm4_moe``, whose router is DeepSeek-V3's: normalised
sigmoids in place of a softmax. DeepSeek's own classes have latent attention, which no dense model's weights fit into.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
"""The feed-forward tensors of the dense families."""

PARTS = ("gate_proj", "up_proj", "down_proj")

EMPTY = 8
"""The width of a shared expert that stands for none."""

_BIASES = r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.bias"
_ANY_BIASES = r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.bias"

# What a dense family's config means where it does not say so itself, and another family would take to mean something else.
_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": None,
        "sliding_window": None,
    },
    "mistral": {
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
    },
}
"""The dense families, with those of their defaults that others do not share."""


@dataclass(frozen=True)
class Family:
    """An output architecture.

    Attributes:
        title: How to call it.
        model_type, architecture: In the config.
        dense: The families of dense models that it can be made from.
        expert: The name of an expert's tensor.
        parts: The three feed-forward matrices' names in it.
        router: The name of a block's router.
        shared: The name of a shared expert's tensor; empty where there can be none.
        shared_gate: The name of the shared expert's gate; empty: it has none.
        optional: Tensors of a base that it may have beside the usual ones.
        bias: A buffer of zeros for each block's router; empty: it has none.
        windows: Whether it can hold attention in a sliding window.
    """

    title: str
    model_type: str
    architecture: str
    dense: frozenset[str]
    router: str
    expert: str = "model.layers.{block}.mlp.experts.{expert}.{part}.weight"
    parts: Mapping[str, str] | None = None
    shared: str = ""
    shared_gate: str = ""
    optional: str = ""
    bias: str = ""
    windows: bool = False

    def part(self, name: str) -> str:
        """An expert's name of ``gate_proj``, ``up_proj`` or ``down_proj``."""
        return name if self.parts is None else self.parts[name]

    def holds(self, name: str) -> bool:
        """Whether a tensor of the base outside its feed-forward layers has a place."""
        return bool(_USUAL.fullmatch(name) or (self.optional and re.fullmatch(self.optional, name)))


_USUAL = re.compile(
    r"model\.embed_tokens\.weight|lm_head\.weight|model\.norm\.weight"
    r"|model\.layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.[qkvo]_proj)\.weight"
)

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "Mixtral",
        "mixtral",
        "MixtralForCausalLM",
        frozenset({"llama", "mistral"}),
        "model.layers.{block}.block_sparse_moe.gate.weight",
        expert="model.layers.{block}.block_sparse_moe.experts.{expert}.{part}.weight",
        parts={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        windows=True,
    ),
    "deepseek": Family(
        "DeepSeek-style (glm4_moe)",
        "glm4_moe",
        "Glm4MoeForCausalLM",
        frozenset({"llama", "mistral", "qwen2"}),
        "model.layers.{block}.mlp.gate.weight",
        shared="model.layers.{block}.mlp.shared_experts.{part}.weight",
        optional=_BIASES,
        bias="model.layers.{block}.mlp.gate.e_score_correction_bias",
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        frozenset({"qwen3"}),
        "model.layers.{block}.mlp.gate.weight",
        optional=rf"{_ANY_BIASES}|model\.layers\.\d+\.self_attn\.[qk]_norm\.weight",
    ),
    "qwen2_moe": Family(
        "Qwen2-MoE",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        frozenset({"llama", "mistral", "qwen2"}),
        "model.layers.{block}.mlp.gate.weight",
        shared="model.layers.{block}.mlp.shared_expert.{part}.weight",
        shared_gate="model.layers.{block}.mlp.shared_expert_gate.weight",
        optional=_BIASES,
    ),
}
"""The output architectures by the name that a configuration uses, in the order in which they are tried."""


def dense_type(config: Mapping[str, Any] | None) -> str:
    """The family of a dense model."""
    return str((config or {}).get("model_type", ""))


def moe_config(
    family: Family, base: Mapping[str, Any], *, experts: int, per_token: int, shared: bool, tensors: Set[str]
) -> dict[str, Any]:
    """The output's ``config.json``.

    Args:
        family: The output architecture.
        base: The base's config.
        experts, per_token: How many there are, and how many a token goes through.
        shared: Whether there is a shared expert.
        tensors: The base's tensors: they say whether there are biases.
    """
    made = {**_COMMON, **DEFAULTS[dense_type(base)], **base}
    for key in ("_name_or_path", "auto_map", "pretraining_tp", "mlp_bias", "attention_bias"):
        made.pop(key, None)
    made |= {"model_type": family.model_type, "architectures": [family.architecture]}
    if made.get("num_key_value_heads") is None:
        made["num_key_value_heads"] = made["num_attention_heads"]
    biased = any(name.endswith("q_proj.bias") for name in tensors)
    width = base["intermediate_size"]
    if family.model_type == "mixtral":
        return made | {"num_local_experts": experts, "num_experts_per_tok": per_token}
    made |= {"moe_intermediate_size": width, "num_experts_per_tok": per_token, "norm_topk_prob": True}
    if family.model_type == "glm4_moe":
        rope = made.get("rope_parameters")
        if isinstance(rope, dict):
            made["rope_parameters"] = {**rope, "partial_rotary_factor": 1.0}
        return made | {
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": False,
            "partial_rotary_factor": 1.0,
            "attention_bias": biased,
            "num_nextn_predict_layers": 0,
        }
    made |= {"num_experts": experts, "decoder_sparse_step": 1, "mlp_only_layers": [], "sliding_window": None}
    made.pop("layer_types", None)
    if family.model_type == "qwen3_moe":
        return made | {"attention_bias": biased}
    return made | {"qkv_bias": biased, "shared_expert_intermediate_size": width if shared else EMPTY}


def slides(config: Mapping[str, Any]) -> bool:
    """Whether a dense model's attention looks through a sliding window."""
    said = {**DEFAULTS[dense_type(config)], **config}
    if "use_sliding_window" in said:
        return bool(said["use_sliding_window"])
    return said.get("sliding_window") is not None
