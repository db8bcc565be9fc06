"""Live merges: the module is the merge that would have been written, and the parents are read and measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import geomerge as gm
import tiny
import token_samples
from geomerge.engine import build, sources
from geomerge.engine.live import LiveMerge

RECIPE = "merge_method: {method}\nbase_model: a\nmodels: [{{model: b}}]\n{more}"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A module of the family's architecture; the working directory holds models a and b."""
    monkeypatch.chdir(tmp_path)
    tiny.family(tmp_path, num_hidden_layers=3)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)


def recipe(method: str = "slerp", more: str = "parameters: {t: 0.3}\n") -> Any:
    return gm.load_recipe(RECIPE.format(method=method, more=more))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("slerp", "parameters: {t: 0.3}\n"),
        ("slerp", "parameters: {t: 0.3, angle_scope: group}\n"),
        ("layer_adaptive_slerp", "schedule: H65\n"),
        ("ties", "parameters: {density: 0.5, weight: 1}\n"),
        ("tsvm", "parameters: {lambda: 0.7}\n"),
        ("passthrough", ""),
    ],
)
def test_the_module_is_the_merge(method: str, more: str, module: torch.nn.Module) -> None:
    """Every parameter equals the tensor that a merge to disk writes; a second candidate replaces the first whole."""
    if method == "passthrough":
        text = gm.load_recipe("merge_method: passthrough\nmodels: [{model: b}]\n")
    else:
        text = recipe(method, more)
    live = LiveMerge({"a": "a", "b": "b"}, module)
    live.blend(recipe("linear", "parameters: {weight: 0.5}\n"))
    live.blend(text)
    gm.merge(text, "out")
    written = tiny.read(Path("out"))
    state = module.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in written.items())


def test_parents_with_other_vocabularies(tmp_path: Path) -> None:
    """No policy helps a module that has the rows of one of them: the hint says what does."""
    for name, more in (("x", ()), ("y", (token_samples.special("<|user|>"),))):
        tokenizer = token_samples.bpe(token_samples.GERMAN, 290, *more)
        tiny.llama(tmp_path / name, 0, vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1)
        token_samples.save(tmp_path / name, tokenizer)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    live = LiveMerge({name: tmp_path / name for name in "xy"}, module)
    for policy in ("", "tokenizer_source: union\n"):
        text = f"merge_method: linear\nmodels: [{{model: x}}, {{model: y}}]\nparameters: {{weight: 1}}\n{policy}"
        with pytest.raises(gm.IncompatibleModels, match="geomerge transplant"):
            live.blend(gm.load_recipe(text))


def test_parents_are_read_once_and_measured_once(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the parents are in memory no file is read; the Gram matrices of one candidate serve the next."""
    live = LiveMerge({"a": "a", "b": "b"}, module)
    monkeypatch.setattr(sources, "read_into", lambda *_: pytest.fail("a file was read"))
    live.blend(recipe())
    first = module.state_dict()["lm_head.weight"].clone()
    monkeypatch.setattr(build, "measure_gram", lambda *_: pytest.fail("measured again"))
    live.blend(recipe(more="parameters: {t: 0.6}\n"))
    assert not torch.equal(module.state_dict()["lm_head.weight"], first)


def test_matrices_are_computed_once_for_all_lambda(module: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another λ blends what is there; another parameter of the method computes anew."""
    live = LiveMerge({"a": "a", "b": "b"}, module)
    live.blend(recipe("iso_c", "parameters: {lambda: 0.5}\n"))
    with monkeypatch.context() as patch:
        patch.setattr(build, "merge_matrix", lambda *_: pytest.fail("computed again"))
        live.blend(recipe("iso_c", "parameters: {lambda: 1.5}\n"))
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(pytest.fail.Exception):
            live.blend(recipe("iso_c", "parameters: {support_only: false}\n"))
    gm.merge(recipe("iso_c", "parameters: {lambda: 1.5}\n"), "out")
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tiny.read(Path("out")).items())


def test_a_module_of_another_shape_is_refused(module: torch.nn.Module) -> None:
    """Before anything is blended."""
    live = LiveMerge({"a": "a", "b": "b"}, torch.nn.Linear(2, 2))
    with pytest.raises(gm.IncompatibleModels, match="the module has no"):
        live.blend(recipe())
    module.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(gm.IncompatibleModels, match="lacks extra"):
        LiveMerge({"a": "a", "b": "b"}, module).blend(recipe())


def test_names_in_memory_may_differ_from_names_on_disk() -> None:
    """transformers keeps a ViT's tensors under other names than its files do: every parameter is the merge's all the same."""
    from safetensors.torch import load_file

    from geomerge.lab.suite import load_suite

    suite = load_suite("glyphs")
    paths = {"a": suite.experts["greek"], "b": suite.experts["math"]}
    module = suite.load(suite.base)
    text = gm.load_recipe("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 0.5}\n")
    LiveMerge(paths, module).blend(text)
    a, b = (load_file(path / "model.safetensors") for path in paths.values())
    expected = sorted(float(((a[n].double() + b[n].double()) / 2).bfloat16().double().sum()) for n in a)
    assert sorted(float(p.detach().double().sum()) for p in module.parameters()) == pytest.approx(expected, abs=1e-9)
