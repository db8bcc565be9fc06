"""Every tensor of every parent is merged, copied by a rule, left out by a rule, or the merge is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import geomerge as gm
import tiny

LINEAR = """\
merge_method: linear
models:
- {model: a, parameters: {weight: 1}}
- {model: b, parameters: {weight: 3}}
"""
W = torch.arange(12.0).view(3, 4)


def state(**more: torch.Tensor) -> tiny.Tensors:
    """A block's weight, and what else is given (dots for double underscores)."""
    return {"model.layers.0.mlp.up_proj.weight": W.clone()} | {k.replace("__", "."): v for k, v in more.items()}


def test_unmatched_tensors_are_refused() -> None:
    """A tensor that one parent lacks stops the merge, whichever parent it is; both are named."""
    extra = state(model__layers__0__mlp__up_proj__bias=torch.ones(3))
    for a, b, lacks in ((extra, state(), "b"), (state(), extra, "a")):
        with pytest.raises(
            gm.IncompatibleModels, match=rf"{lacks} has no model\.layers\.0\.mlp\.up_proj\.bias"
        ) as caught:
            gm.plan(LINEAR, models={"a": a, "b": b})
        assert "unmatched: copy" in str(caught.value)


def test_the_odd_models_line() -> None:
    """Which model has less than the others, or more, stands there in the recipe."""
    text = "merge_method: linear\nmodels:\n  - model: a\n  - model: b\nparameters: {weight: 1}\n"
    extra = state(model__layers__0__mlp__up_proj__bias=torch.ones(1))
    for a, b in ((extra, state()), (state(), extra)):
        with pytest.raises(gm.IncompatibleModels) as caught:
            gm.plan(text, models={"a": a, "b": b})
        assert caught.value.where == "<recipe>:4"


def test_many_unmatched_tensors_are_counted() -> None:
    """Five are missing: four are shown, all are counted."""
    extra = state(**{f"model__x{i}": torch.ones(1) for i in range(5)})
    with pytest.raises(gm.IncompatibleModels, match=r"5 tensors are not in every model.*and 1 more"):
        gm.plan(LINEAR, models={"a": extra, "b": state()})
    with pytest.raises(gm.IncompatibleModels, match="1 tensor is not in every model"):
        gm.plan(LINEAR, models={"a": state(model__x=torch.ones(1)), "b": state()})


def test_unmatched_tensors_can_be_copied() -> None:
    """`unmatched: copy` takes them from who has them, in the output's dtype, and says so."""
    a = state(model__only_a=torch.full((3,), 0.1))
    b = state(model__only_b=torch.arange(4))
    text = LINEAR + "unmatched: copy\ndtype: bfloat16\n"
    plan = gm.plan(text, models={"a": a, "b": b})
    rules = {n.name: n.rule for n in plan.output_nodes()}
    assert rules == {
        "model.layers.0.mlp.up_proj.weight": "merge",
        "model.only_a": "copy: not in every model, taken from a",
        "model.only_b": "copy: only in b",
    }
    merged = gm.merge_state_dicts(text, {"a": a, "b": b})
    assert torch.equal(merged["model.only_a"], torch.full((3,), 0.1).bfloat16())
    assert torch.equal(merged["model.only_b"], torch.arange(4))


def test_blocks_are_not_copied_behind_the_last(tmp_path: Path) -> None:
    """The configuration comes from the first model, and does not know of them: what loads the output would drop them."""
    for name, blocks in (("a", 1), ("b", 2)):
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": blocks}
        weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(2, 3) for i in range(blocks)}
        tiny.save(tmp_path / name, weights, config=config)
    models = f"models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\nparameters: {{weight: 1}}\n"
    for more in ("", "unmatched: copy\n"):
        with pytest.raises(gm.IncompatibleModels, match=r"(?s)a has no model\.layers\.1\.mlp.*b has more blocks than"):
            gm.plan(f"merge_method: linear\n{models}{more}")
    swapped = models.replace("/a}", "/x}").replace("/b}", "/a}").replace("/x}", "/b}")
    plan = gm.plan(f"merge_method: linear\n{swapped}unmatched: copy\n")
    assert plan.config["num_hidden_layers"] == len(list(plan.output_nodes())) == 2


def test_integers_and_truth_values_are_copied() -> None:
    """They come from the first model bit for bit, whatever `dtype` says."""
    more = {"model__ids": torch.tensor([[1, 2**53 + 1]]), "model__flags": torch.tensor([True, False])}
    a, b = state(**more), state(**{k: v.clone().fill_(1) for k, v in more.items()})
    text = LINEAR + "dtype: bfloat16\n"
    merged = gm.merge_state_dicts(text, {"a": a, "b": b})
    assert torch.equal(merged["model.ids"], a["model.ids"])
    assert torch.equal(merged["model.flags"], a["model.flags"])
    rules = {n.name: n.rule for n in gm.plan(text, models={"a": a, "b": b}).output_nodes()}
    assert rules["model.ids"] == "copy: int64 tensor of the first model"
    assert rules["model.flags"] == "copy: bool tensor of the first model"


def test_buffers_are_copied_and_not_needed_in_every_model() -> None:
    """A rotary table is computed, not trained: the first model's is kept; one that only another has is left out."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_table = state() | {name: torch.tensor([1.0, 0.1])}
    other = state() | {name: torch.tensor([5.0, 5.0])}
    merged = gm.merge_state_dicts(LINEAR, {"a": with_table, "b": other})
    assert torch.equal(merged[name], with_table[name])
    plan = gm.plan(LINEAR, models={"a": state(), "b": other})
    assert name not in {n.name for n in plan.output_nodes()}
    assert "buffer" in plan.left_out[f"b: {name}"]


def test_infinite_masks_are_no_damage(tmp_path: Path) -> None:
    """A causal mask holds -inf on purpose: such a buffer is copied, from files as from memory."""
    name = "h.0.attn.masked_bias"
    a = {"h.0.attn.c_attn.weight": W.clone(), name: torch.tensor(-torch.inf)}
    for n in "ab":
        tiny.save(tmp_path / n, a, {"model_type": "gpt2", "n_layer": 1})
    assert gm.merge_state_dicts(LINEAR, {"a": a, "b": a})[name] == -torch.inf
    text = LINEAR.replace("model: ", f"model: {tmp_path}/")
    gm.merge(text, tmp_path / "out")
    assert tiny.read(tmp_path / "out")[name] == -torch.inf
    a[name] = torch.tensor(torch.nan)
    tiny.save(tmp_path / "a", a, {"model_type": "gpt2", "n_layer": 1})
    with pytest.raises(gm.NotFiniteError, match="masked_bias"):
        gm.merge_state_dicts(LINEAR, {"a": a, "b": a})
    with pytest.raises(gm.NotFiniteError, match="masked_bias"):
        gm.merge(text, tmp_path / "out2")


def test_dtypes_of_the_parents_are_promoted() -> None:
    """Without `dtype` each tensor gets the widest of its parents' dtypes; bfloat16 and float16 meet in float32."""
    dtypes = {
        "x": ("bfloat16", "float32"),
        "y": ("bfloat16", "float16"),
        "z": ("float16", "float16"),
        "u": ("float64", "bfloat16"),
    }
    a = state(**{f"model__{k}": torch.ones(2, dtype=getattr(torch, d[0])) for k, d in dtypes.items()})
    b = state(**{f"model__{k}": torch.ones(2, dtype=getattr(torch, d[1])) for k, d in dtypes.items()})
    merged = gm.merge_state_dicts(LINEAR, {"a": a, "b": b})
    found = {k: str(merged[f"model.{k}"].dtype).removeprefix("torch.") for k in dtypes}
    assert found == {"x": "float32", "y": "float32", "z": "float16", "u": "float64"}


def test_eight_bit_codes_are_refused() -> None:
    """FP8 codes without their scales mean nothing, in whichever parent they are."""
    codes = {"model.layers.0.mlp.up_proj.weight": W.to(torch.float8_e4m3fn)}
    for a, b in ((codes, state()), (state(), codes)):
        with pytest.raises(gm.IncompatibleModels, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds 8-bit codes"):
            gm.plan(LINEAR, models={"a": a, "b": b})


T5 = {"model_type": "t5", "num_layers": 1, "num_decoder_layers": 1, "is_encoder_decoder": True}


def t5(seed: int) -> tiny.Tensors:
    """Two stacks and a shared embedding."""
    names = ["encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"]
    shapes = dict.fromkeys(["shared.weight", *names, "encoder.final_layer_norm.weight"], (4, 4))
    return tiny.random_tensors(shapes, seed)


def test_modules_account_for_every_model(tmp_path: Path) -> None:
    """A module that takes only some of the models says of the others' tensors that they are left out."""
    for seed, name in enumerate("ab"):
        tiny.save(tmp_path / name, t5(seed), T5)
    text = f"""\
merge_method: linear
modules:
  encoder: {{models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]}}
  decoder: {{models: [{{model: {tmp_path}/b}}]}}
parameters: {{weight: 1}}
"""
    plan = gm.plan(text)
    rules = {n.name: n.rule for n in plan.output_nodes()}
    assert rules.keys() == t5(0).keys()
    assert rules["shared.weight"] == f"copy: module 'shared' is not in the recipe, taken from {tmp_path}/a"
    assert (
        plan.left_out[f"{tmp_path}/a: decoder.block.0.layer.0.SelfAttention.q.weight"]
        == "its module is taken from other models"
    )
    assert f"{tmp_path}/b: shared.weight" in plan.left_out
    merged = gm.merge_state_dicts(text)
    assert torch.equal(
        merged["decoder.block.0.layer.0.SelfAttention.q.weight"],
        t5(1)["decoder.block.0.layer.0.SelfAttention.q.weight"],
    )
    assert torch.equal(merged["shared.weight"], t5(0)["shared.weight"])


def test_every_tensor_is_somewhere(tmp_path: Path) -> None:
    """Over recipes of every structure: each tensor of each parent is an operand of the output or stands in `left_out`."""
    tiny.family(tmp_path, "base a b")
    head = f"base_model: {tmp_path}/base\n"
    a, b = f"model: {tmp_path}/a", f"model: {tmp_path}/b"
    shifted = f"[{{model: {tmp_path}/base, layer_range: [0, 2]}}, {{{b}, layer_range: [1, 3]}}]"
    recipes = [
        f"merge_method: ties\n{head}models: [{{{a}}}, {{{b}}}]\nparameters: {{weight: 1}}\n",
        tiny.passthrough(tmp_path, "a 0 2", "b 1 3"),
        f"merge_method: slerp\n{head}slices: [{{sources: {shifted}}}]\nparameters: {{t: 0.5}}\n",
    ]
    for text in recipes:
        plan = gm.plan(text)
        used = {f"{plan.inputs[o.input].ref}: {o.tensor}" for n in plan.output_nodes() for o in n.operands}
        for given in plan.inputs:
            for name in tiny.read(Path(given.path)):
                assert (f"{given.ref}: {name}" in used) != (f"{given.ref}: {name}" in plan.left_out), name
