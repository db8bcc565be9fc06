"""bitsandbytes' NF4 and int8 as they lie in safetensors, decoded by loops over the definition and by the library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import coded_samples as samples
import geomerge as gm
from geomerge.cli.app import main

SIZES = {"hidden_size": 20, "intermediate_size": 36, "head_dim": 10}
NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                    0.7229568362236023, 1.0])  # fmt: skip
STATED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def four_bit(block: int, nested: int = 0) -> samples.Encode:
    """Random codes and scales; their meaning element by element."""

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        count = weight.numel()
        generator = np.random.default_rng(count)
        codes = generator.integers(0, 16, count + count % 2)
        blocks = -(-count // block)
        state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
        parts = {name: torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8)).view(-1, 1)}
        if nested:
            table = np.sort(generator.uniform(-1, 1, 256)).astype(np.float32)
            inner = generator.integers(0, 256, blocks)
            outer = generator.uniform(0.5, 2, -(-blocks // nested)).astype(np.float32)
            offset = 0.0371
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
            scales = np.array([table[c] * outer[j // nested] + np.float32(offset) for j, c in enumerate(inner)])
            parts |= {
                f"{name}.absmax": torch.from_numpy(inner.astype(np.uint8)),
                f"{name}.nested_absmax": torch.from_numpy(outer),
                f"{name}.nested_quant_map": torch.from_numpy(table),
            }
        else:
            scales = generator.uniform(0.5, 2, blocks).astype(np.float32)
            parts[f"{name}.absmax"] = torch.from_numpy(scales)
        assert scales.dtype == np.float32
        parts[f"{name}.quant_map"] = NF4.clone()
        parts[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
        meaning = [float(NF4[codes[i]]) * float(scales[i // block]) for i in range(count)]
        return parts, torch.tensor(meaning, dtype=torch.float64).view(weight.shape)

    return encode


@pytest.mark.parametrize("block", [64, 48])
@pytest.mark.parametrize("nested", [0, 4])
def test_nf4(block: int, nested: int, tmp_path: Path) -> None:
    """Blocks over rows' ends, plain and doubly quantised scales."""
    expected = samples.write(tmp_path / "m", four_bit(block, nested), STATED, **SIZES)
    samples.check(tmp_path / "m", expected)


def test_int8(tmp_path: Path) -> None:
    """LLM.int8: codes · SCB / 127."""

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        largest = weight.abs().amax(1)
        stem = name.removesuffix("weight")
        parts = {name: codes, f"{stem}SCB": largest, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, codes.double() * largest.double().unsqueeze(1) / 127

    expected = samples.write(tmp_path / "m", encode, {"quant_method": "bitsandbytes", "load_in_8bit": True}, **SIZES)
    samples.check(tmp_path / "m", expected)


@pytest.mark.parametrize("nested", [False, True])
def test_the_library_decodes_the_same(nested: bool, tmp_path: Path) -> None:
    """What bitsandbytes writes, and what it makes of it in float32."""
    functional = pytest.importorskip("bitsandbytes.functional")

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        parts = {name: packed} | {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}
        return parts, functional.dequantize_4bit(packed, state).double()

    expected = samples.write(tmp_path / "m", encode, STATED, hidden_size=64, intermediate_size=128, head_dim=32)
    found = samples.decoded(tmp_path / "m")
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in expected.items())


@pytest.mark.parametrize("case", ["shape", "blocksize", "json", "absmax", "kernel"])
def test_damage(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state that does not fit its codes is refused, exit code 3; so are int8 codes in a kernel's order."""
    inner = four_bit(64)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, meaning = inner(name, weight)
        key = f"{name}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(parts[key].tolist()))
        if case == "shape":
            state["shape"] = [3, 3]
        elif case == "blocksize":
            state["blocksize"] = 0
        elif case == "absmax":
            parts[f"{name}.absmax"] = torch.ones(2)
        elif case == "kernel":
            parts[f"{name}_format"] = torch.tensor(1, dtype=torch.uint8)
        text = json.dumps(state)[: -1 if case == "json" else None]
        return {**parts, key: torch.tensor(list(text.encode()), dtype=torch.uint8)}, meaning

    samples.write(tmp_path / "m", encode, STATED, **SIZES)
    recipe = f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/m}}]\n"
    with pytest.raises(gm.ModelError):
        gm.plan(recipe)
    (tmp_path / "r.yml").write_text(recipe)
    assert main(["plan", str(tmp_path / "r.yml")]) == 3
    assert "_proj.weight" in capsys.readouterr().err
