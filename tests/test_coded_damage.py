"""Random damage to models stored as codes: it is decoded or refused by name, and nothing else ever happens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import coded_samples as samples
import geomerge as gm
import test_coded_bitsandbytes as bitsandbytes
import test_coded_packed as packed
import test_coded_scaled as scaled
from geomerge.checkpoint.reader import open_checkpoint

MODELS: dict[str, tuple[samples.Encode, dict[str, Any], dict[str, int]]] = {
    "gptq": (packed.gptq(4, 32), {"quant_method": "gptq", "group_size": 32}, packed.SIZES),
    "awq": (packed.awq(32), {"quant_method": "awq", "group_size": 32}, packed.SIZES),
    "nf4": (bitsandbytes.four_bit(64, 4), bitsandbytes.STATED, bitsandbytes.SIZES),
    "fp8": (scaled.fp8_blocks(128, torch.float8_e4m3fn), {"quant_method": "fp8"}, {"hidden_size": 32}),
}
DTYPES = (torch.float32, torch.float16, torch.int32, torch.uint8, torch.int8, torch.int64, torch.float8_e4m3fn)


def spoil(tensors: dict[str, Tensor], dice: random.Random) -> None:
    """Take away one part of a layer, or give it another dtype or shape."""
    name = dice.choice([n for n in tensors if "_proj" in n])
    old = tensors[name]
    change = dice.random()
    if change < 0.2:
        del tensors[name]
    elif change < 0.5:
        tensors[name] = torch.ones(old.shape).to(dice.choice(DTYPES))
    else:
        shape = [dice.choice([0, 1, 2, 3, 64, *old.shape]) for _ in range(dice.choice([0, 1, 2, 2, 3]))]
        tensors[name] = torch.full(shape, dice.choice([-3, 0, 2])).to(dice.choice([old.dtype, *DTYPES]))


@pytest.mark.parametrize("kind", list(MODELS))
def test_damage(kind: str, tmp_path: Path) -> None:
    """Thirty kinds of damage."""
    encode, stated, sizes = MODELS[kind]
    samples.write(tmp_path / "m", encode, stated, **sizes)
    whole = load_file(tmp_path / "m/model.safetensors")
    dice, refused = random.Random(kind), 0
    for _ in range(30):
        tensors = dict(whole)
        spoil(tensors, dice)
        save_file(tensors, tmp_path / "m/model.safetensors")
        try:
            with open_checkpoint(str(tmp_path / "m")) as checkpoint:
                sound = checkpoint.decoding.refusal is None
            if sound:
                samples.decoded(tmp_path / "m", 777)
            refused += not sound
        except gm.ModelError:
            refused += 1
    assert refused > 10
