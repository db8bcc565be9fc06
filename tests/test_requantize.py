"""Merges of 16-bit models written as int8 or fp8: scheme, codes, errors, and what other libraries make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import geomerge as gm
import tiny
from geomerge.cli.app import main
from geomerge.engine.codes import own_error
from geomerge.engine.loss import RoundingLoss
from geomerge.methods.tile import TensorSource

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.4}\n"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.family(tmp_path, "a b", dtype=torch.bfloat16, **SIZES)


@pytest.mark.parametrize(("asked", "largest"), [("int8", 127.0), ("fp8", 448.0)])
def test_codes_are_the_merge(asked: str, largest: float, family: None) -> None:
    """A row's scale is its largest magnitude over the largest code; codes are the nearest; the rest keeps its numbers."""
    gm.merge(SLERP + "out_dtype: float64\n", "exact")
    gm.merge(SLERP + f"requantize: {asked}\n", "out", tile=100)
    gm.merge(SLERP, "plain")
    exact, found, plain = (tiny.read(Path(p)) for p in ("exact", "out", "plain"))
    linear = [n for n in plain if ".layers." in n and "norm" not in n]
    assert len(linear) == 14
    assert found.keys() == plain.keys() | {f"{n}_scale" for n in linear}
    said = tiny.manifest(Path("out"))["tensors"]
    for name, tensor in plain.items():
        if name not in linear:
            assert torch.equal(found[name], tensor)
            continue
        scale = found[f"{name}_scale"]
        assert torch.equal(scale, (exact[name].abs().amax(1, keepdim=True) / largest).float())
        decoded = found[name].double() * scale.double()
        step = scale.double() if asked == "int8" else exact[name].abs() / 8
        assert (
            (decoded - exact[name]).abs() <= step * 0.5000001 + 1e-9 + (scale.double() / 512 if asked == "fp8" else 0)
        ).all()
        error = float((decoded - exact[name]).norm() / exact[name].norm())
        assert said[name]["codes"]["error"] == pytest.approx(error, rel=1e-9)
        assert error <= 1.5 * said[name]["codes"]["parents"]


@pytest.mark.parametrize("asked", ["int8", "fp8"])
def test_the_parents_error_is_what_they_would_lose(asked: str, family: None) -> None:
    """The larger of what writing either parent as codes costs."""
    report = gm.merge(SLERP + f"requantize: {asked}\n", "out")
    gm.merge(f"merge_method: passthrough\nmodels: [{{model: a}}]\nrequantize: {asked}\n", "own")
    gm.merge(f"merge_method: passthrough\nmodels: [{{model: b}}]\nrequantize: {asked}\n", "other")
    own, other = (tiny.manifest(Path(p))["tensors"] for p in ("own", "other"))
    assert len(report.codes) == 14
    for name, error, parents in report.codes:
        assert parents == pytest.approx(max(m[name]["codes"]["error"] for m in (own, other)), rel=1e-6)
        assert error < 1.5 * parents


@pytest.mark.parametrize("asked", ["int8", "fp8"])
def test_the_config_is_a_preset_of_compressed_tensors(asked: str, family: None) -> None:
    """The scheme is the library's own; the head and the embedding are left alone."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    gm.merge(SLERP + f"requantize: {asked}\n", "out")
    said = tiny.config(Path("out"))["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    preset = preset_name_to_scheme({"int8": "INT8", "fp8": "FP8_DYNAMIC"}[asked], ["Linear"])
    for part in ("weights", "input_activations"):
        ours, theirs = getattr(scheme, part), getattr(preset, part)
        for key in ("num_bits", "type", "symmetric", "strategy", "dynamic"):
            assert getattr(ours, key) == getattr(theirs, key), (part, key)
    assert said["ignore"] == ["lm_head", "model.embed_tokens"]
    assert tiny.config(Path("out"))["dtype"] == "bfloat16"


@pytest.mark.parametrize("asked", ["int8", "fp8"])
def test_it_is_a_parent_again(asked: str, family: None) -> None:
    """What was written is read as what it stands for, and can be written back in the same scheme."""
    gm.merge(SLERP + f"requantize: {asked}\n", "out")
    gm.merge("merge_method: passthrough\nmodels: [{model: out}]\nout_dtype: float64\n", "again")
    written, again = tiny.read(Path("out")), tiny.read(Path("again"))
    for name, tensor in again.items():
        scale = written[f"{name}_scale"].double() if f"{name}_scale" in written else 1.0
        assert torch.equal(tensor, written[name].double() * scale)
    gm.merge("merge_method: passthrough\nmodels: [{model: out}]\nrequantize: same\n", "same")
    assert tiny.same(tiny.read(Path("same")), written)


def test_transformers_loads_it(family: None) -> None:
    """Weights in memory are those that the codes stand for."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    gm.merge(SLERP + "requantize: int8\n", "out")
    how = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="loading attributes"):
        module = AutoModelForCausalLM.from_pretrained("out", quantization_config=how)
    state, written = module.state_dict(), tiny.read(Path("out"))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = written[name].double() * written[f"{name}_scale"].double()
    assert torch.allclose(state[name].double(), expected, rtol=2**-7)


def test_resumed_and_threaded_runs_write_the_same(family: None) -> None:
    """As any output."""
    gm.merge(SLERP + "requantize: fp8\n", "one", threads=1)
    gm.merge(SLERP + "requantize: fp8\n", "two", threads=3, tile=64)
    assert tiny.same(tiny.read(Path("one")), tiny.read(Path("two")))


def test_errors_do_not_depend_on_torch_s_threads() -> None:
    """They are in the manifest, and decide which scales are taken: a dot product of the library's would not do."""
    values = torch.randn(96 * 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = torch.get_num_threads()
    found, lost = set(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.add(own_error(TensorSource(values), 96, 64, "I8"))
            loss = RoundingLoss()
            loss.add(values, values.float(), torch.zeros_like(values))
            lost.add(loss.share)
    finally:
        torch.set_num_threads(before)
    assert len(found) == len(lost) == 1


def test_what_it_is_refused_for(family: None) -> None:
    """An earlier stage, and tensors without a config to tell it to."""
    text = "name: first\n" + SLERP + "requantize: int8\n---\nmerge_method: passthrough\nmodels: [{model: first}]\n"
    with pytest.raises(gm.RecipeError, match="last recipe"):
        gm.plan(text)
    Path("a/model.safetensors").rename("a.safetensors")
    with pytest.raises(gm.RecipeError, match=r"config\.json"):
        gm.plan(SLERP.replace(" a\n", " a.safetensors\n") + "requantize: int8\n")


def test_the_flag_overrides_the_recipe(family: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes are those of a recipe that says so; a saved plan cannot be changed; `same` needs codes."""
    Path("r.yml").write_text(SLERP)
    Path("eight.yml").write_text(SLERP + "requantize: int8\n")
    gm.merge(SLERP + "requantize: fp8\n", "expected")
    for recipe in ("r.yml", "eight.yml"):
        assert main(["merge", recipe, "out", "--requantize", "fp8", "--force", "-q"]) == 0
        assert tiny.same(tiny.read(Path("out")), tiny.read(Path("expected")))
        assert tiny.config(Path("out")) == tiny.config(Path("expected"))
    assert "requantize: fp8" in capsys.readouterr().out
    assert main(["merge", "r.yml", "same", "--requantize", "same", "-q"]) == 2
    assert main(["merge", "r.yml", "same", "--requantize", "int4", "-q"]) == 2
    assert main(["plan", "r.yml", "--save", "plan.json"]) == 0
    assert main(["merge", "plan.json", "saved", "--requantize", "int8"]) == 2
    assert "saved plan" in capsys.readouterr().err


def test_the_table_of_errors(family: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each kind of tensor, worst first, and how many break the 1.5 times rule."""
    Path("r.yml").write_text(SLERP)
    report = gm.merge(SLERP + "requantize: int8\n", "expected")
    assert main(["merge", "r.yml", "out", "--requantize", "int8", "-q"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "model.layers.*." in line]
    assert len(lines) == 7
    ratios = [float(line[4]) for line in lines]
    assert ratios == sorted(ratios, reverse=True)
    for pattern, count, mean, worst, ratio, beyond in lines:
        own = [(e, p) for n, e, p in report.codes if n.endswith(pattern.rpartition("*")[2])]
        assert (int(count), int(beyond)) == (2, 0)
        assert float(mean.rstrip("%")) == pytest.approx(100 * sum(e for e, _ in own) / 2, abs=6e-4)
        assert float(worst.rstrip("%")) == pytest.approx(100 * max(e for e, _ in own), abs=6e-4)
        assert float(ratio) == pytest.approx(max(e / p for e, p in own), abs=6e-3)
    monkeypatch.setattr("geomerge.engine.codes.ALLOWED", 0.1)
    assert main(["merge", "r.yml", "out", "--requantize", "int8", "-q", "--force"]) == 0
    text = capsys.readouterr().out
    assert "14 lose more than 0.1 times" in " ".join(text.split())
    assert all(line.split()[5] == "2" for line in text.splitlines() if "model.layers.*." in line)


def test_the_command_line_shows_the_cost(family: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean and the worst error; in JSON every tensor's."""
    Path("r.yml").write_text(SLERP + "requantize: int8\n")
    assert main(["merge", "r.yml", "out", "--quiet"]) == 0
    assert "14 tensors, error 0." in " ".join(capsys.readouterr().out.split())
    assert main(["merge", "r.yml", "out", "--force", "--json"]) == 0
    codes = json.loads(capsys.readouterr().out)["codes"]
    assert len(codes) == 14
    assert all(0 < each["error"] <= 1.5 * each["parents"] for each in codes)
