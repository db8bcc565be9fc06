"""``geomerge plan``: the page, the list of all tensors, JSON, and saved plans."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

import geomerge as gm
import tiny
from cli_samples import TIES, Program, write_models, write_recipe
from geomerge.report.coefficients import plan_figure


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program in this process, into a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return Program(capsys)


def lines_of(text: str, title: str) -> list[list[str]]:
    """The lines below a title, cut into their columns."""
    body = text.split(f"\n{title}\n")[1].split("\n\n")[0]
    return [re.split(r"  +", line.strip()) for line in body.splitlines()]


def test_the_page(run: Program, tmp_path: Path) -> None:
    """Method, output, cost, models with the base marked, and equal blocks in one line with their parameters."""
    write_models(tmp_path)
    code, out, err = run("plan", write_recipe(tmp_path))
    assert (code, err) == (0, "")
    assert out.startswith("slerp: Spherical linear interpolation (SLERP)\noutput")
    for name in ("output ", "time ", "memory ", "reading ", "plan "):
        assert f"\n{name}" in out
    assert "\x1b" not in out
    assert lines_of(out, "models")[1][:2] == ["1", f"{tmp_path}/a"]
    assert lines_of(out, "models")[1][2] == "(base)"
    assert lines_of(out, "tensors") == [
        ["tensors", "number", "size", "from", "how"],
        ["model.embed_tokens.weight", "1", "512 B", "1, 2", "slerp(t=0.5)"],
        ["model.layers.{0-5}.input_layernorm.weight", "6", "96 B", "1, 2", "slerp(t=0.5)"],
        ["model.layers.{0-5}.mlp.*", "12", "3.07 kB", "1, 2", "slerp(t=0.5)"],
        ["model.layers.{0-5}.self_attn.*", "12", "1.54 kB", "1, 2", "slerp(t=0→1)"],
        ["model.norm.weight", "1", "16 B", "1, 2", "slerp(t=0.5)"],
    ]


def test_steps_after_the_method_are_shown(run: Program, tmp_path: Path) -> None:
    """LiNeS whose α is found when the merge runs, too; and the same in JSON."""
    write_models(tmp_path)
    text = TIES + "steps: [{{dare: 0.5}}, {{lines: {{alpha: auto, beta: 1}}}}, {{scale: 0.5}}]\n"
    recipe = write_recipe(tmp_path, text)
    _, out, _ = run("plan", recipe, "--no-estimate")
    how = {row[0]: row[-1] for row in lines_of(out, "tensors")[1:]}
    chain = "dare(density=0.5) → ties(weight=1, density=0.5) × 0.5 → lines(alpha=auto, beta·depth="
    assert how["model.norm.weight"] == chain + "0)"
    assert how["model.layers.{0-5}.*"] == chain + "0→1)"
    tensors = {t["name"]: t for t in json.loads(run("plan", recipe, "--no-estimate", "--json").out)["tensors"]}
    found = tensors["model.layers.5.mlp.up_proj.weight"]
    assert (found["scale"], found["lines"]) == (0.5, {"alpha": "auto", "beta_times_depth": 1.0})
    assert tensors["model.layers.0.mlp.up_proj.weight"]["before"][0]["step"] == "dare"


def test_the_flag_for_codes(run: Program, tmp_path: Path) -> None:
    """`--requantize` as `merge` takes it; the rounding loss is of what is no code."""
    write_models(tmp_path)
    _, out, _ = run("plan", write_recipe(tmp_path), "--requantize", "int8")
    dtypes = {row[0]: row[3] for row in lines_of(out, "tensors")[1:]}
    assert dtypes["model.norm.weight"] == "bfloat16"
    assert dtypes["model.layers.{0-5}.mlp.up_proj.weight"] == "int8"
    assert "rounding to bfloat16 takes" in out


def test_blocks_with_other_parameters_have_a_line(run: Program, tmp_path: Path) -> None:
    """A setting for some blocks cuts the ranges; equal values for all models are said once."""
    write_models(tmp_path)
    text = TIES.replace("weight: 1", "weight: [{{block: 2-3, value: 2}}, {{value: 1}}]", 1)
    _, out, _ = run("plan", write_recipe(tmp_path, text), "--no-estimate")
    how = {row[0]: row[-1] for row in lines_of(out, "tensors")[1:]}
    assert how == {
        "model.embed_tokens.weight": "ties(weight=1, density=0.5)",
        "model.layers.{0-1}.*": "ties(weight=1, density=0.5)",
        "model.layers.{2-3}.*": "ties(weight=[2, 1], density=0.5)",
        "model.layers.{4-5}.*": "ties(weight=1, density=0.5)",
        "model.norm.weight": "ties(weight=1, density=0.5)",
    }


STACK = """\
slices:
  - sources: [{{model: {0}/a, layer_range: [0, 4]}}]
  - sources: [{{model: {0}/b, layer_range: [2, 6]}}]
merge_method: passthrough
"""


def test_stacked_layers_say_where_they_come_from_and_what_is_left_out(run: Program, tmp_path: Path) -> None:
    """Blocks that move are named with their old numbers; unused tensors are counted with the rule."""
    write_models(tmp_path)
    _, out, _ = run("plan", write_recipe(tmp_path, STACK), "--no-estimate")
    rows = {row[0]: row[3:] for row in lines_of(out, "tensors")[1:]}
    assert rows["model.layers.{0-3}.*"] == ["1", "passthrough"]
    assert rows["model.layers.{4-7}.*"] == ["2 (blocks 2-5)", "passthrough"]
    assert f" left out - 22 tensors, in none of the recipe's slices: {tmp_path}/a: " in " ".join(out.split())


def test_the_terminals_width_is_kept(run: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 60, 40 and 30 columns nothing is longer and nothing is lost; in a pipe every tensor group is one line."""
    write_models(tmp_path)
    recipe = write_recipe(tmp_path)
    wide = run("plan", recipe, "--no-estimate").out
    for width in (60, 40, 30):
        monkeypatch.setenv("COLUMNS", str(width))
        narrow = run("plan", recipe, "--no-estimate").out
        assert max(map(len, narrow.splitlines())) <= width < max(map(len, wide.splitlines()))
        assert not Counter("".join(wide.split())) - Counter("".join(narrow.split())), width
        if width == 60:  # no table has to be shown in parts, with some columns more than once
            assert sorted("".join(narrow.split())) == sorted("".join(wide.split()))


def test_a_recipe_from_a_pipe(run: Program, tmp_path: Path) -> None:
    """It can be read once only."""
    write_models(tmp_path)
    recipe = write_recipe(tmp_path)
    read, write = os.pipe()
    os.write(write, Path(recipe).read_bytes())
    os.close(write)
    try:
        done = run("plan", f"/dev/fd/{read}", "--no-estimate")
    finally:
        os.close(read)
    assert done.code == 0, done.err
    assert lines_of(done.out, "tensors") == lines_of(run("plan", recipe, "--no-estimate").out, "tensors")


def test_all_lists_every_tensor(run: Program, tmp_path: Path) -> None:
    """One line a tensor: name, shape, dtype, bytes, method with all parameters, inputs; and one for what is left out."""
    write_models(tmp_path)
    _, out, _ = run("plan", write_recipe(tmp_path, STACK), "--all")
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert len(lines) == 2 + 8 * 5 + 22
    assert lines[1 + 5 * 4] == [
        "model.layers.4.input_layernorm.weight", "[8]", "bfloat16", "16 B",
        f"passthrough(scale=none) from {tmp_path}/b: model.layers.2.input_layernorm.weight",
    ]  # fmt: skip
    assert lines[-1][0].startswith("left out: ")


PIPELINE = """\
name: soup
merge_method: linear
models: [{{model: {0}/a, parameters: {{weight: 1}}}}, {{model: {0}/b, parameters: {{weight: 3}}}}]
---
merge_method: slerp
base_model: {0}/base
models: [{{model: {0}/base}}, {{model: soup}}]
parameters: {{t: 0.25}}
"""


def test_a_pipeline_shows_each_stage(run: Program, tmp_path: Path) -> None:
    """Intermediate results have a table of their own and appear by name where they are used."""
    write_models(tmp_path)
    recipe = write_recipe(tmp_path, PIPELINE)
    _, out, _ = run("plan", recipe, "--no-estimate")
    assert out.startswith("linear: Linear averaging (model soup) → slerp: ")
    assert lines_of(out, "tensors of soup")[1][-2:] == ["1, 2", "linear(weight=[1, 3])"]
    assert lines_of(out, "tensors of the output")[1][-2:] == ["3, soup", "slerp(t=0.25)"]
    said = json.loads(run("plan", recipe, "--json", "--no-estimate").out)
    assert said["tensors"][0]["inputs"][1] == {
        "stage": "soup",
        "tensor": said["tensors"][0]["name"],
        "reordered": False,
    }


def test_json(run: Program, tmp_path: Path) -> None:
    """Everything is in the object: the estimate, every tensor with its parameters."""
    write_models(tmp_path)
    code, out, err = run("plan", write_recipe(tmp_path), "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert set(said) == {"plan", "stages", "inputs", "output", "estimate", "tensors", "left_out", "notes"}
    assert set(said["estimate"]) == {"read", "written", "memory", "seconds", "rounding_loss"}
    assert said["output"] == {"tensors": 32, "bytes": said["estimate"]["written"], "dtypes": ["bfloat16"]}
    assert [i["ref"] for i in said["inputs"]] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert len(said["tensors"]) == 32
    first = said["tensors"][0]
    assert first["inputs"][1] == {"model": f"{tmp_path}/b", "tensor": "model.embed_tokens.weight", "reordered": False}
    assert (first["method"], first["parameters"]["t"], first["shape"]) == ("slerp", 0.5, [32, 8])
    assert json.loads(run("plan", write_recipe(tmp_path), "--json", "--no-estimate").out)["estimate"] is None


def test_a_saved_plan_is_shown_like_its_recipe(run: Program, tmp_path: Path) -> None:
    """The page of a plan read back is the page of the recipe; places that are no plan's are refused."""
    write_models(tmp_path)
    page = run("plan", write_recipe(tmp_path), "--no-estimate", "--save", tmp_path / "plan.json").out
    assert run("plan", tmp_path / "plan.json", "--no-estimate").out == page
    code, _, err = run("plan", write_recipe(tmp_path), "--no-estimate", "--save", tmp_path / "no" / "plan.json")
    assert (code, "its directory does not exist" in err) == (2, True)
    assert run("plan", write_recipe(tmp_path), "--no-estimate", "--save", tmp_path / "plan.json").code == 0
    before = (tmp_path / "recipe.yml").read_bytes()
    for option in ("--save", "--figure"):
        path = (
            (tmp_path / "recipe.yml").rename(tmp_path / "mine.png") if option == "--figure" else tmp_path / "recipe.yml"
        )
        code, _, err = run("plan", tmp_path / "plan.json", "--no-estimate", option, path)
        assert code == 2
        assert "exists and is not a" in err
        assert path.read_bytes() == before


def test_names_from_a_model_do_not_reach_the_terminal(run: Program, tmp_path: Path) -> None:
    """A tensor name with an escape sequence and markup is shown as text, in every form of output."""
    import torch

    from cli_samples import write_model

    for name in ("a", "b"):
        write_model(tmp_path / name, {"x.\x1b[31m[bold]y\u202e": torch.ones(4)}, {"model_type": "toy"})
    recipe = write_recipe(tmp_path)
    recipe.write_text(re.sub(r"parameters.*", "parameters: {t: 0.5}", recipe.read_text()))
    for words in (["plan", recipe], ["plan", recipe, "--all"], ["plan", recipe, "--json"], ["inspect", tmp_path / "a"]):
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "[31m[bold]y" in out


def test_figure_of_coefficients(run: Program, tmp_path: Path) -> None:
    """`--figure` draws what the table of coefficients says; what cannot be drawn is refused and nothing is written."""
    for seed, name in enumerate("ab"):
        tiny.llama(tmp_path / name, seed)
    models = f"base_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\n"
    (tmp_path / "r.yml").write_text(f"merge_method: layer_adaptive_slerp\n{models}")
    (tmp_path / "l.yml").write_text(
        f"merge_method: linear\n{models}parameters: {{weight: 1}}\n".replace("base_model", "#")
    )
    assert run("plan", tmp_path / "r.yml", "--figure", tmp_path / "t.png").code == 0
    image = (tmp_path / "t.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 5000
    assert run("plan", tmp_path / "r.yml", "--figure", tmp_path / "t.svg").code == 2
    (tmp_path / "c.yml").write_text(f"merge_method: slerp\n{models}parameters: {{t: 0.25}}\n")
    constant = plan_figure(gm.plan(tmp_path / "c.yml"), "c")
    assert constant is not None
    assert constant.alt == "t by role and block, from 0.25 to 0.25."
    refused = run("plan", tmp_path / "l.yml", "--figure", tmp_path / "l.png")
    assert refused.code == 2
    assert "no parameter of linear differs over depth or role" in refused.err
    (tmp_path / "w.yml").write_text(
        f"merge_method: ties\nbase_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/b, parameters: {{weight: [0.2, 1.0]}}}}]\n"
        "parameters: {density: [{filter: mlp, value: 0.3}, {value: 0.9}]}\n"
    )
    drawn = plan_figure(gm.plan(tmp_path / "w.yml"), "w")
    assert drawn is not None
    assert drawn.alt == "weight, density by role and block, from 0.2 to 1."
    assert run("plan", tmp_path / "w.yml", "--figure", tmp_path / "w.png").code == 0
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("[tl].svg")) + list(tmp_path.glob("l.png"))
