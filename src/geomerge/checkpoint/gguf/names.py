"""From a GGUF file's tensor names and metadata to those of a Hugging Face model: Llama (and Mistral), Qwen2, Qwen3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF's architectures that can be read, and the class of the model. Mistral's files say ``llama``, as their layers do."""

PERMUTED = {"llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}}
"""By architecture: the projections whose rows are stored in another order, and the metadata that counts their heads."""

DERIVED = ("rope_freqs.weight",)
"""Tensors that a GGUF file has and a model has not: they follow from the config."""

_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_TOKENS = ("bos_token_id", "eos_token_id")


def model_name(stored: str) -> str | None:
    """``blk.0.attn_q.weight`` → ``model.layers.0.self_attn.q_proj.weight``; `None` for a tensor that has no such name."""
    found = _BLOCK.fullmatch(stored)
    if found is not None and found[2] in _INNER:
        return f"model.layers.{found[1]}.{_INNER[found[2]]}.{found[3]}"
    stem, _, kind = stored.rpartition(".")
    return f"{_OUTER[stem]}.{kind}" if stem in _OUTER and kind in ("weight", "bias") else None


def heads(stored: str, metadata: Mapping[str, Any]) -> int:
    """How many heads a tensor's rows belong to, where the file has them in another order; else 0."""
    architecture = metadata.get("general.architecture")
    found = _BLOCK.fullmatch(stored)
    key = None if found is None else PERMUTED.get(str(architecture), {}).get(found[2])
    if found is None or key is None:
        return 0
    count = metadata.get(f"{architecture}.{key}", metadata.get(f"{architecture}.attention.head_count"))
    if isinstance(count, list):  # one for each layer
        count = count[int(found[1])] if int(found[1]) < len(count) else None
    return count if isinstance(count, int) else 0


def model_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Any]:
    """A ``config.json`` from the metadata.

    Args:
        metadata: The file's.
        shapes: Of the tensors, under the model's names.
        dtype: The recipe name of the model's dtype.
    """
    architecture = str(metadata["general.architecture"])

    def said(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{architecture}.{key}", default)
        # 1e-5 as a float32 is 9.99999974e-06 as a double.
        return float(f"{found:.7g}") if isinstance(found, float) else found

    def rows(name: str) -> int:
        return next(iter(shapes.get(name, ())), 0)

    config: dict[str, Any] = {"architectures": [ARCHITECTURES[architecture]], "model_type": architecture}
    config |= {ours: value for ours, theirs in _KEYS.items() if (value := said(theirs)) is not None}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    width = rows("model.layers.0.self_attn.q_proj.weight")
    if isinstance(config.get("num_attention_heads"), int) and config["num_attention_heads"] > 0:
        config["head_dim"] = said("attention.key_length", width // config["num_attention_heads"])
    config["vocab_size"] = rows("model.embed_tokens.weight")
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    if architecture == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    kind = said("rope.scaling.type")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": said("rope.scaling.factor", 1.0)}
        original = said("rope.scaling.original_context_length")
        config["rope_scaling"] = (
            scaling if original is None else {**scaling, "original_max_position_embeddings": original}
        )
    for key in _TOKENS:
        if isinstance(metadata.get(f"tokenizer.ggml.{key}"), int):
            config[key] = metadata[f"tokenizer.ggml.{key}"]
    return {**config, "dtype": dtype}
