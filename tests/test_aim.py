"""Activation-informed merging: column factors after a method, the file they come from, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import geomerge as gm
import tiny
from geomerge.engine.plan import Plan
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory
from geomerge.observe import activations
from geomerge.recipe import loads
from test_components import SHAPES, TEXT, new, old, vlm

HEAD = "base_model: base\nmodels: [{model: a}, {model: b}]\ndtype: float64\n"
WEIGHTS = {
    "task_arithmetic": "parameters: {weight: 0.6}\n",
    "ties": "parameters: {weight: 1, density: 0.5}\n",
    "tsvm": "",
    "model_stock": "",
}


@pytest.fixture(autouse=True)
def parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Models base, a and b in the working directory, and activations of a few of their tensors; returns the activations."""
    monkeypatch.chdir(tmp_path)
    base = tiny.llama(tmp_path / "base", 0, num_hidden_layers=2)
    for seed, name in enumerate("ab", 1):
        tiny.llama(tmp_path / name, seed, like=base, num_hidden_layers=2)
    random = np.random.default_rng(0)
    names = [n for n in base if "mlp" in n or "norm" in n or "q_proj" in n]
    acts = {n: torch.from_numpy(random.random(base[n].shape[-1])) for n in names}
    save_file(acts, "act.safetensors")
    return acts


def merged(method: str, steps: str = "", head: str = HEAD) -> dict[str, Tensor]:
    more = f"steps: [{steps}]\n" if steps else ""
    plan, inputs = make_plan(loads(f"merge_method: {method}\n{head}{WEIGHTS.get(method, '')}{more}"))
    return run_in_memory(plan, inputs)


@pytest.mark.parametrize("method", WEIGHTS)
def test_columns_are_scaled_by_how_active_they_are(method: str, parents: dict[str, Tensor]) -> None:
    """θ₀ + (1 − (1 − ω)·a/max a) ⊙ (merge − θ₀) after a method of every family; the rest as it was."""
    plain, got = merged(method), merged(method, "{aim: {statistics: act.safetensors, omega: 0.4}}")
    base = tiny.read(Path("base"))
    for name, tensor in got.items():
        if name not in parents:
            assert torch.equal(tensor, plain[name]), name
            continue
        factor = 1 - 0.6 * parents[name] / parents[name].max()
        want = base[name].double() + factor * (plain[name] - base[name].double())
        assert torch.allclose(tensor, want, rtol=1e-12, atol=1e-14), name


def test_omega_of_one_changes_no_bit_and_of_zero_protects_the_most_active(parents: dict[str, Tensor]) -> None:
    plain = merged("ties")
    assert all(
        torch.equal(t, plain[n]) for n, t in merged("ties", "{aim: {statistics: act.safetensors, omega: 1}}").items()
    )
    none = merged("ties", "{aim: {statistics: act.safetensors, omega: 0}}")
    base = tiny.read(Path("base"))
    for name, acts in parents.items():
        most = int(acts.argmax())
        assert torch.equal(none[name][..., most], base[name][..., most].double())


def test_scales_and_columns_follow_each_other_in_any_order() -> None:
    """Scale, LiNeS (also with a searched alpha) and two sets of columns are diagonal: they commute, bit for bit."""
    acts = {"model.layers.0.mlp.up_proj.weight": torch.rand(16, dtype=torch.float64)}
    save_file(acts, "more.safetensors")
    steps = [
        "{scale: 0.7}",
        "{aim: {statistics: act.safetensors, omega: 0.25}}",
        "{lines: {alpha: auto, beta: 0.5}}",
    ]
    first = merged("ties", ", ".join(steps))
    for order in ((2, 1, 0), (1, 0, 2)):
        again = merged("ties", ", ".join(steps[i] for i in order))
        assert all(torch.equal(t, again[n]) for n, t in first.items())
    two = "{aim: {statistics: act.safetensors}}", "{aim: {statistics: more.safetensors, omega: 0.5}}"
    one, other = merged("tsvm", ", ".join(two)), merged("tsvm", ", ".join(two[::-1]))
    assert all(torch.allclose(t, other[n], rtol=1e-12, atol=1e-15) for n, t in one.items())


def test_sixteen_bit_models_are_merged_in_float64() -> None:
    """TIES of bfloat16 models with columns: the float64 result, rounded once."""
    for name in ("base", "a", "b"):
        config = json.loads(Path(name, "config.json").read_text())
        tiny.save(Path(name), {n: t.bfloat16() for n, t in tiny.read(Path(name)).items()}, config)
    wide = merged("ties", "{aim: {statistics: act.safetensors}}")
    narrow = merged("ties", "{aim: {statistics: act.safetensors}}", HEAD.replace("float64", "bfloat16"))
    assert all(torch.equal(t, wide[n].bfloat16()) for n, t in narrow.items())


def test_zero_activations_leave_the_merge_alone(parents: dict[str, Tensor]) -> None:
    """No activity at all is no reason to protect anything, and never NaN."""
    save_file({n: torch.zeros_like(t) for n, t in parents.items()}, "act.safetensors")
    plain, got = merged("task_arithmetic"), merged("task_arithmetic", "{aim: {statistics: act.safetensors}}")
    assert all(torch.allclose(t, plain[n], rtol=1e-14, atol=0) for n, t in got.items())


def test_plan_and_manifest_name_the_file(parents: dict[str, Tensor]) -> None:
    """Hashed like a model; how many tensors have activations is said; no parent on the card."""
    recipe = loads(
        f"merge_method: ties\n{HEAD}{WEIGHTS['ties']}steps: [{{aim: {{statistics: act.safetensors, omega: 0.4}}}}]\n"
    )
    plan, inputs = make_plan(recipe)
    for checkpoint in inputs:
        checkpoint.close()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    total = len([n for n in plan.nodes if n.rule == "merge"])
    assert any(f"aim: {len(parents)} of {total} merged tensors" in note for note in plan.notes)
    gm.merge(recipe, "out")
    manifest = json.loads(Path("out/geomerge.json").read_text())
    assert manifest["inputs"][-1]["model"] == "act.safetensors"
    assert manifest["inputs"][-1]["fingerprint"] == plan.inputs[-1].fingerprint
    entry = manifest["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert entry["aim"] == [{"statistics": "act.safetensors", "omega": 0.4, "axis": 1}]
    assert "act.safetensors" not in Path("out/README.md").read_text().split("---")[1]


def refused(changed: dict[str, Tensor], what: str, error: type[gm.GeomergeError] = gm.IncompatibleModels) -> None:
    save_file(changed, "act.safetensors")
    text = f"merge_method: ties\n{HEAD}{WEIGHTS['ties']}steps: [{{aim: {{statistics: act.safetensors}}}}]\n"
    with pytest.raises(error, match=what):
        gm.merge(loads(text), "out")
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


def test_files_that_do_not_fit_are_refused() -> None:
    """Unknown names, wrong lengths, negative numbers, NaN: before the output has its name."""
    up = "model.layers.0.mlp.up_proj.weight"
    refused({up: torch.rand(17)}, r"shape \[17\]")
    refused({up: torch.rand(24)}, r"shape \[24\]")  # the outputs', not the inputs'
    refused({up: torch.rand(1, 16)}, r"shape \[1, 16\]")
    refused({"model.layers.7.mlp.up_proj.weight": torch.rand(16)}, "no tensor of base", gm.RecipeError)
    refused({up: -torch.rand(16)}, "negative")
    refused({up: torch.full((16,), float("nan"))}, "not finite")


REFUSED = {
    "no file": ("ties", "{aim: {omega: 0.4}}", "needs statistics"),
    "omega": ("ties", "{aim: {statistics: act.safetensors, omega: 1.5}}", r"omega must lie in \[0, 1\], not 1.5"),
    "before": ("ties", "{aim: {statistics: act.safetensors}}, {dare: 0.5}", "'dare' comes after 'aim'"),
    "no base": ("linear", "{aim: {statistics: act.safetensors}}", "linear has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_cannot_be_are_refused(case: str) -> None:
    method, steps, what = REFUSED[case]
    weight = "parameters: {weight: 1}\n"
    with pytest.raises(gm.RecipeError, match=what):
        make_plan(loads(f"merge_method: {method}\n{HEAD}{weight}steps: [{steps}]\n"))


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's square c_proj has its input features along the first dimension; other architectures follow their own evidence."""
    shapes = {"transformer.h.0.attn.c_attn.weight": (4, 12), "transformer.h.0.attn.c_proj.weight": (4, 4)}
    shapes |= {"transformer.wte.weight": (9, 4), "transformer.h.0.attn.c_proj.bias": (4,)}
    base = tiny.random_tensors(shapes, 0)
    expert = tiny.random_tensors(shapes, 1, like=base)
    acts = {n: torch.tensor([0.0, 1.0, 2.0, 4.0]) for n in list(shapes)[:2]}
    save_file(acts, "act.safetensors")
    head = "base_model: base\nmodels: [{model: a}]\ndtype: float64\n"
    aim = "steps: [{aim: {statistics: act.safetensors, omega: 0}}]\n"
    text = f"merge_method: task_arithmetic\n{head}parameters: {{weight: 1}}\n{aim}"
    factor = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)[:, None]
    for config in ({"model_type": "gpt2", "n_layer": 1, "vocab_size": 9, "n_embd": 4, "n_head": 1}, None):
        for name, tensors in (("base", base), ("a", expert)):
            (tmp_path / name / "config.json").unlink(missing_ok=True)
            tiny.save(tmp_path / name, tensors, config)
        plan, inputs = make_plan(loads(text))
        got = run_in_memory(plan, inputs)
        for name in acts:
            want = base[name].double() + factor * (expert[name].double() - base[name].double())
            assert torch.allclose(got[name], want, rtol=1e-12, atol=1e-15), (name, config)
    save_file({"transformer.h.0.attn.c_proj.weight": acts["transformer.h.0.attn.c_proj.weight"]}, "act.safetensors")
    with pytest.raises(gm.IncompatibleModels, match="square"):
        make_plan(loads(text))


class _RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Conv1D(nn.Module):
    """As GPT-2's: stored (in, out)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = _RMSNorm(3)
        self.wide = Conv1D(3, 4)
        self.layer = nn.LayerNorm(4)
        self.narrow = nn.Linear(4, 3)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.seen: list[bool] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.seen.append(self.training)
        return self.head(self.narrow(self.layer(self.wide(self.norm(self.embed(input_ids))))))


def test_activations_are_means_over_all_positions_that_count() -> None:
    """Linear, Conv1D, LayerNorm and RMSNorm by weight name; padding, tied heads and layers without input are left out."""
    model = _Model()
    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = activations(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:], "attention_mask": mask[1:]}])
    assert set(found) == {"norm.weight", "wide.weight", "layer.weight", "narrow.weight"}
    x = model.embed.weight[torch.tensor([1, 2, 3, 4])].detach().double()
    assert torch.allclose(found["norm.weight"], x.abs().mean(0), rtol=1e-6)
    assert torch.allclose(found["wide.weight"], x.abs().mean(0), rtol=1e-6)
    assert torch.allclose(found["layer.weight"], x.sum(1).abs().mean().expand(4), rtol=1e-6)
    assert found["narrow.weight"].shape == (4,)
    assert model.training
    assert model.seen == [False, False]
    assert not any(m._forward_pre_hooks for m in model.modules())
    everything = activations(model, [ids, (ids,)])
    assert torch.allclose(
        everything["norm.weight"], model.embed.weight[ids.flatten()].detach().double().abs().mean(0), rtol=1e-6
    )
    with pytest.raises(gm.UsageError, match="no batch"):
        activations(model, [])


@pytest.mark.parametrize("named", ["stored", "memory"])
def test_activations_of_a_vision_language_model(named: str, tmp_path: Path) -> None:
    """The file may have the names of the checkpoint, or those that transformers has in memory, with other prefixes."""
    a = vlm(tmp_path / "va", 1)
    vlm(tmp_path / "vb", 2)
    text = "merge_method: task_arithmetic\nbase_model: va\nmodels: [{model: vb}]\ndtype: float64\nparameters: {weight: 1}\n"
    acts = {n: torch.rand(a[old(n)].shape[-1], dtype=torch.float64) for n in SHAPES if "embed" not in n}
    save_file({(old if named == "stored" else new)(n): x for n, x in acts.items()}, "act.safetensors")
    plain, got = read(text), read(text + "steps: [{aim: {statistics: act.safetensors, omega: 0}}]\n")
    for name, x in acts.items():
        base = a[old(name)].double()
        expected = base + (1 - x / x.max()) * (plain[old(name)] - base)
        assert torch.allclose(got[old(name)], expected, rtol=1e-12), name


def test_activations_have_the_names_on_disk(tmp_path: Path) -> None:
    """transformers 5 calls a ViT's weights otherwise in memory than in its files."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.ViTConfig(num_hidden_layers=2, **sizes)
    for name in ("va", "vb"):
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / name)
    model = transformers.ViTModel.from_pretrained(tmp_path / "va", add_pooling_layer=False)
    found = activations(model, [{"pixel_values": torch.randn(2, 3, 8, 8)}])
    assert set(found) <= set(tiny.read(tmp_path / "va"))
    assert any(name not in model.state_dict() for name in found)
    save_file(found, "act.safetensors")
    text = "merge_method: task_arithmetic\nbase_model: va\nmodels: [{model: vb}]\nparameters: {weight: 1}\n"
    plain, got = read(text), read(text + "steps: [{aim: {statistics: act.safetensors}}]\n")
    a, b = (tiny.read(tmp_path / name) for name in ("va", "vb"))
    moved = {n for n in found if not torch.equal(a[n], b[n])}  # a new model's norms are ones
    assert {n for n in plain if not torch.equal(plain[n], got[n])} == moved


def test_activations_of_a_language_model_that_is_the_base_of_a_vlm(tmp_path: Path) -> None:
    """With `components` the output has the VLM's names, and the file still the base's."""
    vlm(tmp_path / "va", 1)
    base = tiny.random_tensors(SHAPES, 2)
    tiny.save(tmp_path / "llm", base, {**TEXT, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False})
    text = (
        "merge_method: task_arithmetic\nbase_model: llm\nmodels: [{model: va}]\ndtype: float64\nparameters: {weight: 1}\n"
        "components: {vision: {copy: va}, projector: {copy: va}}\n"
    )
    name = "model.layers.1.mlp.up_proj.weight"
    acts = torch.rand(base[name].shape[-1], dtype=torch.float64)
    save_file({name: acts}, "act.safetensors")
    plain, got = read(text), read(text + "steps: [{aim: {statistics: act.safetensors, omega: 0}}]\n")
    changed = base[name].double() + (1 - acts / acts.max()) * (plain[old(name)] - base[name].double())
    assert torch.allclose(got.pop(old(name)), changed, rtol=1e-12)
    assert all(torch.equal(x, plain[n]) for n, x in got.items())


def read(text: str) -> dict[str, Tensor]:
    plan, inputs = make_plan(loads(text))
    return run_in_memory(plan, inputs)
