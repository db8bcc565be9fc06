"""What goes wrong gives one clear error: its class and exit code, what and where, and nothing under the output's name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_samples as files
import geomerge as gm
import tiny
import token_samples as samples

LINEAR = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 1}}\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"
TIES = "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n- model: b\n"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory has good models base, a and b, which a case may spoil."""
    monkeypatch.chdir(tmp_path)
    tiny.family(tmp_path, "base a b", num_hidden_layers=2)


@dataclass(frozen=True)
class Case:
    """A recipe (and what is done to the models before), the error's class, and what its text must say, and must not."""

    recipe: str
    error: type[gm.GeomergeError]
    says: tuple[str, ...]
    spoil: Callable[[], object] = lambda: None
    unsaid: tuple[str, ...] = ()


def change(model: str, **tensors: torch.Tensor | None) -> Callable[[], object]:
    """Write a model again with other tensors (``None`` takes one away; ``__`` stands for a dot)."""

    def spoil() -> None:
        found = tiny.read(Path(model))
        for key, tensor in tensors.items():
            name = key.replace("__", ".")
            if tensor is None:
                del found[name]
            else:
                found[name] = tensor
        tiny.save(Path(model), found, tiny.config(Path(model)))

    return spoil


def poisoned(value: float, model: str = "b", name: str = UP) -> Callable[[], object]:
    """Make the last element of one tensor NaN or Inf."""

    def spoil() -> None:
        found = tiny.read(Path(model))
        found[name].view(-1)[-1] = value
        tiny.save(Path(model), found, tiny.config(Path(model)))

    return spoil


def weights(content: bytes) -> Callable[[], object]:
    """Replace b's weight file."""
    return lambda: Path("b/model.safetensors").write_bytes(content)


def cut() -> None:
    """Take the last byte of b's weight file away."""
    file = Path("b/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def indexed(where: str) -> Callable[[], object]:
    """Make b a sharded model whose index places a tensor in another file."""

    def spoil() -> None:
        shutil.rmtree("b")
        files.sharded(Path("b"), {"model-00001-of-00001.safetensors": {"x": [1.0]}}, {"x": where})

    return spoil


def pickled() -> None:
    """Make b a pickled model."""
    tensors = tiny.read(Path("b"))
    Path("b/model.safetensors").unlink()
    torch.save(tensors, "b/pytorch_model.bin")


def tokenized() -> None:
    """Give a and b a tokenizer."""
    for model in "ab":
        samples.save(Path(model), samples.wordpiece(samples.ENGLISH, 40))


class Touch:
    """Pickled: creates a file when it is unpickled without care."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("hacked"),))


def hostile() -> None:
    """Make b a pickle that runs code."""
    Path("b/model.safetensors").unlink()
    Path("b/pytorch_model.bin").write_bytes(pickle.dumps({"x": Touch()}))


CASES: dict[str, Case] = {
    # the recipe
    "unknown key": Case(LINEAR + "dtpye: float16\n", gm.RecipeError, ("<recipe>:5", "'dtpye'", "did you mean 'dtype'")),
    "unknown key in a model": Case(
        LINEAR.replace("{model: a,", "{modle: a,"), gm.RecipeError, ("<recipe>:3", "'modle'", "'model'")
    ),
    "unknown method": Case(
        LINEAR.replace("linear", "liner"), gm.RecipeError, ("<recipe>:1", "'liner'", "did you mean 'linear'")
    ),
    "unknown parameter": Case(
        TIES + "parameters: {weight: 1, densty: 0.5}\n", gm.RecipeError, ("<recipe>:6", "'densty'", "'density'")
    ),
    "no parameter": Case(SLERP, gm.RecipeError, ("<recipe>:1", "'t'")),
    "no weight for one model": Case(
        TIES.replace("- model: a", "- {model: a, parameters: {weight: 1}}"),
        gm.RecipeError,
        ("<recipe>:5", "'weight'", "for b"),
    ),
    "filter that matches nothing": Case(
        SLERP + "parameters:\n  t:\n  - {filter: self_atn, value: 0.1}\n  - {value: 0.5}\n",
        gm.RecipeError,
        ("<recipe>:6", "self_atn", "'t'", "matches no tensor"),
    ),
    "block that is not there": Case(
        SLERP + "parameters: {t: [{block: 7, value: 0.1}, {value: 0.5}]}\n", gm.RecipeError, ("block: 7", "no tensor")
    ),
    "too many models": Case(
        SLERP.replace("[{model: b}]", "[{model: b}, {model: base}]") + "parameters: {t: 0.5}\n",
        gm.RecipeError,
        ("<recipe>:3", "slerp takes exactly 1 model beside the base", "b, base"),
    ),
    "too few models": Case(
        "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]\n",
        gm.RecipeError,
        ("at least 2 models beside the base", "1 is given", ": a"),
    ),
    "missing base": Case(
        TIES.replace("base_model: base\n", "") + "parameters: {weight: 1}\n",
        gm.RecipeError,
        ("<recipe>:1", "ties needs a base model", "base_model: PATH"),
    ),
    "missing base of an interpolation": Case(
        "merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n",
        gm.RecipeError,
        ("<recipe>:1", "slerp needs a base model", "one of the two"),
    ),
    "a weight for some tensors alone": Case(
        TIES + "parameters: {weight: [{filter: mlp, value: 1}]}\n",
        gm.RecipeError,
        ("<recipe>:6", "'weight' has no value for ", "without a filter"),
    ),
    "a weight for some tensors of one model alone": Case(
        TIES.replace("- model: b", "- {model: b, parameters: {weight: [{filter: mlp, value: 1}]}}"),
        gm.RecipeError,
        ("<recipe>:5", "'weight' has no value for ", "without a filter"),
    ),
    "a mistyped rule for missing tokens": Case(
        TIES + "parameters: {weight: 1}\ntokens: {policy: union, missing: opm}\n",
        gm.RecipeError,
        ("<recipe>:7", "'missing' is mean, zero, average, omp", "did you mean 'omp'?"),
    ),
    "too few experts": Case(
        TIES.replace("ties", "model_stock").replace("\n- model: b", ""),
        gm.RecipeError,
        ("<recipe>:4", "model_stock takes at least 2 models beside the base", "1 is given beside the base: a"),
    ),
    "more masks than experts by default": Case(
        TIES.replace("ties", "consensus").replace("\n- model: b", ""),
        gm.RecipeError,
        ("<recipe>:", "k is 2, but there is 1 expert", "give at most 1"),
    ),
    "a base that is two of the models": Case(
        "merge_method: emr\nbase_model: base\nmodels: [{model: base}, {model: a}, {model: base}]\n",
        gm.RecipeError,
        ("<recipe>:3", "the base base is two sources"),
    ),
    "a base that is an expert under another name": Case(
        TIES.replace("- model: b", "- model: ./base") + "parameters: {weight: 1}\n",
        gm.RecipeError,
        ("<recipe>:5", "the base base is one of the experts, as ./base", "leave it out"),
    ),
    "a base that is an expert of a method with a parameter called t": Case(
        TIES.replace("- model: b", "- model: ./base").replace("ties", "iwudi"),
        gm.RecipeError,
        ("<recipe>:5", "the base base is one of the experts, as ./base"),
    ),
    "whole checkpoints where adapters are merged": Case(
        TIES.replace("ties", "knots"),
        gm.RecipeError,
        ("<recipe>:4", "knots merges LoRA adapters here, and a is a whole checkpoint", "full_weights: true"),
    ),
    "whole checkpoints where a parameter says that they are adapters": Case(
        TIES.replace("ties", "optmerge") + "parameters: {mode: lora}\n",
        gm.RecipeError,
        ("<recipe>:4", "optmerge merges LoRA adapters here, and a is a whole checkpoint", "BASE+ADAPTER"),
    ),
    "a base with a weight of its own": Case(
        TIES.replace("- model: b", "- {model: base, parameters: {weight: 1}}\n- model: b")
        + "parameters: {weight: 1}\n",
        gm.RecipeError,
        ("<recipe>:5", "'weight' stands beside the base base", "leave out"),
    ),
    "what all models share beside one of them": Case(
        TIES.replace("- model: b", "- {model: b, parameters: {normalize: false}}") + "parameters: {weight: 1}\n",
        gm.RecipeError,
        ("<recipe>:5", "'normalize' is one value for all models", "the recipe's own `parameters`"),
    ),
    **{
        f"the method {name}": Case(
            LINEAR.replace("linear", name), gm.RecipeError, ("<recipe>:1", f"no method '{name}'", way)
        )
        for name, way in {
            "continual_opcm": "geomerge continue STATE EXPERT --method opcm",
            "greedy_soup": "geomerge soup",
            "trim": "steps: [trim: 0.5]",
            "lines": "steps: [lines: {alpha: 0.3, beta: 0.7}]",
        }.items()
    },
    "a selection among one expert": Case(
        "merge_method: sce\nbase_model: base\nmodels: [{model: a}]\nparameters: {select_topk: 0.1}\n",
        gm.RecipeError,
        ("<recipe>:4", "select_topk below 1 needs 2 experts"),
    ),
    "nothing but the base": Case(
        "merge_method: pcb\nbase_model: base\nmodels: [{model: base}]\n",
        gm.RecipeError,
        ("<recipe>:3", "pcb takes at least 1 model beside the base", "0 are given"),
    ),
    "k larger than the number of experts": Case(
        TIES.replace("ties", "consensus") + "parameters: {k: 3}\n",
        gm.RecipeError,
        ("<recipe>:6", "k is 3, but there are 2 experts"),
    ),
    "an expert's number that is none": Case(
        TIES.replace("ties", "tall_mask") + "parameters: {task: 3}\n",
        gm.RecipeError,
        ("<recipe>:6", "task is 3, but there are 2 experts"),
    ),
    "an expert's name that is none": Case(
        TIES.replace("ties", "emr") + "parameters: {task: ab}\n",
        gm.RecipeError,
        ("<recipe>:6", "task names no expert: 'ab'", "did you mean"),
    ),
    **{
        f"{method} with a density of {density:g}": Case(
            TIES.replace("ties", method) + f"parameters: {{density: {density:g}}}\n",
            gm.RecipeError,
            ("<recipe>:6", f"{method}: density must", f"not {density:g}"),
        )
        for method, density in (
            ("pcb", 0),
            ("pcb", 1.1),
            ("consensus_ties", 0),
            ("knots", 0),
            ("doge_ta", 1.5),
            ("doge_ta", 0),
            ("twin", 0),
        )
    },
    "another vocabulary": Case(
        TIES,
        gm.IncompatibleModels,
        ("<recipe>:5", "the vocabularies differ", "embedding rows"),
        change("b", model__embed_tokens__weight=torch.ones(99, 16)),
    ),
    "values that do not go together": Case(
        TIES.replace("ties", "della").replace("- model: b", "- {model: b, parameters: {epsilon: 0.6}}")
        + "parameters: {weight: 1, density: 0.5}\n",
        gm.RecipeError,
        ("<recipe>:5", "density ± epsilon must lie inside (0, 1), not [-0.1, 1.1] (of b)"),
    ),
    "a scope that is none": Case(
        TIES.replace("ties", "knots") + "parameters: {scope: model}\n",
        gm.RecipeError,
        ("<recipe>:6", "scope must be one of tensor, global"),
    ),
    "experts of another shape": Case(
        TIES.replace("ties", "doge_ta"),
        gm.IncompatibleModels,
        (UP, "base: [24, 16]", "b: [24, 17]"),
        change("b", model__layers__1__mlp__up_proj__weight=torch.ones(24, 17)),
    ),
    "unknown dtype": Case(LINEAR + "dtype: bfloat61\n", gm.RecipeError, ("<recipe>:5", "'bfloat61'", "bfloat16")),
    "dtype of integers": Case(LINEAR + "dtype: int8\n", gm.RecipeError, ("<recipe>:5", "'int8'", "float32")),
    "unknown out_dtype": Case(LINEAR + "out_dtype: f99\n", gm.RecipeError, ("<recipe>:5", "'f99'")),
    "density 0": Case(
        TIES + "parameters: {weight: 1, density: 0}\n",
        gm.RecipeError,
        ("<recipe>:6", "density must lie in (0, 1], not 0"),
        unsaid=("(for ",),
    ),
    "density above 1": Case(
        TIES + "parameters:\n  weight: 1\n  density: [0.5, 1.5]\n", gm.RecipeError, ("density", "(0, 1]", "1.5")
    ),
    "negative density of one model": Case(
        TIES.replace("- model: b", "- {model: b, parameters: {density: -0.1}}") + "parameters: {weight: 1}\n",
        gm.RecipeError,
        ("density", "-0.1"),
    ),
    "t above 1": Case(
        SLERP + "parameters: {t: 1.01}\n",
        gm.RecipeError,
        ("<recipe>:4", "t must lie in [0, 1]", "1.01", "extrapolate: true"),
    ),
    "t below 0": Case(SLERP + "parameters: {t: [0.5, -0.5]}\n", gm.RecipeError, ("t must lie in [0, 1]", "-0.5")),
    "weights that sum to 0": Case(
        LINEAR.replace("b, parameters: {weight: 1}", "b, parameters: {weight: -1}"), gm.RecipeError, ("weight", "0")
    ),
    "weight that is no number": Case(TIES + "parameters: {weight: heavy}\n", gm.RecipeError, ("weight", "'heavy'")),
    "weight that is infinite": Case(TIES + "parameters: {weight: .inf}\n", gm.RecipeError, ("weight", "finite")),
    "weight that is true": Case(
        TIES + "parameters: {weight: yes}\n", gm.RecipeError, ("weight must be a number, not true",)
    ),
    "several values": Case(
        TIES.replace("- model: b", "- {model: b, parameters: {density: 1.5, weight: heavy}}")
        + "parameters: {weight: 1, density: 0.5, lambda: much}\n",
        gm.RecipeError,
        (
            "<recipe>:5: ties: weight",
            "also <recipe>:6: ties: lambda must be a number",
            "'heavy'",
            "ties: density",
            "1.5",
        ),
    ),
    "empty YAML": Case("\n\n", gm.RecipeError, ("<recipe>",)),
    "YAML of a word": Case("hello\nworld\n", gm.RecipeError, ("<recipe>:1",)),
    "broken YAML": Case("merge_method: linear\nmodels: [\n", gm.RecipeError, ("<recipe>:",)),
    "YAML bomb": Case(
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        gm.RecipeError,
        ("aliases expand",),
    ),
    "YAML that constructs": Case(
        LINEAR + "seed: !!python/object/apply:os.system [touch hacked]\n", gm.RecipeError, ("<recipe>:5", "python")
    ),
    "both models and slices": Case(LINEAR + "slices: []\n", gm.RecipeError, ("slices",)),
    "a model as a LoRA": Case(LINEAR.replace("model: a,", "model: a+b,"), gm.ModelError, ("b", "not a LoRA adapter")),
    "unknown schedule": Case(SLERP + "schedule: Z\n", gm.RecipeError, ("<recipe>:4", "'Z'")),
    "unknown step": Case(LINEAR + "steps: [{scle: 2}]\n", gm.RecipeError, ("<recipe>:5", "'scle'", "'scale'")),
    "unknown chat template": Case(
        LINEAR + "chat_template: chatlm\n", gm.RecipeError, ("<recipe>:5", "chatlm", "chatml")
    ),
    "negative seed": Case(LINEAR + "seed: -1\n", gm.RecipeError, ("<recipe>:5", "seed")),
    "slices of several lengths": Case(
        "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n  - {model: b, layer_range: [0, 1]}\n",
        gm.RecipeError,
        ("<recipe>:5", "2 and 1 blocks"),
    ),
    "range beyond the model": Case(
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [1, 3]}]\n",
        gm.RecipeError,
        ("<recipe>:3", "[1, 3)", "which has 2 blocks"),
    ),
    # the models
    "no such model": Case(
        LINEAR.replace("model: b", "model: bb"),
        gm.ModelError,
        ("<recipe>:4: bb: ", "no such file or directory", "did you mean 'b'"),
    ),
    "hub id while offline": Case(
        LINEAR.replace("model: b", "model: nobody/nothing"), gm.ModelError, ("nobody/nothing", "HF_HUB_OFFLINE")
    ),
    "shape mismatch": Case(
        LINEAR,
        gm.IncompatibleModels,
        ("<recipe>:4: ", UP, "a: [24, 16]", "b: [24, 17]"),
        change("b", model__layers__1__mlp__up_proj__weight=torch.ones(24, 17)),
    ),
    "as many elements in another shape": Case(
        LINEAR,
        gm.IncompatibleModels,
        (UP, "[24, 16]", "[16, 24]"),
        change("b", model__layers__1__mlp__up_proj__weight=torch.ones(16, 24)),
    ),
    "other vocabulary size": Case(
        LINEAR,
        gm.IncompatibleModels,
        ("40 embedding rows", "41", "tokenizer_source: union"),
        lambda: tiny.llama(Path("b"), 9, num_hidden_layers=2, vocab_size=41),
    ),
    "missing tensor": Case(
        LINEAR, gm.IncompatibleModels, (f"b has no {UP}",), change("b", model__layers__1__mlp__up_proj__weight=None)
    ),
    "missing layer": Case(
        LINEAR,
        gm.IncompatibleModels,
        ("9 tensors", "model.layers.1."),
        lambda: tiny.llama(Path("b"), 9, num_hidden_layers=1),
    ),
    "extra tensor": Case(
        LINEAR,
        gm.IncompatibleModels,
        ("a has no model.layers.1.extra, which b has", "unmatched: copy"),
        change("b", model__layers__1__extra=torch.ones(2)),
    ),
    "NaN": Case(LINEAR, gm.NotFiniteError, (f"b: {UP}", "NaN"), poisoned(float("nan"))),
    "Inf": Case(LINEAR, gm.NotFiniteError, (f"b: {UP}", "Inf"), poisoned(float("-inf"))),
    "NaN in a base": Case(
        TIES + "parameters: {weight: 1}\n",
        gm.NotFiniteError,
        ("base: lm_head.weight", "NaN"),
        poisoned(float("nan"), "base", "lm_head.weight"),
    ),
    "NaN in a copied model": Case(
        "merge_method: passthrough\nmodels: [{model: a}]\n",
        gm.NotFiniteError,
        (f"a: {UP}", "NaN"),
        poisoned(float("nan"), "a"),
    ),
    "NaN where the weight is 0": Case(
        SLERP + "parameters: {t: 0}\n", gm.NotFiniteError, (f"b: {UP}",), poisoned(float("nan"))
    ),
    "empty weight file": Case(LINEAR, gm.DamagedCheckpoint, ("b/model.safetensors", "too short"), weights(b"")),
    "header too large": Case(
        LINEAR, gm.DamagedCheckpoint, ("b/model.safetensors", "at most"), weights(files.raw("{}", length=1 << 40))
    ),
    "truncated weights": Case(LINEAR, gm.DamagedCheckpoint, ("b/model.safetensors", "the file has only"), cut),
    "overlapping offsets": Case(
        LINEAR,
        gm.DamagedCheckpoint,
        ("b/model.safetensors", "overlap"),
        weights(files.raw({"x": files.ENTRY, "y": {**files.ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12)),
    ),
    "offsets out of range": Case(
        LINEAR,
        gm.DamagedCheckpoint,
        ("b/model.safetensors", "'x'"),
        weights(files.raw({"x": {**files.ENTRY, "data_offsets": [0, 1 << 40]}}, b"\0" * 8)),
    ),
    "negative shape": Case(
        LINEAR,
        gm.DamagedCheckpoint,
        ("b/model.safetensors", "'x'", "shape"),
        weights(files.raw({"x": {**files.ENTRY, "shape": [-2]}}, b"\0" * 8)),
    ),
    "a tensor twice": Case(
        LINEAR,
        gm.DamagedCheckpoint,
        ("b/model.safetensors", "'x' is given twice"),
        weights(files.raw('{"x": %s, "x": %s}' % ((json.dumps(files.ENTRY),) * 2), b"\0" * 8)),
    ),
    "wrong index": Case(
        LINEAR, gm.DamagedCheckpoint, ("b", "model-00002.safetensors"), indexed("model-00002.safetensors")
    ),
    "index that leads out": Case(LINEAR, gm.DamagedCheckpoint, ("b", "../a"), indexed("../a/model.safetensors")),
    "index with an absolute path": Case(LINEAR, gm.DamagedCheckpoint, ("b", "/etc/passwd"), indexed("/etc/passwd")),
    "no weights": Case(LINEAR, gm.ModelError, ("b",), lambda: Path("b/model.safetensors").unlink()),
    "damaged config": Case(
        LINEAR, gm.DamagedCheckpoint, ("b/config.json",), lambda: Path("b/config.json").write_text("{")
    ),
    "pickle without permission": Case(
        LINEAR, gm.ModelError, ("b: ", "pytorch_model.bin", "pickle", "allow it"), pickled
    ),
    "quantised parent": Case(
        LINEAR,
        gm.IncompatibleModels,
        ("b", "quantised", "gptq"),
        lambda: Path("b/config.json").write_text(
            json.dumps(tiny.config(Path("b")) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
        ),
    ),
    "tokenizer policy without tokenizers": Case(
        LINEAR + "tokenizer_source: union\n", gm.IncompatibleModels, ("a", "no tokenizer files")
    ),
    "base policy without a base": Case(
        LINEAR + "tokenizer_source: base\n", gm.RecipeError, ("<recipe>:5", "no base model"), tokenized
    ),
}
CODES = {gm.RecipeError: 2, gm.UsageError: 2, gm.RunError: 1}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    """Each line of the table: class, exit code, text; the output does not exist, nor does anything beside it."""
    case = CASES[name]
    case.spoil()
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(case.error) as caught:
        gm.merge(case.recipe, "out")
    if case.error is not gm.GeomergeError:
        assert caught.value.exit_code == CODES.get(case.error, 3)
    assert not any(text in str(caught.value) for text in case.unsaid)
    for text in case.says:
        assert text in str(caught.value), str(caught.value)
    assert "Traceback" not in str(caught.value)
    after = sorted(p.name for p in tmp_path.iterdir())
    assert after == before
    assert not Path("hacked").exists()


def test_an_output_where_no_directory_can_be() -> None:
    """Linux's /proc says of a new directory that there is no such file, however often it is asked."""
    with pytest.raises(gm.RunError, match="cannot be made"):
        gm.merge(LINEAR, "/proc/geomerge/out")


def test_planning_finds_all_but_bad_numbers(tmp_path: Path) -> None:
    """What is wrong with a recipe or a model's structure is found by `plan`, before any weight is read."""
    for name in ("filter that matches nothing", "t above 1", "missing base", "weights that sum to 0"):
        with pytest.raises(CASES[name].error):
            gm.plan(CASES[name].recipe)


def test_extrapolation_has_to_be_asked_for() -> None:
    """t outside [0, 1] works with `extrapolate: true`."""
    merged = gm.merge_state_dicts(SLERP + "parameters: {t: 1.5}\nextrapolate: true\n")
    assert torch.isfinite(merged[UP]).all()
    assert not torch.equal(merged[UP], gm.merge_state_dicts(SLERP + "parameters: {t: 1}\n")[UP])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "recipe.yml"),
        (b"\xff\xfem\0e\0", "recipe.yml"),
        (bytes(range(256)), "recipe.yml"),
        (Path(sys.executable).resolve().read_bytes()[:4096], "recipe.yml"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, says: str) -> None:
    """An empty file, a picture, UTF-16, noise, a program: a RecipeError that names the file."""
    Path("recipe.yml").write_bytes(content)
    with pytest.raises(gm.RecipeError, match=says) as caught:
        gm.merge("recipe.yml", "out")
    assert "recipe.yml" in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize("given", [{"merge_method": "linear"}, None, b"merge_method: linear\n", 7])
def test_recipes_of_other_types(given: Any) -> None:
    """Python's callers get a usage error, too."""
    with pytest.raises(gm.UsageError, match="a recipe is a path, YAML text"):
        gm.merge(given, "out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"a": torch.nn.Linear(2, 2)}, "a: a model in memory is a state dict, not Linear"),
        ({"a": {"w": 1}}, "a: a state dict maps names to tensors, not 'w' to int"),
        ({"a": {1: torch.ones(2)}}, "a: a state dict maps names to tensors, not 1 to Tensor"),
        ([torch.ones(2)], "not list"),
        ({1: {}}, "text, not 1"),
    ],
)
def test_models_in_memory_of_other_types(models: Any, said: str) -> None:
    """What is expected is said."""
    with pytest.raises(gm.UsageError) as caught:
        gm.merge_state_dicts(LINEAR, models)
    assert said in str(caught.value)


def test_recipe_that_is_not_there() -> None:
    """A path without a file is a recipe error, too, and so is a directory."""
    for path in ("recipe.yaml", "a"):
        with pytest.raises(gm.RecipeError, match=path):
            gm.merge(path, "out")


def test_a_model_as_the_recipe() -> None:
    """The weights themselves given as the recipe: refused quickly."""
    with pytest.raises(gm.RecipeError, match=r"model\.safetensors"):
        gm.merge("a/model.safetensors", "out")


def test_pickles_with_permission_run_nothing(tmp_path: Path) -> None:
    """With permission a pickle of tensors is read; one that would run code is refused and runs nothing."""
    expected = gm.merge_state_dicts(LINEAR)
    pickled()
    gm.merge(LINEAR, "out", allow_pickle=True)
    assert tiny.same(tiny.read(tmp_path / "out"), expected)
    tiny.save(tmp_path / "b", tiny.read(tmp_path / "a"))
    hostile()
    with pytest.raises(gm.DamagedCheckpoint, match=r"pytorch_model\.bin"):
        gm.merge(LINEAR, "out2", allow_pickle=True)
    assert not Path("hacked").exists()


# -- the output's place ------------------------------------------------------------------------------------------------


def test_output_exists() -> None:
    """A directory with something in it is refused and stays; `force` replaces models only."""
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("work of years")
    for force in (False, True):
        with pytest.raises(gm.UsageError, match="out") as caught:
            gm.merge(LINEAR, "out", force=force)
        assert caught.value.exit_code == 2
    assert Path("out/thesis.txt").read_text() == "work of years"
    assert not Path("out.partial").exists()
    Path("file").write_text("x")
    with pytest.raises(gm.UsageError, match="not a directory"):
        gm.merge(LINEAR, "file")


@pytest.mark.parametrize("out", ["a", "a/merged", "./b/../b/x/y", "."])
def test_output_inside_an_input(out: str) -> None:
    """The output may not be an input, lie in one, or hold one; the inputs stay as they are."""
    before = tiny.digests(Path())
    for force in (False, True):
        with pytest.raises(gm.UsageError, match="input"):
            gm.merge(LINEAR, out, force=force)
    assert tiny.digests(Path()) == before


def test_output_through_a_link_into_an_input() -> None:
    """Links do not hide it."""
    Path("link").symlink_to("a")
    with pytest.raises(gm.UsageError, match="inside the input"):
        gm.merge(LINEAR, "link/out")
    assert not Path("a/out").exists()


def test_force_keeps_the_old_model_until_the_new_one_is_whole() -> None:
    """A failing run with `force` leaves the old output."""
    gm.merge(LINEAR, "out")
    before = tiny.digests(Path("out"))
    poisoned(float("nan"))()
    with pytest.raises(gm.NotFiniteError):
        gm.merge(LINEAR, "out", force=True)
    assert tiny.digests(Path("out")) == before
    gm.merge("merge_method: passthrough\nmodels: [{model: a}]\n", "out", force=True)
    assert tiny.same(tiny.read(Path("out")), tiny.read(Path("a")))
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b", "base", "out"]


SECOND = """
import sys
import geomerge as gm

class Wait:
    def start(self, total, done):
        print("begun", flush=True)
        sys.stdin.readline()
    def advance(self, nbytes): pass
    def finish(self): pass

gm.merge("recipe.yml", "out", progress=Wait())
"""


def test_two_runs_on_one_output() -> None:
    """The second is refused and names the first's process; the first finishes undisturbed."""
    Path("recipe.yml").write_text(LINEAR)
    first = subprocess.Popen(
        [sys.executable, "-c", SECOND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "begun\n"
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(gm.UsageError, match=f"another run .process {first.pid}."):
                gm.merge(LINEAR, "out", **options)
        first.communicate("go\n", timeout=30)
        assert first.returncode == 0
    finally:
        first.kill()
        first.wait()
    assert tiny.same(tiny.read(Path("out")), gm.merge_state_dicts(LINEAR))


# -- while it runs -----------------------------------------------------------------------------------------------------


class Meanwhile:
    """A progress that does something once, when the first bytes are written."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act: Callable[[], object] | None = act

    def start(self, total: int, done: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        if self.act is not None:
            act, self.act = self.act, None
            act()

    def finish(self) -> None:
        pass


def rewrite() -> None:
    """Replace b's weights by a's, as a download into the same place would."""
    shutil.copy("a/model.safetensors", "b/new")
    Path("b/new").rename("b/model.safetensors")


def grow() -> None:
    """Append to b's weights."""
    with Path("b/model.safetensors").open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    "act",
    [
        lambda: os.utime("b/model.safetensors", ns=(1, 1)),
        rewrite,
        grow,
        lambda: os.truncate("b/model.safetensors", 900),
        lambda: Path("b/model.safetensors").unlink(),
        lambda: shutil.rmtree("b"),
    ],
    ids=["touched", "replaced", "grown", "truncated", "removed", "directory removed"],
)
def test_input_changed_while_running(act: Callable[[], object]) -> None:
    """One error that names the file or its tensor; no output; and what was made is not believed afterwards."""
    kept = Path("kept")
    shutil.copytree("b", kept)
    with pytest.raises(gm.RunError) as caught:
        gm.merge(LINEAR, "out", threads=1, progress=Meanwhile(act))
    assert caught.value.exit_code == 1
    assert str(caught.value.where).startswith(("b/model.safetensors", "b: model."))
    assert not Path("out").exists()
    shutil.rmtree("b", ignore_errors=True)
    shutil.copytree(kept, "b")
    report = gm.merge(LINEAR, "out", resume=True)
    assert report.resumed == 0
    assert tiny.same(tiny.read(Path("out")), gm.merge_state_dicts(LINEAR))


def test_ctrl_c_can_be_resumed() -> None:
    """An interruption leaves OUT.partial and nothing else; the next run goes on."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gm.merge(LINEAR, "out", progress=Meanwhile(interrupt))
    assert not Path("out").exists()
    gm.merge(LINEAR, "out", resume=True)
    assert tiny.same(tiny.read(Path("out")), gm.merge_state_dicts(LINEAR))


def test_failed_runs_close_their_files() -> None:
    """A hundred failures leave no descriptor behind."""
    poisoned(float("nan"))()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(gm.NotFiniteError):
            gm.merge(LINEAR, "out", force=True)
        with pytest.raises(gm.RecipeError):
            gm.plan(SLERP + "parameters: {t: 2}\n")
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=65536", "none", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("mount")
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip() if mounted else 'no mount program'}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place: Path, size: int) -> None:
    """Give the small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def test_disk_too_small_for_the_weights(small_disk: Path) -> None:
    """Known before any work: the bytes needed and the place; after making room the same command completes."""
    tiny.family(Path(), "base a b", vocab_size=900, num_hidden_layers=2)
    with pytest.raises(gm.RunError, match=r"not enough room: [\d,]+ bytes are needed") as caught:
        gm.merge(LINEAR, small_disk / "out")
    assert caught.value.exit_code == 1
    assert str(small_disk) in str(caught.value)
    assert not (small_disk / "out").exists()
    assert sum(p.stat().st_size for p in small_disk.rglob("*") if p.is_file()) < 64  # the room is given back
    resize(small_disk, 1 << 20)
    gm.merge(LINEAR, small_disk / "out", resume=True)
    assert tiny.same(tiny.read(small_disk / "out"), gm.merge_state_dicts(LINEAR))


def test_disk_that_fills_up_while_running(small_disk: Path) -> None:
    """Somebody else takes the rest of the disk: one error, no output, and a resume keeps all tensors that were written."""
    resize(small_disk, 1 << 17)

    def fill() -> None:
        with (small_disk / "other").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass

    with pytest.raises(gm.RunError, match="not enough room") as caught:
        gm.merge(LINEAR, small_disk / "out", progress=Meanwhile(fill))
    assert str(small_disk) in str(caught.value)
    assert not (small_disk / "out").exists()
    (small_disk / "other").unlink()
    report = gm.merge(LINEAR, small_disk / "out", resume=True)
    assert tiny.same(tiny.read(small_disk / "out"), gm.merge_state_dicts(LINEAR))
    assert report.tensors == len(tiny.read(Path("a")))
