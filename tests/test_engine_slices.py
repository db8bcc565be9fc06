"""Slices: which block goes where, whose embeddings and head, and what parameters a block gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import geomerge as gm
import tiny

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def family(tmp_path: Path) -> dict[str, tiny.Tensors]:
    """Models base, a, b, c of three blocks."""
    return tiny.family(tmp_path)


def test_frankenmerge_renumbers_blocks(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """Blocks are numbered on; embeddings come from the first slice, the final norm and the head from the last."""
    gm.merge(tiny.passthrough(tmp_path, "a 0 2", "b 0 3", "a 1 3"), tmp_path / "out")
    merged = tiny.read(tmp_path / "out")
    sources = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("a", 1), ("a", 2)]
    expected = {"model.embed_tokens.weight": family["a"]["model.embed_tokens.weight"]}
    for out, (model, block) in enumerate(sources):
        for name, tensor in family[model].items():
            if f".layers.{block}." in name:
                expected[name.replace(f".layers.{block}.", f".layers.{out}.")] = tensor
    expected |= {n: family["a"][n] for n in ("model.norm.weight", "lm_head.weight")}
    assert tiny.same(merged, expected)
    assert tiny.config(tmp_path / "out")["num_hidden_layers"] == 7


def test_embeddings_of_the_first_and_head_of_the_last(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """Two models: the first gives the embeddings, the last the final norm and the head."""
    merged = gm.merge_state_dicts(tiny.passthrough(tmp_path, "a 0 1", "b 1 3"))
    assert torch.equal(merged["model.embed_tokens.weight"], family["a"]["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], family["b"]["lm_head.weight"])
    assert torch.equal(merged["model.norm.weight"], family["b"]["model.norm.weight"])


@pytest.mark.usefixtures("family")
def test_slices_without_a_block(tmp_path: Path) -> None:
    """One of several may be empty; a model without layers is no merge."""
    with pytest.raises(gm.RecipeError, match="the slices hold no block"):
        gm.plan(tiny.passthrough(tmp_path, "a 0 0", "b 3 3"))


def test_zero_length_last_slice_gives_the_head(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """The trick to keep another model's head: a last slice without blocks."""
    gm.merge(tiny.passthrough(tmp_path, "a 0 3", "b 3 3"), tmp_path / "out")
    merged = tiny.read(tmp_path / "out")
    assert tiny.config(tmp_path / "out")["num_hidden_layers"] == 3
    assert torch.equal(merged["lm_head.weight"], family["b"]["lm_head.weight"])
    assert torch.equal(merged[UP.format(2)], family["a"][UP.format(2)])


def test_every_left_out_tensor_is_accounted_for(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """The manifest lists what the slices did not take, and why."""
    gm.merge(tiny.passthrough(tmp_path, "a 0 1", "b 1 3"), tmp_path / "out")
    left_out = tiny.manifest(tmp_path / "out")["left_out"]
    taken_from_a = {n for n in family["a"] if ".layers.0." in n} | {"model.embed_tokens.weight"}
    taken_from_b = {n for n in family["b"] if ".layers.1." in n or ".layers.2." in n}
    taken_from_b |= {"model.norm.weight", "lm_head.weight"}
    expected = {f"{tmp_path}/a: {n}" for n in family["a"].keys() - taken_from_a}
    expected |= {f"{tmp_path}/b: {n}" for n in family["b"].keys() - taken_from_b}
    assert left_out.keys() == expected
    assert set(left_out.values()) == {"in none of the recipe's slices"}


SLERP = """\
merge_method: slerp
base_model: {0}/a
slices:
- sources: [{{model: {0}/a, layer_range: [0, 3]}}, {{model: {0}/b, layer_range: [0, 3]}}]
  parameters: {{t: [0, 1]}}
- sources: [{{model: {0}/a, layer_range: [1, 3]}}, {{model: {0}/b, layer_range: [0, 2]}}]
parameters:
  t:
  - {{filter: mlp, value: [0.2, 0.4]}}
  - {{value: 0.75}}
"""


def test_gradients_restart_in_each_slice(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """The slice's own parameters come first; depth starts anew in every slice; tensors outside blocks have depth 0."""
    plan = gm.plan(SLERP.format(tmp_path))
    t = {n.name: n.method.values()["t"] for n in plan.output_nodes() if n.method is not None}
    assert [t[UP.format(i)] for i in range(5)] == pytest.approx([0, 0.5, 1, 0.2, 0.4])
    norms = [t[f"model.layers.{i}.input_layernorm.weight"] for i in range(5)]
    assert norms == pytest.approx([0, 0.5, 1, 0.75, 0.75])
    assert t["model.embed_tokens.weight"] == 0
    assert t["model.norm.weight"] == t["lm_head.weight"] == 0.75
    operands = {n.name: [(o.input, o.tensor) for o in n.operands] for n in plan.output_nodes()}
    assert operands[UP.format(4)] == [(0, UP.format(2)), (1, UP.format(1))]
    merged = gm.merge_state_dicts(SLERP.format(tmp_path))
    expected = gm.methods.slerp(family["a"][UP.format(2)], [family["b"][UP.format(1)]], t=0.4)
    assert torch.allclose(merged[UP.format(4)], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(merged[UP.format(0)], family["a"][UP.format(0)])
    assert torch.equal(merged[UP.format(2)], family["b"][UP.format(2)])


def test_per_model_filters_test_the_input_name(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """A model's own weight is looked up under the name of *its* tensor, which stands in another block than the output's."""
    text = f"""\
merge_method: linear
slices:
- sources:
  - {{model: {tmp_path}/a, layer_range: [1, 3], parameters: {{weight: [{{filter: layers.2.mlp, value: 3}}, {{value: 1}}]}}}}
  - {{model: {tmp_path}/b, layer_range: [0, 2], parameters: {{weight: 1}}}}
"""
    merged = gm.merge_state_dicts(text)
    a, b = family["a"], family["b"]
    expected = ((3 * a[UP.format(2)].double() + b[UP.format(1)].double()) / 4).float()
    assert torch.allclose(merged[UP.format(1)], expected, rtol=1e-7, atol=0)
    expected = ((a[UP.format(1)].double() + b[UP.format(0)].double()) / 2).float()
    assert torch.allclose(merged[UP.format(0)], expected, rtol=1e-7, atol=0)


def test_an_unlisted_base_takes_part_in_the_same_range(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """The base of task vectors may stay unlisted when all sources agree on the range."""
    text = f"""\
merge_method: task_arithmetic
base_model: {tmp_path}/base
slices:
- sources: [{{model: {tmp_path}/a, layer_range: [1, 3]}}]
parameters: {{weight: 0.5}}
"""
    merged = gm.merge_state_dicts(text)
    base, a = family["base"][UP.format(1)].double(), family["a"][UP.format(1)].double()
    assert torch.allclose(merged[UP.format(0)].double(), base + 0.5 * (a - base), rtol=1e-6, atol=1e-7)
    assert UP.format(2) not in merged


def test_a_slice_has_its_own_base(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """`base_model` of a slice replaces the recipe's there and only there."""
    text = f"""\
merge_method: slerp
base_model: {tmp_path}/a
slices:
- sources: [{{model: {tmp_path}/a, layer_range: [0, 1]}}, {{model: {tmp_path}/b, layer_range: [0, 1]}}]
- sources: [{{model: {tmp_path}/a, layer_range: [1, 3]}}, {{model: {tmp_path}/b, layer_range: [1, 3]}}]
  base_model: {tmp_path}/b
parameters: {{t: 0}}
"""
    merged = gm.merge_state_dicts(text)
    assert torch.equal(merged[UP.format(0)], family["a"][UP.format(0)])
    assert torch.equal(merged[UP.format(1)], family["b"][UP.format(1)])


def test_one_model_twice_in_a_slice(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """Two ranges of one model can be averaged."""
    text = f"""\
merge_method: linear
slices:
- sources:
  - {{model: {tmp_path}/a, layer_range: [0, 1], parameters: {{weight: 1}}}}
  - {{model: {tmp_path}/a, layer_range: [2, 3], parameters: {{weight: 1}}}}
"""
    merged = gm.merge_state_dicts(text)
    expected = (family["a"][UP.format(0)].double() + family["a"][UP.format(2)].double()) / 2
    assert torch.allclose(merged[UP.format(0)].double(), expected, rtol=1e-6, atol=1e-7)


def test_a_tensor_that_only_one_source_has_is_refused(family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """A block's bias that only the second source has is no more dropped in a slice than in a merge of whole models."""
    extra = family["b"] | {"model.layers.1.self_attn.q_proj.bias": torch.ones(16)}
    tiny.save(tmp_path / "b", extra, tiny.config(tmp_path / "b"))
    with pytest.raises(gm.IncompatibleModels, match=r"layers\.1\.self_attn\.q_proj\.bias"):
        gm.plan(SLERP.format(tmp_path))
    unused = tiny.passthrough(tmp_path, "b 0 1", "a 1 3")  # the block with the bias is not taken: nothing to refuse
    left_out = gm.plan(unused).left_out
    assert left_out[f"{tmp_path}/b: model.layers.1.self_attn.q_proj.bias"] == "in none of the recipe's slices"


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ("- sources: [{model: ROOT/a, layer_range: [0, 4]}]", "which has 3 blocks"),
        ("- sources: [{model: ROOT/a, layer_range: [0, 2]}, {model: ROOT/b, layer_range: [0, 1]}]", "2 and 1 blocks"),
    ],
)
def test_wrong_ranges_are_refused(slices: str, message: str, family: dict[str, tiny.Tensors], tmp_path: Path) -> None:
    """A range beyond the model, or ranges of different lengths, with the line."""
    text = f"merge_method: linear\nslices:\n{slices.replace('ROOT', str(tmp_path))}\nparameters: {{weight: 1}}\n"
    with pytest.raises(gm.RecipeError, match=message) as caught:
        gm.plan(text)
    assert caught.value.where == "<recipe>:3"
