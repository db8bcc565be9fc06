"""Plans: what is resolved for each tensor, how it is saved and hashed, what the run then records."""

from __future__ import annotations

import json
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

import geomerge as gm
import tiny
from geomerge.engine.estimate import estimate
from geomerge.engine.manifest import as_text, versions
from geomerge.engine.plan import Plan
from geomerge.engine.planner import make_plan
from geomerge.engine.run import run_in_memory

LINEAR = """\
merge_method: linear
models:
- {model: a, parameters: {weight: 1}}
- {model: b, parameters: {weight: 3}}
"""
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tiny.Tensors]:
    """Models base, a, b, c of five blocks in the working directory."""
    monkeypatch.chdir(tmp_path)
    return tiny.family(tmp_path, num_hidden_layers=5)


def values(plan: Plan, parameter: str) -> dict[str, Any]:
    """A parameter's value for each tensor of the output."""
    return {n.name: n.method.values()[parameter] for n in plan.output_nodes() if n.method is not None}


BLOCK = "model.layers.{}."


# -- parameters for each tensor ----------------------------------------------------------------------------------------


def test_schedule_preset(family: dict[str, tiny.Tensors]) -> None:
    """The preset S: attention and MLP by depth, 0.5 for all else."""
    t = values(gm.plan(SLERP + "schedule: S\n"), "t")
    for i, (attention, mlp) in enumerate(zip([0, 0.5, 0.3, 0.7, 1], [1, 0.5, 0.7, 0.3, 0], strict=True)):
        assert t[f"{BLOCK.format(i)}self_attn.q_proj.weight"] == attention
        assert t[f"{BLOCK.format(i)}self_attn.o_proj.weight"] == attention
        assert t[f"{BLOCK.format(i)}mlp.down_proj.weight"] == mlp
        assert t[f"{BLOCK.format(i)}input_layernorm.weight"] == 0.5
    assert t["model.embed_tokens.weight"] == t["model.norm.weight"] == t["lm_head.weight"] == 0.5


@pytest.mark.parametrize(("depth", "head", "norm"), [(0, 0.1, 0.0), (1, 0.9, 0.8)])
def test_schedule_mapping(depth: int, head: float, norm: float, family: dict[str, tiny.Tensors]) -> None:
    """Roles, pieces of names and the default; what stands after the blocks has the depth that the schedule says."""
    text = f"{SLERP}schedule:\n  attention: [0, 1]\n  up_proj: [0.2, 0.4, 0.6]\n  lm_head: [0.1, 0.9]\n  default: [0, 0.8]\n"
    text += f"  post_depth: {depth}\n"
    t = values(gm.plan(text), "t")
    assert [t[f"{BLOCK.format(i)}self_attn.k_proj.weight"] for i in range(5)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [t[f"{BLOCK.format(i)}mlp.up_proj.weight"] for i in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert t[f"{BLOCK.format(4)}mlp.gate_proj.weight"] == pytest.approx(0.8)
    assert t["model.embed_tokens.weight"] == 0
    assert (t["lm_head.weight"], t["model.norm.weight"]) == (head, norm)


def test_schedule_changes_a_preset(family: dict[str, tiny.Tensors]) -> None:
    """A preset with another default, a bias by role (clipped at 1), a glob and a regular expression that go before it."""
    text = (
        SLERP + "schedule: {preset: S, t: 0.6, bias: {attention: 0.1, lm_head: -0.2}, '*k_proj*': 0.3, '/o_proj/': 0}\n"
    )
    t = values(gm.plan(text), "t")
    q = [t[f"{BLOCK.format(i)}self_attn.q_proj.weight"] for i in range(5)]
    assert q == pytest.approx([0.1, 0.6, 0.4, 0.8, 1.0])
    assert t["lm_head.weight"] == pytest.approx(0.4)
    assert t["model.norm.weight"] == 0.6
    assert t["model.layers.2.self_attn.k_proj.weight"] == pytest.approx(0.4)


def test_gradients_give_the_head_the_first_anchor(family: dict[str, tiny.Tensors]) -> None:
    """mergekit's structure: without a schedule, everything outside the blocks takes the first element of a list."""
    t = values(gm.plan(SLERP + "parameters: {t: [0.2, 0.6]}\n"), "t")
    assert t["lm_head.weight"] == t["model.norm.weight"] == t["model.embed_tokens.weight"] == 0.2
    assert [t[f"{BLOCK.format(i)}mlp.up_proj.weight"] for i in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("schedule: X\n", "no schedule 'X'"),
        ("schedule: {attention: 0.5}\n", "default"),
        ("schedule: {preset: SS}\n", "no schedule 'SS'"),
        ("schedule: {preset: S, bias: 3}\n", "'bias' must be a mapping"),
        ("schedule: {preset: S, bias: {atention: 0.1}}\n", "atention"),
        ("schedule: {preset: S, post_depth: 2}\n", "'post_depth' must be 0 or 1"),
        ("schedule: {attention: [a], default: 1}\n", "number"),
        ("schedule: {atention: 0.5, default: 1}\n", "atention"),
        ("schedule: {default: 2}\n", r"t must lie in \[0, 1\]"),
    ],
)
def test_bad_schedules(schedule: str, message: str, family: dict[str, tiny.Tensors]) -> None:
    """An unknown preset, no default, no numbers, a key that no tensor has, a value out of range."""
    with pytest.raises(gm.RecipeError, match=message) as caught:
        gm.plan(SLERP + schedule)
    assert str(caught.value.where).startswith("<recipe>:")


def test_schedule_needs_t(family: dict[str, tiny.Tensors]) -> None:
    """A schedule beside a method that does not interpolate is refused."""
    with pytest.raises(gm.RecipeError, match="does not have"):
        gm.plan(LINEAR + "schedule: S\n")


def test_filters(family: dict[str, tiny.Tensors]) -> None:
    """Role, blocks, glob, regular expression, substring: the first that matches counts."""
    text = f"""{SLERP}parameters:
  t:
  - {{role: attention, block: 1-2, value: 0.1}}
  - {{block: 3, value: 0.2}}
  - {{filter: "*.mlp.*_proj.weight", value: 0.3}}
  - {{filter: "/norm.*weight$/", value: 0.4}}
  - {{filter: lm_head, value: 0.5}}
  - {{value: 0.6}}
"""
    t = values(gm.plan(text), "t")
    assert t[f"{BLOCK.format(1)}self_attn.q_proj.weight"] == t[f"{BLOCK.format(2)}self_attn.v_proj.weight"] == 0.1
    assert t[f"{BLOCK.format(3)}self_attn.q_proj.weight"] == t[f"{BLOCK.format(3)}mlp.up_proj.weight"] == 0.2
    assert t[f"{BLOCK.format(0)}mlp.up_proj.weight"] == 0.3
    assert t[f"{BLOCK.format(4)}input_layernorm.weight"] == t["model.norm.weight"] == 0.4
    assert t["lm_head.weight"] == 0.5
    assert t[f"{BLOCK.format(4)}self_attn.q_proj.weight"] == t["model.embed_tokens.weight"] == 0.6


def test_parameters_by_model_with_filters(family: dict[str, tiny.Tensors]) -> None:
    """Two experts' densities, one with a filter and the recipe's as the fallback, one left to the default."""
    text = """\
merge_method: ties
base_model: base
models:
- {model: a, parameters: {density: [{filter: mlp, value: 0.2}], weight: 1}}
- {model: b, parameters: {weight: [0, 1]}}
parameters: {density: 0.5}
"""
    plan = gm.plan(text)
    density, weight = values(plan, "density"), values(plan, "weight")
    assert density[f"{BLOCK.format(2)}mlp.up_proj.weight"] == (0.2, 0.5)
    assert density[f"{BLOCK.format(2)}self_attn.q_proj.weight"] == (0.5, 0.5)
    assert weight[f"{BLOCK.format(2)}mlp.up_proj.weight"] == (1, 0.5)
    assert weight["lm_head.weight"] == (1, 0)


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_steps_by_hand(method: str, family: dict[str, tiny.Tensors]) -> None:
    """scale and lines multiply the merged task vector: θ₀ + s·(α + β·depth)·(merge − θ₀)."""
    text = TIES.replace("ties", method) + "parameters: {weight: 0.5}\n"
    plain = gm.merge_state_dicts(text + "dtype: float64\n")
    steps = "steps:\n- scale: [{filter: mlp, value: 2}, {value: 1}]\n- lines: {alpha: 0.25, beta: 0.5}\n"
    merged = gm.merge_state_dicts(text + "dtype: float64\n" + steps)
    for name, depth, scale in [
        ("model.embed_tokens.weight", 0, 1),
        ("model.layers.0.mlp.up_proj.weight", 0, 2),
        ("model.layers.3.mlp.up_proj.weight", 0.75, 2),
        ("model.layers.4.self_attn.q_proj.weight", 1, 1),
        ("lm_head.weight", 0, 1),
    ]:
        base = family["base"][name].double()
        expected = base + scale * (0.25 + 0.5 * depth) * (plain[name] - base)
        assert torch.allclose(merged[name], expected, rtol=1e-12, atol=1e-13), name
        assert not torch.allclose(merged[name], plain[name])


def test_lines_of_a_single_block() -> None:
    """It is the last one: α + β; what lies outside of the blocks has α."""
    state = {n: torch.ones(2, 2) for n in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")}
    models = {"base": {n: torch.zeros_like(w) for n, w in state.items()}, "a": state}
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 1}\n"
    merged = gm.merge_state_dicts(text + "steps: [{lines: {alpha: 0.25, beta: 0.5}}]\n", models)
    assert [w[0, 0].item() for w in merged.values()] == [0.75, 0.25]


def test_steps_need_their_numbers(family: dict[str, tiny.Tensors]) -> None:
    """A step without a parameter, or with a word for a number, is refused with its line."""
    with pytest.raises(gm.RecipeError, match="needs beta") as caught:
        gm.plan(LINEAR + "steps:\n- lines: {alpha: 1}\n")
    assert caught.value.where == "<recipe>:6"
    with pytest.raises(gm.RecipeError, match="takes numbers"):
        gm.plan(LINEAR + "steps:\n- scale: large\n")


# -- saved plans -------------------------------------------------------------------------------------------------------

RECIPES = {
    "linear": LINEAR,
    "slerp": SLERP + "schedule: S\n",
    "ties": TIES
    + "parameters: {density: [0.2, 0.9], weight: 1}\nsteps: [{scale: 0.5}]\nseed: 9\nrounding: stochastic\n",
    "slices": "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 4]}]\n"
    "- sources: [{model: b, layer_range: [2, 5]}]\n",
    "pipeline": f"name: mid\n{SLERP}parameters: {{t: 0.5}}\n---\n{TIES.replace('{model: b}', '{model: mid}')}"
    "parameters: {weight: 1}\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_saved_plan_is_equal_and_runs_to_the_same_bytes(
    name: str, family: dict[str, tiny.Tensors], tmp_path: Path
) -> None:
    """to_dict/from_dict and save/load give an equal plan with an equal hash, which makes the same directory."""
    plan = gm.plan(RECIPES[name])
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert loaded.hash == plan.hash
    gm.merge(loaded, tmp_path / "one" / "out")
    gm.merge(RECIPES[name], tmp_path / "two" / "out")
    assert tiny.digests(tmp_path / "one" / "out") == tiny.digests(tmp_path / "two" / "out")


@pytest.mark.parametrize("name", RECIPES)
def test_saved_plan_runs_in_another_directory(
    name: str, family: dict[str, tiny.Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of relative paths finds weights and side files from elsewhere, and makes the same directory."""
    for model in family:
        (tmp_path / model / "tokenizer_config.json").write_text("{}")
    gm.plan(RECIPES[name]).save(tmp_path / "plan.json")
    gm.merge(RECIPES[name], tmp_path / "one" / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    gm.merge(Plan.load("../plan.json"), "../two/out")
    assert (tmp_path / "two" / "out" / "tokenizer_config.json").is_file()
    assert tiny.digests(tmp_path / "one" / "out") == tiny.digests(tmp_path / "two" / "out")


def test_hash_does_not_depend_on_the_place(
    family: dict[str, tiny.Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same recipe on the same models elsewhere has the same hash; another seed, value or input has not."""
    import shutil

    first = gm.plan(TIES + "parameters: {weight: 1}\n").hash
    shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "-copy"))
    monkeypatch.chdir(tmp_path.with_name(tmp_path.name + "-copy"))
    assert gm.plan(TIES + "parameters: {weight: 1}\n").hash == first
    others = {gm.plan(TIES + f"parameters: {{weight: 1}}\n{more}").hash for more in ("seed: 1\n", "dtype: bfloat16\n")}
    others.add(gm.plan(TIES + "parameters: {weight: 2}\n").hash)
    tiny.llama(Path("b"), 77, num_hidden_layers=5)
    others.add(gm.plan(TIES + "parameters: {weight: 1}\n").hash)
    assert len(others - {first}) == 4


def test_changed_input_is_refused(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """A plan is for the very files that it was made from: one changed byte is seen, and so is a missing file."""
    plan = gm.plan(LINEAR)
    file = tmp_path / "b" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(gm.RunError, match="not the one that the plan was made for") as caught:
        gm.merge(plan, tmp_path / "out")
    assert str(tmp_path / "b") in str(caught.value)
    file.unlink()
    with pytest.raises(gm.ModelError):
        gm.merge(plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_plans_that_are_none(tmp_path: Path, family: dict[str, tiny.Tensors]) -> None:
    """Other JSON, another format, damage, a plan of models in memory: one clear error each."""
    good = gm.plan(LINEAR).to_dict()
    for data, message in [
        ([1], "not a plan"),
        ({}, "not a plan"),
        (good | {"geomerge_plan": 99}, "not a plan of format"),
        (good | {"nodes": [[1]]}, "damaged"),
        ({k: v for k, v in good.items() if k != "stages"}, "damaged"),
        (good | {"methods": [{"name": "linear", "parameters": {"wieght": 1}}]}, "damaged"),
        (good | {"stages": [[None, "linaer", 0, "nearest", None]]}, "damaged: there is no method 'linaer'"),
    ]:
        (tmp_path / "plan.json").write_text(json.dumps(data))
        with pytest.raises(gm.UsageError, match=message):
            Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff{")
    with pytest.raises(gm.UsageError, match="cannot be read"):
        Plan.load(tmp_path / "plan.json")
    in_memory = gm.plan(LINEAR, models={"a": family["a"], "b": family["b"]})
    with pytest.raises(gm.UsageError, match="in memory"):
        gm.merge(in_memory, tmp_path / "out")


def test_models_go_by_the_names_that_the_user_gave(tmp_path: Path, family: dict[str, tiny.Tensors]) -> None:
    """A link's own, not its target's; but a path with .. leads where the system says."""
    (tmp_path / "code").symlink_to(Path("a").resolve())
    (tmp_path / "deep").mkdir()
    text = LINEAR.replace("model: a", f"model: {tmp_path}/code").replace("model: b", f"model: {tmp_path}/deep/../code")
    assert [i.name for i in gm.plan(text).inputs] == ["code", "a"]
    gm.merge(text, tmp_path / "out")
    assert "| code |" in (tmp_path / "out" / "README.md").read_text("utf-8")


# -- rounding ----------------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased_and_seeded(tmp_path: Path) -> None:
    """Over many elements the mean is kept, each goes to a neighbour, exact values stay, the seed decides, tiles do not."""
    n = 60_001
    low, high = torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0078125, dtype=torch.bfloat16)
    a = torch.ones(n) + 0.25 * 2**-7
    a[::3] = 1.5  # exact in bfloat16
    a[1::6] = -1 - 0.75 * 2**-7
    models = {"a": {"w": a}, "b": {"w": a}}
    text = LINEAR.replace("{", "{{").replace("}", "}}") + "dtype: bfloat16\nrounding: stochastic\nseed: {}\n"
    merged = gm.merge_state_dicts(text.format(1), models)["w"]
    ups, downs = merged[a == a[2]], merged[a == a[1]]
    assert set(ups.tolist()) == {low.item(), high.item()}
    assert set(downs.tolist()) == {-low.item(), -high.item()}
    # Binomial standard deviations: √(p(1 − p)/n) of about 0.003 and 0.0043; five of them.
    assert (ups == high).double().mean().item() == pytest.approx(0.25, abs=0.015)
    assert (downs == -high).double().mean().item() == pytest.approx(0.75, abs=0.022)
    assert (merged[::3] == 1.5).all()
    assert torch.equal(merged, gm.merge_state_dicts(text.format(1), models, threads=3)["w"])
    assert not torch.equal(merged, gm.merge_state_dicts(text.format(2), models)["w"])
    from geomerge.checkpoint import from_state_dict

    given = {name: from_state_dict(tensors, name=name) for name, tensors in models.items()}
    plan, inputs = make_plan(gm.load_recipe(text.format(1)), models=given)
    assert torch.equal(run_in_memory(plan, inputs, tile=8192)["w"], merged)
    nearest = gm.merge_state_dicts(LINEAR + "dtype: bfloat16\n", models)["w"]
    assert torch.equal(nearest, a.bfloat16())


def test_stochastic_rounding_to_float32_is_nearest() -> None:
    """Where the output is as wide as float32 there is nothing to draw."""
    models = {"a": {"w": torch.randn(1000)}, "b": {"w": torch.randn(1000)}}
    plain = gm.merge_state_dicts(LINEAR, models)
    assert tiny.same(gm.merge_state_dicts(LINEAR + "rounding: stochastic\n", models), plain)


def test_rounding_loss_is_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest's and the estimate's share against ‖round(θ) − θ‖/‖θ − θ₀‖ over all elements."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (150, 200) for i in range(6)}
    base = {n: (0.02 * torch.randn(s, generator=generator)).bfloat16() for n, s in shapes.items()}
    tiny.save(Path("base"), base)
    for name in "ab":
        tiny.save(
            Path(name), {n: t.float() + 3e-4 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        )
    text = TIES.replace("ties", "task_arithmetic") + "parameters: {weight: 0.5}\ndtype: bfloat16\n"
    report = gm.merge(text, "out")
    exact = gm.merge_state_dicts(text.replace("bfloat16", "float64"))
    written = tiny.read(Path("out"))
    lost = sum((written[n].double() - exact[n]).square().sum() for n in exact).sqrt()
    moved = sum((exact[n] - base[n].double()).square().sum() for n in exact).sqrt()
    direct = float(lost / moved)
    assert 0.05 < direct < 0.4
    assert report.rounding_loss == pytest.approx(direct, rel=0.05)
    record = tiny.manifest(Path("out"))
    assert record["rounding_loss"] == pytest.approx(direct, rel=0.05)
    for name, entry in record["tensors"].items():
        error, change = (written[name].double() - exact[name]).norm(), (exact[name] - base[name].double()).norm()
        assert entry["rounding_loss"] == pytest.approx(float(error / change), rel=0.1)
    plan, inputs = make_plan(gm.load_recipe(text))
    expected = estimate(plan, inputs, threads=1)
    assert expected.rounding_loss == pytest.approx(direct, rel=0.05)
    assert expected.written == plan.nbytes == 6 * 150 * 200 * 2
    assert expected.read == 6 * 150 * 200 * (2 + 4 + 4)
    for checkpoint in inputs:
        checkpoint.close()


# -- what a run records ------------------------------------------------------------------------------------------------


def test_manifest(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """Versions, inputs with hashes, seed, method with parameters, and a rule for every tensor; no date, no path."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(TIES + "parameters: {density: 0.5, weight: 1, int8_mask: true}\nseed: 42\n")
    gm.merge(recipe, "out", compat="mergekit")  # by its absolute path
    record = tiny.manifest(Path("out"))
    plan = gm.plan("recipe.yml", compat="mergekit")
    assert record["geomerge"] == gm.__version__
    assert record["versions"].keys() == {"python", "torch", "numpy"}
    assert record["plan"] == plan.hash
    assert record["stages"] == [
        {"name": None, "method": "ties", "seed": 42, "rounding": "nearest", "compat": "mergekit"}
    ]
    assert [i["model"] for i in record["inputs"]] == [Path(i.path).name for i in plan.inputs]
    for given in record["inputs"]:
        assert len(given["fingerprint"]) == 64
        assert given["files"]["model.safetensors"]["size"] == Path(given["model"], "model.safetensors").stat().st_size
    assert record["tensors"].keys() == family["a"].keys()
    assert {t["rule"] for t in record["tensors"].values()} == {"merge"}
    method = record["methods"][record["tensors"]["lm_head.weight"]["method"]]
    assert method["name"] == "ties"
    assert method["parameters"]["density"] == [0.5, 0.5]
    assert any("int8_mask" in note for note in record["notes"])
    assert str(tmp_path) not in json.dumps(record)
    assert Path("out/geomerge.yml").read_text() == recipe.read_text()


def test_manifest_has_a_line_for_each_tensor() -> None:
    """Two manifests can be compared line by line, and one of 100,000 tensors be read."""
    content = {
        "geomerge": "1",
        "loss": None,
        "notes": [],
        "methods": [{"name": "linear", "parameters": {"weight": [0.5, 0.5]}}],
        "tensors": {'naïve "name"': {"rule": "merge", "method": 0}, "b": {"rule": "copy"}},
        "left_out": {},
    }
    text = as_text(content)
    assert json.loads(text) == content
    assert text.splitlines() == [
        "{",
        '  "geomerge": "1",',
        '  "loss": null,',
        '  "notes": [],',
        '  "methods": [',
        '    {"name": "linear", "parameters": {"weight": [0.5, 0.5]}}',
        "  ],",
        '  "tensors": {',
        '    "naïve \\"name\\"": {"rule": "merge", "method": 0},',
        '    "b": {"rule": "copy"}',
        "  },",
        '  "left_out": {}',
        "}",
    ]


def test_manifest_tells_coefficients(family: dict[str, tiny.Tensors]) -> None:
    """Of span methods the record has the very coefficients of each tensor."""
    gm.merge(SLERP + "parameters: {t: 0.25}\n", "out")
    record = tiny.manifest(Path("out"))
    a, b = (family[m]["lm_head.weight"].double().flatten() for m in "ab")
    omega = torch.arccos(a @ b / a.norm() / b.norm())
    expected = [float(torch.sin(0.75 * omega) / torch.sin(omega)), float(torch.sin(0.25 * omega) / torch.sin(omega))]
    assert record["tensors"]["lm_head.weight"]["coefficients"] == pytest.approx(expected, rel=1e-9)


def test_compat_profile_is_recorded(family: dict[str, tiny.Tensors]) -> None:
    """From the recipe or from the call, in the plan and in the parameters."""
    assert gm.plan(SLERP + "parameters: {t: 0.5}\n").stages[0].compat is None
    for plan in (
        gm.plan(SLERP + "parameters: {t: 0.5}\n", compat="mergekit"),
        gm.plan(SLERP + "parameters: {t: 0.5}\ncompat: mergekit\n"),
    ):
        assert plan.stages[0].compat == "mergekit"
        assert set(values(plan, "lerp_threshold").values()) == {0.9995}


def test_model_card(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """Its front matter is YAML with what the hub reads; the body names method, parents, recipe; licences that differ warn."""
    (tmp_path / "a" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "b" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    gm.merge(SLERP + "parameters: {t: 0.25}\n", "out")
    text = Path("out/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    matter = YAML(typ="safe").load(front)
    assert matter["base_model_relation"] == "merge"
    assert matter["library_name"] == "transformers"
    assert matter["tags"] == ["merge", "geomerge", "slerp"]
    assert matter["license"] == "other"
    assert "base_model" not in matter  # local parents have no id
    assert "| a | base |" in body
    assert "licences differ" in body
    assert SLERP in body
    assert str(tmp_path) not in text


def test_side_files_are_kept(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """Generation config, chat template, processor, licence and custom code come along; weights of other formats do not."""
    config = tiny.config(tmp_path / "a") | {"auto_map": {"AutoModel": "modeling_x.X"}, "unknown": {"field": [1]}}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    kept = {
        "generation_config.json": '{"temperature": 0.7}',
        "chat_template.jinja": "{{ messages }}",
        "preprocessor_config.json": "{}",
        "LICENSE": "free",
        "modeling_x.py": "X = 1\n",
    }
    for name, content in (kept | {"pytorch_model.bin": "x", "training_args.bin": "x"}).items():
        (tmp_path / "a" / name).write_text(content)
    gm.merge(SLERP + "parameters: {t: 0.25}\n", "out")
    for name, content in kept.items():
        assert Path("out", name).read_text() == content
    made = {"config.json", "model.safetensors", "geomerge.json", "geomerge.yml", "README.md"}
    assert {p.name for p in Path("out").iterdir()} == kept.keys() | made
    assert tiny.config(Path("out"))["unknown"] == {"field": [1]}


def test_chat_template_of_the_recipe(family: dict[str, tiny.Tensors]) -> None:
    """A bundled template replaces the donor's."""
    Path("a/chat_template.jinja").write_text("old")
    gm.merge(SLERP + "parameters: {t: 0.25}\nchat_template: chatml\n", "out")
    assert "<|im_start|>" in Path("out/chat_template.jinja").read_text()


def test_versions_are_those_that_are_installed() -> None:
    """What is read off folders' names is what the packages say of themselves."""
    assert versions() == {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "numpy": metadata.version("numpy"),
    }


def test_models_with_the_same_weights_are_noted(tmp_path: Path) -> None:
    """By a link or as a copy: what the recipe may have meant as two counts twice."""
    tiny.family(tmp_path, "a b")
    (tmp_path / "link").symlink_to("a")
    shutil.copytree(tmp_path / "b", tmp_path / "copy")
    models = "".join(f"- model: {tmp_path / name}\n" for name in ("a", "b", "link", "copy"))
    plan = gm.plan(f"merge_method: linear\nmodels:\n{models}parameters: {{weight: 1}}\n")
    assert [note.replace(f"{tmp_path}/", "") for note in plan.notes if "same weights" in note] == [
        "a and link seem to hold the same weights",
        "b and copy seem to hold the same weights",
    ]


def test_what_measures_nothing_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DARE draws, TIES that keeps all only elects; TIES that trims looks at each tensor first."""
    monkeypatch.chdir(tmp_path)
    tiny.family(tmp_path, "base a b")
    size = sum(t.numel() * t.element_size() for t in tiny.read(Path("base")).values())
    for method, density, passes in (("dare_ties", 0.5, 1), ("ties", 1.0, 1), ("ties", 0.5, 2)):
        recipe = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: a}}, {{model: b}}]\n"
        plan, inputs = make_plan(gm.load_recipe(recipe + f"parameters: {{weight: 1, density: {density}}}\n"))
        assert estimate(plan, inputs).read == 3 * passes * size, (method, density)


def test_a_recipe_that_cannot_be_carried_out_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions that cancel are found while merging: no later run could go on with what is finished."""
    monkeypatch.chdir(tmp_path)
    for name, sign in (("a", 1), ("b", -1), ("c", 0)):
        tiny.save(Path(name), {"x.weight": torch.full((4, 4), float(sign))}, {"model_type": "llama"})
    recipe = "merge_method: multislerp\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {weight: 1}\n"
    with pytest.raises(gm.UsageError, match="cancel out"):
        gm.merge(recipe, "out")
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_whole_numbers_among_weights_are_refused(family: dict[str, tiny.Tensors], dtype: torch.dtype) -> None:
    """They were rounded away without a word, or the imaginary part was."""
    tensors = tiny.read(Path("b"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, Path("b") / "model.safetensors")
    with pytest.raises(
        gm.IncompatibleModels, match=r"model\.norm\.weight is (int32|complex64|c64) in b, but"
    ) as refused:
        gm.plan(LINEAR)
    assert refused.value.where == "<recipe>:4"
