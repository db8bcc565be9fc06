"""Codes of a few bits in words: GPTQ, AWQ, compressed-tensors, written and decoded by loops over the layouts' definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import coded_samples as samples
import geomerge as gm
import tiny
from geomerge.cli.app import main

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def draw(shape: tuple[int, int], groups: int, bits: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random codes (out, in), zero points and scales (out, groups)."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 1 << bits, shape)
    zeros = generator.integers(1, 1 << bits, (shape[0], groups))
    return codes, zeros, generator.uniform(0.01, 0.1, (shape[0], groups)).astype(np.float16)


def pack(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack along the last axis, a loop over words: element j of a word at bits·j, or where `order` puts it."""
    each = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // each), dtype=np.uint32)
    for place in range(each):
        element = place if order is None else order[place]
        words |= values[:, element::each].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(words.view(np.int32).copy())


def decode(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: np.ndarray) -> Tensor:
    """(q − z)·s element by element, in float64."""
    values = codes.astype(np.float64) - zeros[:, group]
    return torch.from_numpy(values * scales.astype(np.float64)[:, group])


def gptq(bits: int, size: int, *, shuffled: bool = False, second: bool = False, index: bool = True) -> samples.Encode:
    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        group = np.arange(columns) // size
        if shuffled:
            group = np.random.default_rng(5).permutation(group)
        codes, zeros, scales = draw((rows, columns), columns // size, bits, columns + rows)
        stem = name.removesuffix(".weight")
        parts = {
            f"{stem}.qweight": pack(codes, bits).T,  # words along the columns of the transpose
            f"{stem}.qzeros": pack((zeros if second else zeros - 1).T, bits),
            f"{stem}.scales": torch.from_numpy(scales.T.copy()),
        }
        if index:
            parts[f"{stem}.g_idx"] = torch.from_numpy(group.astype(np.int32))
        return parts, decode(codes, zeros, scales, group)

    return encode


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", ["plain", "shuffled", "second", "no index"])
def test_gptq(bits: int, case: str, tmp_path: Path) -> None:
    """The transpose in words along columns; groups in order, in any, without a list; zero points less one or not."""
    encode = gptq(bits, 32, shuffled=case == "shuffled", second=case == "second", index=case != "no index")
    stated = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False}
    if case == "second":
        stated["format" if bits == 8 else "checkpoint_format"] = "gptq_v2"
    expected = samples.write(tmp_path / "m", encode, stated, **SIZES)
    samples.check(tmp_path / "m", expected, merged=bits == 4)


def test_gptq_biases_that_its_tools_invent(tmp_path: Path) -> None:
    """Biases of zeros beside packed layers are no tensors of the model; others are."""
    inner = gptq(4, 32)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        parts, meaning = inner(name, weight)
        value = 1.5 if "v_proj" in name else 0.0
        return {**parts, name.replace("weight", "bias"): torch.full((weight.shape[0],), value).half()}, meaning

    samples.write(tmp_path / "m", encode, {"quant_method": "gptq", "group_size": 32}, **SIZES)
    found = samples.decoded(tmp_path / "m")
    assert [name for name in found if name.endswith("bias")] == ["model.layers.0.self_attn.v_proj.bias"]


def awq(size: int) -> samples.Encode:
    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        codes, zeros, scales = draw((rows, columns), columns // size, 4, columns + rows)
        stem = name.removesuffix(".weight")
        parts = {
            f"{stem}.qweight": pack(codes.T, 4, AWQ_ORDER),
            f"{stem}.qzeros": pack(zeros.T, 4, AWQ_ORDER),
            f"{stem}.scales": torch.from_numpy(scales.T.copy()),
        }
        return parts, decode(codes, zeros, scales, np.arange(columns) // size)

    return encode


def test_awq(tmp_path: Path) -> None:
    """The transpose in words along rows, their elements interleaved."""
    stated = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    expected = samples.write(tmp_path / "m", awq(32), stated, **SIZES)
    samples.check(tmp_path / "m", expected)


def test_one_word_by_hand() -> None:
    """0x76543210: GPTQ has 0, 1, … 7; AWQ has 0, 4, 1, 5, 2, 6, 3, 7."""
    from geomerge.checkpoint.coded.packed import Awq, unpack

    word = torch.tensor([[0x76543210]], dtype=torch.int32)
    assert unpack(word, 4).tolist() == [list(range(8))]
    layout = Awq("w", "F16", (8, 1), "q", "s", "z", None, 4, 1, False)
    assert layout._columns(word, 0, 8).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert layout._columns(word, 3, 5).tolist() == [[5, 2]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("case", ["group", "asymmetric", "channel", "shuffled"])
def test_compressed_tensors(bits: int, case: str, tmp_path: Path) -> None:
    """Packed by compressed-tensors, and what its own functions make of it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle import dequantize

    strategy = {"strategy": "channel"} if case == "channel" else {"strategy": "group", "group_size": 16}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=case != "asymmetric", **strategy)
    generator = torch.Generator().manual_seed(0)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, weight.shape, dtype=torch.int8, generator=generator)
        scales = torch.rand(rows, 1 if case == "channel" else columns // 16, generator=generator).bfloat16()
        parts = {
            f"{name}_packed": pack_to_int32(codes, bits),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor(weight.shape),
        }
        zeros = None
        if case == "asymmetric":
            zeros = torch.randint(-half, half, scales.shape, dtype=torch.int8, generator=generator)
            parts[f"{name}_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
        if case == "shuffled":
            group = (torch.arange(columns) // 16)[torch.randperm(columns, generator=generator)].int()
            parts[f"{name}_g_idx"] = group
            return parts, codes.double() * scales.double()[:, group.long()]
        return parts, dequantize(codes, scales.double(), zeros, args, dtype=torch.float64)

    weights = args.model_dump(mode="json")
    stated = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }
    expected = samples.write(tmp_path / "m", encode, stated, **SIZES)
    samples.check(tmp_path / "m", expected, merged=bits == 4)


def change(folder: Path, name: str, to: Tensor | None) -> None:
    """Change one tensor of a model, or take it away."""
    tensors = load_file(folder / "model.safetensors")
    if to is None:
        del tensors[name]
    else:
        tensors[name] = to
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("part", "to"),
    [
        ("qweight", torch.zeros(7, 64, dtype=torch.int32)),
        ("qzeros", torch.zeros(2, 7, dtype=torch.int32)),
        ("scales", torch.ones(3, 64).half()),
        ("scales", torch.ones(0, 64).half()),
        ("g_idx", torch.zeros(63, dtype=torch.int32)),
        ("g_idx", torch.full((64,), 2, dtype=torch.int32)),
        ("g_idx", torch.full((64,), -1, dtype=torch.int32)),
    ],
)
def test_damage(part: str, to: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts that do not fit each other are named; exit code 3."""
    samples.write(tmp_path / "m", gptq(4, 32), {"quant_method": "gptq", "group_size": 32}, **SIZES)
    name = f"model.layers.0.self_attn.q_proj.{part}"
    change(tmp_path / "m", name, to)
    (tmp_path / "r.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/m}}]\n")
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]) == 3
    assert "q_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stated", "without", "match"),
    [
        ({"quant_method": "gptq"}, "scales", "another kernel"),
        ({"quant_method": "aqlm"}, None, "aqlm"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, None, "laid out as marlin"),
        ({"quant_method": "awq", "version": "gemv"}, None, "another kernel"),
    ],
)
def test_refusals(stated: dict[str, Any], without: str | None, match: str, tmp_path: Path) -> None:
    """Other layouts are not guessed."""
    samples.write(tmp_path / "m", awq(32) if "awq" in stated.values() else gptq(4, 32), stated, **SIZES)
    if without:
        change(tmp_path / "m", f"model.layers.0.self_attn.q_proj.{without}", None)
    with pytest.raises(gm.IncompatibleModels, match=match):
        gm.plan(f"merge_method: passthrough\nmodels: [{{model: {tmp_path}/m}}]\n")


def test_threads_and_tiles_do_not_matter(tmp_path: Path) -> None:
    """A TIES merge of two GPTQ models with a plain base: the same bits however it is cut."""
    for name, seed in (("a", 1), ("b", 2)):
        samples.write(tmp_path / name, gptq(4, 32), {"quant_method": "gptq", "group_size": 32}, seed=seed, **SIZES)
    tiny.llama(tmp_path / "base", 3, num_hidden_layers=1, dtype=torch.bfloat16, **SIZES)
    recipe = f"merge_method: ties\nbase_model: {tmp_path}/base\nparameters: {{density: 0.3, weight: 0.5}}\nmodels:\n"
    recipe += "".join(f"- {{model: {tmp_path}/{name}}}\n" for name in "ab")
    gm.merge(recipe, tmp_path / "one", threads=1)
    gm.merge(recipe, tmp_path / "two", threads=2, tile=100)
    assert tiny.same(tiny.read(tmp_path / "one"), tiny.read(tmp_path / "two"))
