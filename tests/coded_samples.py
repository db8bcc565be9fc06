"""Models stored as codes, for the tests of the formats: written around tiny Llamas, read back piece by piece."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import geomerge as gm
import tiny
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.engine.stored import stored_source

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Encode = Callable[[str, Tensor], tuple[Mapping[str, Tensor], Tensor]]
"""A weight's name and values → what is stored for it, and what that stands for in float64."""


def write(folder: Path, encode: Encode, stated: Mapping[str, Any], *, seed: int = 1, **config: Any) -> tiny.Tensors:
    """Write a tiny Llama with its linear layers encoded; returns the decoded tensors in float64."""
    said = tiny.LLAMA | {"num_hidden_layers": 1, "dtype": "bfloat16"} | config
    written: dict[str, Tensor] = {}
    decoded: tiny.Tensors = {}
    for name, tensor in tiny.random_tensors(tiny.llama_shapes(said), seed).items():
        if any(f"{module}.weight" in name for module in LINEAR):
            parts, decoded[name] = encode(name, tensor)
            written |= parts
        else:
            written[name] = tensor.bfloat16()
            decoded[name] = written[name].double()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in written.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": dict(stated)}))
    return decoded


def decoded(path: Path | str, piece: int | None = None) -> tiny.Tensors:
    """Every tensor of a model in float64, read whole or in pieces of so many elements."""
    found: tiny.Tensors = {}
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.decoding.refusal is None
        for name, shape in checkpoint.shapes.items():
            source = stored_source(checkpoint, name, name)
            flat = torch.empty(math.prod(shape), dtype=torch.float64)
            step = piece or max(len(flat), 1)
            for start in range(0, len(flat), step):
                source.read(start, flat[start : start + step])
            if source.dtype == "F32":
                # It says that float32 holds its elements: then nothing is lost there.
                assert torch.equal(flat.float().double(), flat)
            found[name] = flat.view(shape)
    return found


def check(folder: Path, expected: Mapping[str, Tensor], *, merged: bool = True) -> None:
    """A model is decoded to these numbers bit for bit, wherever its tensors are cut; written out it says nothing of codes."""
    for piece in (None, 37, 1000):
        found = decoded(folder, piece)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
    if merged:
        out = folder.with_name(folder.name + "-out")
        gm.merge(f"merge_method: passthrough\nmodels: [{{model: {folder}}}]\n", out)
        for name, tensor in tiny.read(out).items():
            assert torch.equal(tensor, expected[name].bfloat16()), name
        assert tiny.config(out)["dtype"] == "bfloat16"
        assert "quantization_config" not in tiny.config(out)
