"""The tiny models the peer merges: written from a fixed seed, so that a second run writes the same bytes.

Families (one layout each; the first letters of a model's name say which):

==========  =====================================================================================================
``s_*``     Llama, 1 layer, hidden 8: the parameter grids
``m_*``     Llama, 4 layers, hidden 8: slices, gradients, filters
``w_*``     Llama, 1 layer, hidden 64: statistics of the random methods
``h_*``     the ``s_*`` models rounded to bfloat16
``q_*``     Qwen2, 2 layers, biases, the head tied to the embedding
``t5_*``    T5 1.1 (gated), 2 encoder and 2 decoder layers: the ``modules:`` grammar
``v_*``     Llama, 1 layer, each with a vocabulary and tokenizer of its own (`vocabularies.py`)
==========  =====================================================================================================

Experts are the base plus deltas of 1 to 10 % of each tensor's scale. Attention is small (0.02) and the MLP larger
(0.1), so that guards on absolute sizes fire for some tensors and not for others. Every base value is a multiple of
2^-20, which makes planted deltas exact in float32: zeros, and pairs of opposite sign whose sum is exactly zero.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Weights = dict[str, np.ndarray]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 24,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
SMALL = LLAMA | {"num_hidden_layers": 1, "vocab_size": 16}
DEEP = LLAMA | {"num_hidden_layers": 4}
WIDE = LLAMA | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 32, "vocab_size": 16}
QWEN2 = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "tie_word_embeddings": True,
    "layer_types": ["full_attention", "full_attention"],
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "vocab_size": 24,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}

GRID = 2.0**-20
"""Every base weight is a multiple of this, so small planted deltas are exact."""


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama or Qwen2 checkpoint, in the order transformers writes them."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = hidden // config["num_attention_heads"]
    narrow = head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{at}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{at}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def t5_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a tied T5 checkpoint."""
    hidden, inner, narrow = config["d_model"], config["d_ff"], config["d_kv"] * config["num_heads"]
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (config["vocab_size"], hidden)}
    for stack, layers in (("encoder", config["num_layers"]), ("decoder", config["num_decoder_layers"])):
        kinds = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
        for block in range(layers):
            at = f"{stack}.block.{block}.layer"
            for place, kind in enumerate(kinds):
                for name in "qkv":
                    shapes[f"{at}.{place}.{kind}.{name}.weight"] = (narrow, hidden)
                shapes[f"{at}.{place}.{kind}.o.weight"] = (hidden, narrow)
                if block == 0 and place == 0:
                    buckets = (config["relative_attention_num_buckets"], config["num_heads"])
                    shapes[f"{at}.0.SelfAttention.relative_attention_bias.weight"] = buckets
                shapes[f"{at}.{place}.layer_norm.weight"] = (hidden,)
            for way in ("wi_0", "wi_1"):
                shapes[f"{at}.{len(kinds)}.DenseReluDense.{way}.weight"] = (inner, hidden)
            shapes[f"{at}.{len(kinds)}.DenseReluDense.wo.weight"] = (hidden, inner)
            shapes[f"{at}.{len(kinds)}.layer_norm.weight"] = (hidden,)
        shapes[f"{stack}.final_layer_norm.weight"] = (hidden,)
    return shapes


def draw(*words: str) -> np.random.Generator:
    """The random generator for one purpose: independent of the order in which models are made."""
    return np.random.default_rng([zlib.crc32(word.encode()) for word in words])


def scale_of(name: str) -> float:
    """The standard deviation of a tensor: small attention, larger MLP, as in trained networks."""
    if "norm" in name:
        return 0.1
    if "attn" in name or "Attention" in name:
        return 0.02
    return 0.3 if "embed" in name or "shared" in name else 0.1


def base(shapes: Mapping[str, tuple[int, ...]], seed: str) -> Weights:
    """A random base model on the grid of multiples of 2^-20."""
    weights = {}
    for name, shape in shapes.items():
        values = draw(seed, name).standard_normal(shape) * scale_of(name) + (1.0 if "norm" in name else 0.0)
        weights[name] = (np.round(values / GRID) * GRID).astype(np.float32)
    return weights


def expert(origin: Weights, seed: str, size: float, *, like: Weights | None = None) -> Weights:
    """The base plus deltas of relative size ``size``, one position in ten exactly unchanged.

    With ``like``, one position in twelve carries the exact opposite of that expert's delta (a sign tie when both have
    the same weight). The whole of the first value projection is left unchanged: a zero delta tensor.
    """
    weights = {}
    for name, start in origin.items():
        generator = draw(seed, name)
        delta = np.round(generator.standard_normal(start.shape) * scale_of(name) * size / GRID) * GRID
        delta[generator.random(start.shape) < 0.1] = 0.0
        if like is not None:
            opposite = generator.random(start.shape) < 1 / 12
            delta = np.where(opposite, start.astype(np.float64) - like[name], delta)
        if name.endswith("layers.0.self_attn.v_proj.weight"):
            delta = np.zeros_like(delta)
        weights[name] = (start + delta).astype(np.float32)
    return weights


def off_grid(weights: Weights, seed: str) -> Weights:
    """The same weights, a quarter of them moved by about 1e-7 of their size: subtracting the base is then inexact."""
    moved = {}
    for name, values in weights.items():
        generator = draw(seed, name)
        noise = 1 + 1e-7 * generator.standard_normal(values.shape) * (generator.random(values.shape) < 0.25)
        moved[name] = (values * noise).astype(np.float32)
    return moved


def even(origin: Weights, seed: str) -> Weights:
    """The base plus deltas of only four magnitudes (1 to 4 times 2^-12): every top-k selection meets equal values."""
    weights = {}
    for name, start in origin.items():
        steps = draw(seed, name).integers(-4, 5, start.shape)
        weights[name] = (start + steps * 2.0**-12).astype(np.float32)
    return weights


def unrelated(origin: Weights, seed: str, special: Mapping[str, float]) -> Weights:
    """Other random weights, hence large angles; the tensors named in ``special`` are that multiple of the base's."""
    weights = base({name: values.shape for name, values in origin.items()}, seed)
    for part, factor in special.items():
        name = next(name for name in origin if part in name)
        weights[name] = (factor * origin[name]).astype(np.float32)
    return weights


def write_model(at: Path, config: Mapping[str, Any], weights: Weights, dtype: torch.dtype = torch.float32) -> None:
    """Write ``model.safetensors`` and ``config.json``."""
    at.mkdir(parents=True)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)).to(dtype) for name, values in weights.items()}
    save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})
    (at / "model.safetensors").chmod(0o644)
    text = json.dumps(dict(config) | {"torch_dtype": str(dtype).removeprefix("torch.")}, indent=1, sort_keys=True)
    (at / "config.json").write_text(text + "\n")


def write_all(root: Path) -> None:
    """Write every family but the vocabularies' under ``root``."""

    def family(
        letter: str, config: Mapping[str, Any], shapes: Callable[[Mapping[str, Any]], Any]
    ) -> dict[str, Weights]:
        start = base(shapes(config), letter)
        first = expert(start, letter + "a", 0.10)
        second = expert(start, letter + "b", 0.04, like=first)
        return {"base": start, "a": first, "b": second}

    small = family("s", SMALL, llama_shapes)
    small["c"] = off_grid(expert(small["base"], "sc", 0.01), "sc-noise")
    small["far"] = unrelated(small["base"], "s-far", {"q_proj": 0.0, "down_proj": 2.0, "input_layernorm": 1.0})
    small["turned"] = unrelated(small["base"], "s-turned", {"q_proj": 0.0, "up_proj": -1.0, "down_proj": 2.0})
    small["even_a"], small["even_b"] = even(small["base"], "s-even-a"), even(small["base"], "s-even-b")
    deep = family("m", DEEP, llama_shapes)
    deep["c"] = off_grid(expert(deep["base"], "mc", 0.07), "mc-noise")
    for name, weights in small.items():
        write_model(root / f"s_{name}", SMALL, weights)
    for name, weights in deep.items():
        write_model(root / f"m_{name}", DEEP, weights)
    for name in ("base", "a", "b"):
        write_model(root / f"h_{name}", SMALL, small[name], torch.bfloat16)
    for letter, config, shapes in (("w", WIDE, llama_shapes), ("q", QWEN2, llama_shapes), ("t5", T5, t5_shapes)):
        for name, weights in family(letter, config, shapes).items():
            write_model(root / f"{letter}_{name}", config, weights)
