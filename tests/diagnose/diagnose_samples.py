"""Tiny models for the tests of the diagnosis: hand-made state dicts, and a Llama family that transformers can load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from geomerge.checkpoint import from_state_dict
from geomerge.diagnose import Diagnosis, diagnose

TENSORS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight")


def in_memory(models: Mapping[str, Mapping[str, Tensor]], *, base: str | None = None, **options: Any) -> Diagnosis:
    """Diagnose state dicts by name; `base` is one of them."""
    given = {name: from_state_dict(dict(tensors), name=name) for name, tensors in models.items()}
    return diagnose(*(n for n in models if n != base), base=base, given=given, **options)


def folders(root: Path, models: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]) -> None:
    """Write state dicts as model directories."""
    for name, tensors in models.items():
        tiny.save(root / name, tensors, config)


def reconfigure(folder: Path, **changes: Any) -> None:
    """Change keys of a config; `None` removes one."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def vocabulary(folder: Path, tokens: list[str], *, chat: str | None = None, **special: str) -> None:
    """Write a WordLevel tokenizer with these tokens under ids 0, 1, …"""
    model = {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": tokens[0]}
    text = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(text))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": tokens[0], **special}
    if chat is not None:
        config["chat_template"] = chat
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def damage(folder: Path, tensor: str, value: float) -> None:
    """Put a number into a tensor's first element."""
    tensors = tiny.read(folder)
    tensors[tensor].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rotated(tensors: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A Llama with its residual basis rotated (its norms' gains must be 1)."""
    h = tiny.LLAMA["hidden_size"]
    q, _ = torch.linalg.qr(torch.randn(h, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    q = q.float()
    made = {}
    for name, w in tensors.items():
        if w.dim() < 2:
            made[name] = w
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            made[name] = q.T @ w
        else:
            made[name] = w @ q
    return made
