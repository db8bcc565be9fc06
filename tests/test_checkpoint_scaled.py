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


@pytest.mark.parametrize("change", ["no scale", "packed"])
def test_what_cannot_be_decoded_is_refused(change: str, family: dict[str, tiny.Tensors]) -> None:
    """Codes without a scale of a known form are never merged as numbers."""
    pytest.importorskip("compressed_tensors")
    quantise(Path("a"), Path("a8"), dtype=torch.int8, strategy="channel", scale=torch.float32)
    tensors: dict[str, Any] = load_file("a8/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "no scale":
        del tensors[f"{name}_scale"]
    else:
        config = tiny.config(Path("a8"))
        config["quantization_config"]["format"] = "pack-quantized"
        Path("a8/config.json").write_text(json.dumps(config))
    save_file(tensors, "a8/model.safetensors")
    with pytest.raises(gm.IncompatibleModels, match="quantised"):
        gm.plan(SLERP.format(a="a8", b="b"))


class TestRequantize:
    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
    @pytest.mark.parametrize("strategy", ["channel", "tensor"])
    def test_the_same_scheme(self, dtype: torch.dtype, strategy: str, family: dict[str, tiny.Tensors]) -> None:
        """Codes are those that compressed-tensors makes of the merge; the error is at most 1.5 times the parents'."""
        pytest.importorskip("compressed_tensors")
        for name in "ab":
            quantise(Path(name), Path(f"{name}8"), dtype=dtype, strategy=strategy, scale=torch.float32)
        text = SLERP.format(a="a8", b="b8")
        gm.merge(text + "dtype: float64\n", "plain")
        quantise(Path("plain"), Path("expected"), dtype=dtype, strategy=strategy, scale=torch.float32)
        gm.merge(text + "requantize: same\n", "found", tile=100)
        expected, found, plain = (tiny.read(Path(p)) for p in ("expected", "found", "plain"))
        config = tiny.config(Path("found"))
        assert config["quantization_config"] == tiny.config(Path("a8"))["quantization_config"]
        for name, entry in tiny.manifest(Path("found"))["tensors"].items():
            if "codes" not in entry:
                continue
            scale = found[f"{name}_scale"].double()
            assert torch.allclose(scale, expected[f"{name}_scale"].double(), rtol=1e-6)
            assert entry["codes"]["scale"] == 1.0
            assert found[name].dtype == dtype
            differ = (found[name].double() - expected[name].double()).ne(0).double().mean()
            assert differ < 0.01  # halves, and quotients in float32
            error = (found[name].double() * scale - plain[name]).norm() / plain[name].norm()
            assert entry["codes"]["error"] == pytest.approx(float(error), rel=1e-6)
            assert entry["codes"]["error"] <= 1.5 * entry["codes"]["parents"]

    def test_error_of_the_parents(self, family: dict[str, tiny.Tensors]) -> None:
        """What the scales say of the parents' error is what quantising them did cost, to a few per cent."""
        pytest.importorskip("compressed_tensors")
        decoded = quantise(Path("a"), Path("a8"), dtype=torch.int8, strategy="channel", scale=torch.float32)
        gm.merge(SLERP.format(a="a8", b="a8b").replace("a8b", "b") + "requantize: same\n", "out")
        name = "model.layers.0.mlp.gate_proj.weight"
        true = (decoded[name] - family["a"][name].double()).norm() / family["a"][name].double().norm()
        assert tiny.manifest(Path("out"))["tensors"][name]["codes"]["parents"] == pytest.approx(float(true), rel=0.1)

    def test_outliers_are_clipped_when_that_is_better(self) -> None:
        """One element that is far larger than all others does not take their precision from them beyond the allowance."""
        from geomerge.engine.codes import encode
        from geomerge.methods import registry
        from geomerge.methods.kernel import prepare
        from geomerge.methods.tile import Scan, TensorSource

        x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x[:, 0] = 5.2
        method = registry.get("passthrough").make({}, count=1)
        prepared = prepare(method, lambda **o: Scan([TensorSource(x)], x.shape, **o), tuple(x.shape))
        codes: dict[int, torch.Tensor] = {}
        parents = [torch.full((4,), 0.02, dtype=torch.float64)]
        scales, cost = encode(
            prepared,
            4,
            4096,
            codes="I8",
            scale="F32",
            parents=parents,
            write=lambda at, c: codes.update({at: c.clone()}),
        )
        found = torch.cat([codes[at] for at in sorted(codes)]).view(4, 4096).double() * scales.double()[:, None]
        assert float((found - x).norm() / x.norm()) == pytest.approx(cost.error, rel=1e-9)
        unclipped = (5.2 / 127) / 12**0.5 * x.numel() ** 0.5 / float(x.norm())
        assert cost.error < unclipped

    def test_a_plain_base_has_no_scheme(self, family: dict[str, tiny.Tensors]) -> None:
        with pytest.raises(gm.RecipeError, match="needs a base"):
            gm.plan(SLERP.format(a="a", b="b") + "requantize: same\n")
