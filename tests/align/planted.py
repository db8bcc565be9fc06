"""The same decoder in another basis of its residual stream: a planted rotation."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

READERS = re.compile(
    r"(.*)\.(?:self_attn\.([qkv])_proj|mlp\.(gate|up)_proj|block_sparse_moe\.(gate|experts\.\d+\.w[13]))\.weight"
)
WRITERS = re.compile(r".*\.(?:self_attn\.o_proj|mlp\.down_proj|block_sparse_moe\.experts\.\d+\.w2)\.weight")


def rotation(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix, float64."""
    found: Tensor = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )[0]
    return found


def rotate(source: Path, out: Path, seed: int = 0, *, offset: float = 0.0) -> Path:
    """Write a Llama-like model with its residual basis rotated: gains folded, the head untied, float32.

    Args:
        source, out: Model directories.
        seed: Of the rotation.
        offset: What the norms add to their stored gains (1 for Gemma).
    """
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    w = {k: v.double() for k, v in load_file(out / "model.safetensors").items()}
    q = rotation(config["hidden_size"], seed)
    gains = {k: w[k] + offset for k in w if k.endswith("norm.weight") and "q_norm" not in k and "k_norm" not in k}
    w["lm_head.weight"] = w.get("lm_head.weight", w["model.embed_tokens.weight"]) * gains["model.norm.weight"] @ q
    w["model.embed_tokens.weight"] = w["model.embed_tokens.weight"] @ q
    for name, value in list(w.items()):
        reader = READERS.fullmatch(name)
        if reader:
            norm = "input_layernorm" if reader[2] else "post_attention_layernorm"
            w[name] = value * gains[f"{reader[1]}.{norm}.weight"] @ q
        elif WRITERS.fullmatch(name):
            w[name] = q.T @ value
    w |= {name: torch.full_like(gain, 1.0 - offset) for name, gain in gains.items()}
    config["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config))
    tensors = {k: v.to(torch.float32).contiguous() for k, v in w.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
