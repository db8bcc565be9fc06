"""Tiny models, recipes and a way to run the program, for the tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from geomerge.cli.app import main

BLOCKS = 6
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


class Ran(NamedTuple):
    """What a run of the program gave."""

    code: int
    out: str
    err: str


class Program:
    """Runs the program in this process, its output captured (so neither stream is a terminal)."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured

    def __call__(self, *words: object) -> Ran:
        self._captured.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *self._captured.readouterr())


def weights(seed: int, *, near: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A Llama's tensors in bfloat16; `near` another model's, as a fine-tune of it would be."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,)}
    for i in range(BLOCKS):
        for name, shape in {
            "input_layernorm.weight": (8,),
            "self_attn.q_proj.weight": (8, 8),
            "self_attn.o_proj.weight": (8, 8),
            "mlp.up_proj.weight": (16, 8),
            "mlp.down_proj.weight": (8, 16),
        }.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    made = {}
    for name, shape in shapes.items():
        fresh = torch.randn(shape, generator=generator)
        values = 0.02 * fresh if near is None else near[name].float() + 2e-4 * fresh
        made[name] = values.to(torch.bfloat16)
    return made


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object] = CONFIG) -> Path:
    """A model directory."""
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_models(folder: Path) -> None:
    """``base`` and two fine-tunes of it, ``a`` and ``b``."""
    base = weights(0)
    write_model(folder / "base", base)
    write_model(folder / "a", weights(1, near=base))
    write_model(folder / "b", weights(2, near=base))


SLERP = """\
merge_method: slerp
base_model: {0}/a
models: [{{model: {0}/a}}, {{model: {0}/b}}]
parameters: {{t: [{{filter: self_attn, value: [0, 1]}}, {{value: 0.5}}]}}
dtype: bfloat16
"""

TIES = """\
merge_method: ties
base_model: {0}/base
models:
  - {{model: {0}/a, parameters: {{weight: 1, density: 0.5}}}}
  - {{model: {0}/b, parameters: {{weight: 1, density: 0.5}}}}
dtype: bfloat16
"""


def write_recipe(folder: Path, text: str = SLERP, name: str = "recipe.yml") -> Path:
    """A recipe on the models of `write_models`."""
    path = folder / name
    path.write_text(text.format(folder))
    return path
