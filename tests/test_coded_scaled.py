"""8-bit codes with scales for groups and blocks, with zero points: against definitions and compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import coded_samples as samples
import geomerge as gm
from geomerge.cli.app import main

BLOCKY = {"hidden_size": 160, "intermediate_size": 136, "head_dim": 80}
"""Sizes of which neither is a multiple of 128."""


def fp8_blocks(size: int, dtype: torch.dtype, scale: torch.dtype = torch.float32) -> samples.Encode:
    """FP8 in blocks: each block of the matrix has its own scale; the definition, block by block."""

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        scales = torch.empty(-(-rows // size), -(-columns // size), dtype=scale)
        codes = torch.empty(rows, columns, dtype=dtype)
        decoded = torch.empty(rows, columns, dtype=torch.float64)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                scales[i, j] = weight[block].abs().max() / torch.finfo(dtype).max
                codes[block] = (weight[block] / scales[i, j].float()).to(dtype)
                decoded[block] = codes[block].double() * scales[i, j].double()
        return {name: codes, f"{name}_scale_inv": scales}, decoded

    return encode


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("size", [128, 48])
def test_fp8_in_blocks(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    """Blocks of the size that the config states, those at the edges smaller."""
    stated = {"quant_method": "fp8", "weight_block_size": [size, size], "activation_scheme": "dynamic"}
    expected = samples.write(tmp_path / "m", fp8_blocks(size, dtype), stated, **BLOCKY)
    samples.check(tmp_path / "m", expected)


def test_fp8_in_blocks_without_a_statement(tmp_path: Path) -> None:
    """Blocks of 128×128 are the format's own; scales may be powers of two in a byte."""
    encode = fp8_blocks(128, torch.float8_e4m3fn, torch.float8_e8m0fnu)
    expected = samples.write(tmp_path / "m", encode, {"quant_method": "fp8"}, **BLOCKY)
    samples.check(tmp_path / "m", expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_and_zero_points(symmetric: bool, tmp_path: Path) -> None:
    """compressed-tensors' own dequantisation of int8 groups with zero points."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle import dequantize

    args = QuantizationArgs(num_bits=8, type="int", symmetric=symmetric, strategy="group", group_size=8)
    generator = torch.Generator().manual_seed(0)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = torch.randint(-128, 128, weight.shape, dtype=torch.int8, generator=generator)
        scales = torch.rand(weight.shape[0], weight.shape[1] // 8, generator=generator)
        parts = {name: codes, f"{name}_scale": scales}
        zeros = None
        if not symmetric:
            zeros = torch.randint(-128, 128, scales.shape, dtype=torch.int8, generator=generator)
            parts[f"{name}_zero_point"] = zeros
        return parts, dequantize(codes, scales.double(), zeros, args, dtype=torch.float64)

    stated = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    expected = samples.write(tmp_path / "m", encode, stated, hidden_size=24, intermediate_size=40)
    samples.check(tmp_path / "m", expected)


def test_one_scale_beside_the_weight(tmp_path: Path) -> None:
    """fp8 checkpoints of diffusion models: ``X.weight`` and ``X.scale_weight``, and no statement at all."""

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale = weight.to(torch.float8_e4m3fn), torch.tensor(0.37)
        stem = name.removesuffix("weight")
        return {
            name: codes,
            f"{stem}scale_weight": scale,
            f"{stem}scale_input": scale.clone(),
        }, codes.double() * scale.double()

    expected = samples.write(tmp_path / "m", encode, {})
    samples.check(tmp_path / "m", expected)


@pytest.mark.parametrize("grid", [(3, 2, 2), (3, 200, 1), (3, 1, 1)], ids=["blocks", "rows", "matrices"])
def test_experts_in_one_tensor(grid: tuple[int, int, int], tmp_path: Path) -> None:
    """Each expert has the scales of a matrix of its own."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 200, 150, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=generator)
    expected = codes.double()
    for e in range(3):
        for i in range(200):
            for j in range(0, 150, 50):  # 128 is no edge of these pieces: they are cut there
                for low, high in ((j, min(j + 50, 128)), (max(j, 128), j + 50)):
                    row = 0 if grid[1] == 1 else i // (128 if grid[1] == 2 else 1)
                    column = low // 128 if grid[2] == 2 else 0
                    if low < high:
                        expected[e, i, low:high] *= scales[e, row, column].double()
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({name: codes, f"{name}_scale_inv": scales}, tmp_path / "m.safetensors")
    for piece in (None, 37, 1000):
        assert torch.equal(samples.decoded(tmp_path / "m.safetensors", piece)[name], expected)


@pytest.mark.parametrize(
    ("dtype", "scale", "match"),
    [
        (torch.int8, torch.float32, "two 4-bit floats"),
        (torch.uint8, torch.float32, "holds codes"),
        (torch.float8_e4m3fn, torch.uint8, "scales of the dtype uint8"),
    ],
)
def test_other_codes_among_fp8(dtype: torch.dtype, scale: torch.dtype, match: str, tmp_path: Path) -> None:
    """Bytes in an FP8 model may be pairs of 4-bit floats, and scales bare exponents: neither is taken for a number."""
    inner = fp8_blocks(128, torch.float8_e4m3fn)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, meaning = inner(name, weight)
        if "up_proj" in name:
            parts[name] = torch.ones(weight.shape, dtype=dtype)
            parts[f"{name}_scale_inv"] = parts[f"{name}_scale_inv"].to(scale)
        return parts, meaning

    samples.write(tmp_path / "m", encode, {"quant_method": "fp8"}, **BLOCKY)
    with pytest.raises(gm.IncompatibleModels, match=match):
        gm.plan(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/m}}]\n")


@pytest.mark.parametrize("shape", [(3, 2), (1, 2), (40,)])
def test_scales_that_do_not_fit(shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused as damage, exit code 3, naming the tensor and both shapes."""

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = torch.ones(shape or weight.shape)
        return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}, weight

    samples.write(tmp_path / "m", encode, {"quant_method": "fp8"}, **BLOCKY)
    with pytest.raises(gm.DamagedCheckpoint, match=r"does not fit codes of 1[36][60] rows"):
        samples.decoded(tmp_path / "m")
    assert main(["inspect", str(tmp_path / "m"), "--json"]) == 3
    assert "weight_scale_inv" in capsys.readouterr().err
