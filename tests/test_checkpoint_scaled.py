"""Parents of 8-bit codes with scales: decoded exactly, against compressed-tensors' own arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import geomerge as gm
import tiny

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SLERP = "merge_method: slerp\nbase_model: {a}\nmodels: [{{model: {b}}}]\nparameters: {{t: 0.4}}\n"


def quantise(
    source: Path, target: Path, *, dtype: torch.dtype, strategy: str, scale: torch.dtype
) -> dict[str, torch.Tensor]:
    """Write a model's linear layers as codes with scales, by compressed-tensors; returns the decoded tensors in float64."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle import quantize

    kind = "int" if dtype == torch.int8 else "float"
    args = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy=strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    written, decoded = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not any(f"{m}.weight" in name for m in LINEAR):
            written[name], decoded[name] = tensor, tensor.double()
            continue
        largest = tensor.abs().amax(1, keepdim=True) if strategy == "channel" else tensor.abs().max().reshape(1)
        scales = (largest / (127 if kind == "int" else 448)).to(scale)
        codes = quantize(tensor.float(), scales.float(), torch.zeros_like(scales), args, dtype=dtype)
        written |= {name: codes, f"{name}_scale": scales}
        decoded[name] = codes.double() * scales.double()
    target.mkdir()
    save_file(written, target / "model.safetensors")
    stated = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }
    config = tiny.config(source) | {"quantization_config": stated}
    (target / "config.json").write_text(json.dumps(config))
    return decoded


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tiny.Tensors]:
    monkeypatch.chdir(tmp_path)
    return tiny.family(tmp_path, "a b", hidden_size=24, intermediate_size=40)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_decoded_merge(
    dtype: torch.dtype, strategy: str, scale: torch.dtype, family: dict[str, tiny.Tensors], tmp_path: Path
) -> None:
    """Merging codes is merging what they stand for, bit for bit; tiles cut rows anywhere; the config forgets the codes."""
    pytest.importorskip("compressed_tensors")
    for name in "ab":
        decoded = quantise(Path(name), Path(f"{name}8"), dtype=dtype, strategy=strategy, scale=scale)
        tiny.save(Path(f"{name}64"), decoded, tiny.config(Path(name)))
    gm.merge(SLERP.format(a="a64", b="b64") + "dtype: float64\n", "expected")
    gm.merge(SLERP.format(a="a8", b="b8") + "dtype: float64\n", "found", tile=100)
    expected, found = tiny.read(Path("expected")), tiny.read(Path("found"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "quantization_config" not in tiny.config(Path("found"))


def test_a_quantised_and_a_plain_parent(family: dict[str, tiny.Tensors]) -> None:
    """They go together; without a dtype the output has that of the scales or of the plain parent, whichever is wider."""
    pytest.importorskip("compressed_tensors")
    decoded = quantise(Path("b"), Path("b8"), dtype=torch.int8, strategy="channel", scale=torch.bfloat16)
    gm.merge(SLERP.format(a="a", b="b8"), "out")
    name = "model.layers.0.mlp.up_proj.weight"
    merged = gm.methods.slerp(family["a"][name].double(), [decoded[name]], t=0.4)
    assert torch.equal(tiny.read(Path("out"))[name], merged.float())


def test_copies_are_decoded(family: dict[str, tiny.Tensors]) -> None:
    """A passthrough of a quantised model is the decoded model."""
    pytest.importorskip("compressed_tensors")
    decoded = quantise(Path("a"), Path("a8"), dtype=torch.int8, strategy="channel", scale=torch.float32)
    gm.merge("merge_method: passthrough\nmodels: [{model: a8}]\ndtype: float64\n", "out")
    assert all(torch.equal(tensor, decoded[name]) for name, tensor in tiny.read(Path("out")).items())


@pytest.mark.parametrize("change", ["no scale", "zero point", "groups", "packed"])
def test_what_cannot_be_decoded_is_refused(change: str, family: dict[str, tiny.Tensors]) -> None:
    """Codes without a scale of a known form are never merged as numbers."""
    pytest.importorskip("compressed_tensors")
    quantise(Path("a"), Path("a8"), dtype=torch.int8, strategy="channel", scale=torch.float32)
    tensors: dict[str, Any] = load_file("a8/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "no scale":
        del tensors[f"{name}_scale"]
    elif change == "zero point":
        tensors[f"{name}_zero_point"] = torch.zeros(40, 1, dtype=torch.int8)
    elif change == "groups":
        tensors[f"{name}_scale"] = torch.ones(40, 3)
    else:
        config = tiny.config(Path("a8"))
        config["quantization_config"]["format"] = "pack-quantized"
        Path("a8/config.json").write_text(json.dumps(config))
    save_file(tensors, "a8/model.safetensors")
    with pytest.raises(gm.IncompatibleModels, match="quantised"):
        gm.plan(SLERP.format(a="a8", b="b"))
