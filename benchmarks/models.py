"""Makes the benchmark's models: Qwen2-shaped bfloat16 checkpoints with random weights, a base and fine-tunes of it.

    python benchmarks/models.py DIR

The weights are noise of a real model's size (σ = 0.02, norms around 1, biases of σ = 1; task vectors with σ = 3·10⁻⁴), the
shapes those of Qwen2-0.5B and Qwen2.5-1.5B. Norms and biases matter where thresholds are of a whole model: what bfloat16
leaves of their task vectors is like nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SHAPES = {
    "0.5B": {"hidden": 896, "layers": 24, "intermediate": 4864, "heads": 14, "kv": 2, "vocab": 151936},
    "1.5B": {"hidden": 1536, "layers": 28, "intermediate": 8960, "heads": 12, "kv": 2, "vocab": 151936},
}
NAMES = ("base", "a", "b", "c")


def config(size: str) -> dict[str, object]:
    """The Qwen2 config of a size."""
    s = SHAPES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": s["hidden"],
        "num_hidden_layers": s["layers"],
        "intermediate_size": s["intermediate"],
        "num_attention_heads": s["heads"],
        "num_key_value_heads": s["kv"],
        "vocab_size": s["vocab"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "dtype": "bfloat16",
    }


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a size's tensors."""
    s = SHAPES[size]
    h, i, kv = s["hidden"], s["intermediate"], s["hidden"] // s["heads"] * s["kv"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s["vocab"], h)}
    for n in range(s["layers"]):
        block = f"model.layers.{n}."
        found |= {
            block + "input_layernorm.weight": (h,),
            block + "self_attn.q_proj.weight": (h, h),
            block + "self_attn.q_proj.bias": (h,),
            block + "self_attn.k_proj.weight": (kv, h),
            block + "self_attn.k_proj.bias": (kv,),
            block + "self_attn.v_proj.weight": (kv, h),
            block + "self_attn.v_proj.bias": (kv,),
            block + "self_attn.o_proj.weight": (h, h),
            block + "post_attention_layernorm.weight": (h,),
            block + "mlp.gate_proj.weight": (i, h),
            block + "mlp.up_proj.weight": (i, h),
            block + "mlp.down_proj.weight": (h, i),
        }
    found["model.norm.weight"] = (h,)
    return found


def make(folder: Path, size: str, names: tuple[str, ...] = NAMES) -> None:
    """Write the models of a size below ``folder/size`` where they are not there yet."""
    for index, name in enumerate(names):
        out = folder / size / name
        if (out / "model.safetensors").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for t, (tensor, shape) in enumerate(shapes(size).items()):
            generator = torch.Generator().manual_seed(1000 + t)
            value = torch.randn(shape, generator=generator)
            value = value.mul_(0.02).add_(tensor.endswith("norm.weight")) if not tensor.endswith("bias") else value
            if index:
                generator.manual_seed(100_000 * index + t)
                value = value.bfloat16().float().add_(torch.randn(shape, generator=generator), alpha=3e-4)
            tensors[tensor] = value.bfloat16()
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(json.dumps(config(size), indent=2))


def make_many(folder: Path, tensors: int = 100_000, names: tuple[str, ...] = ("a", "b")) -> None:
    """Write checkpoints of very many four-element tensors."""
    for index, name in enumerate(names):
        out = folder / f"many-{tensors}" / name
        if (out / "model.safetensors").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        values = torch.from_numpy(np.random.default_rng(index).normal(size=(tensors, 4)).astype(np.float32))
        experts = tensors // 50
        content = {f"model.layers.{i % 50}.mlp.experts.{i // 50}.w1.weight": values[i] for i in range(experts * 50)}
        save_file(content, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(
            json.dumps({"model_type": "mixtral", "num_hidden_layers": 50, "dtype": "float32"})
        )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for each in sys.argv[2:] or SHAPES:
        make(target, each)
    make_many(target)
