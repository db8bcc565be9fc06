"""How an adapter meets its base: names, ties, vocabularies, refusals, and every verb that opens models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import PREFIX, close, dense, factors, llama, merged, write_adapter
from safetensors.torch import load_file, save_file

import geomerge
from cli_samples import Program
from geomerge.adapter.combine import combine
from geomerge.checkpoint.change import Change
from geomerge.checkpoint.lora import open_adapter
from geomerge.checkpoint.reader import from_state_dict
from geomerge.continual import State
from geomerge.diagnose import diagnose
from geomerge.engine.adapted import adapt, open_model
from geomerge.engine.lora import LoraSource, whole
from geomerge.engine.plan import Plan
from geomerge.engine.processes import Processes
from geomerge.engine.run import open_inputs, run_plan
from geomerge.errors import GeomergeError, IncompatibleModels, ModelError, RecipeError
from geomerge.methods.tile import TensorSource
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import NOWHERE

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def opened(text: str) -> Any:
    return open_model(parse_reference(text, NOWHERE))


def changed(base: Path, adapter: Path, *modules: str) -> dict[str, torch.Tensor]:
    """The base with the dense ΔW of some modules added."""
    made = weights(base)
    for module in modules:
        made[f"{module}.weight"] = made[f"{module}.weight"] + dense(adapter, module)
    return made


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Two modules of rank 2, scale 3."""
    tensors = {**factors(Q, 16, 16, 2, 1), **factors(UP, 24, 16, 2, 2)}
    return write_adapter(tmp_path / "adapter", tensors, str(base), lora_alpha=6)


def test_literal(tmp_path: Path) -> None:
    """W + s·B·A with numbers that fit on a line: s = 4/2, B·A = [[1, 2], [3, 6]]."""
    save_file({"m.weight": torch.tensor([[10.0, 20.0], [30.0, 40.0]])}, tmp_path / "base.safetensors")
    made = write_adapter(
        tmp_path / "a",
        {
            "m.lora_A.weight": torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
            "m.lora_B.weight": torch.tensor([[1.0, 5.0], [3.0, 5.0]]),
        },
        lora_alpha=4,
    )
    assert merged(f"{tmp_path}/base.safetensors+{made}")["m.weight"].tolist() == [[12.0, 24.0], [36.0, 52.0]]


def test_zero_adapter_changes_no_bit(tmp_path: Path) -> None:
    """Factors of zero leave a bfloat16 base as it is, whatever dtype they have."""
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    tensors = factors(Q, 16, 16, 2, 1)
    tensors[f"{Q}.lora_B.weight"].zero_()
    made = write_adapter(tmp_path / "a", tensors)
    found = geomerge.merge_state_dicts(f"merge_method: passthrough\nmodels: [{{model: {base}+{made}}}]\n")
    for name, value in weights(base).items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == torch.bfloat16


def test_an_adapter_names_its_base(base: Path, adapter: Path) -> None:
    """The adapter alone and base+adapter are the same model."""
    wanted = changed(base, adapter, Q, UP)
    close(merged(adapter), wanted)
    close(merged(f"{base}+{adapter}"), wanted)


@pytest.mark.parametrize("columns", [3, 700])
def test_bits_do_not_depend_on_where_a_read_begins(columns: int) -> None:
    """Every piece of a changed tensor is what it is in a read of the whole."""
    torch.manual_seed(0)
    weight, b, a = torch.randn(1000, columns), torch.randn(1000, 4), torch.randn(4, columns)

    def source() -> LoraSource:
        held = [whole(TensorSource(f), tuple(f.shape)) for f in (b, a)]
        return LoraSource(TensorSource(weight), tuple(weight.shape), Change("F32", "b", "a", 0.7), *held)

    everything = torch.empty(weight.numel(), dtype=torch.float64)
    source().read(0, everything)
    torch.testing.assert_close(everything.view_as(weight), weight.double() + 0.7 * (b.double() @ a.double()))
    other = source()
    for start in (weight.numel() - 17, 0, 12345 % weight.numel(), 1):
        piece = torch.empty(min(997, weight.numel() - start), dtype=torch.float64)
        other.read(start, piece)
        assert torch.equal(piece, everything[start : start + len(piece)])


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_over_many_blocks(transposed: bool) -> None:
    """The norm of an output is that of its whole row, or column where the weight is stored as (in, out)."""
    torch.manual_seed(0)
    weight, b, a = (torch.randn(s, dtype=torch.float64) for s in ((900, 700), (900, 4), (4, 700)))
    change = Change("F64", "b", "a", 0.7, transposed, "m")
    magnitude = torch.rand(900, dtype=torch.float64)
    stored = weight.T.contiguous() if transposed else weight
    held = [whole(TensorSource(f), tuple(f.shape)) for f in (b, a, magnitude)]
    found = torch.empty(weight.numel(), dtype=torch.float64)
    LoraSource(TensorSource(stored), tuple(stored.shape), change, *held).read(0, found)
    adapted = weight + 0.7 * b @ a
    wanted = magnitude.unsqueeze(1) * adapted / adapted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.view_as(stored), wanted.T if transposed else wanted, rtol=1e-12, atol=1e-12)


def test_dora_of_a_zero_row_is_zero(tmp_path: Path) -> None:
    """An output whose weights are all zero has no direction to scale: it stays zero instead of NaN."""
    save_file({"m.weight": torch.zeros(3, 2)}, tmp_path / "base.safetensors")
    tensors = {
        "m.lora_A.weight": torch.ones(2, 2),
        "m.lora_B.weight": torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]),
        "m.lora_magnitude_vector": torch.tensor([5.0, 5.0, 5.0]),
    }
    made = write_adapter(tmp_path / "a", tensors, use_dora=True)
    found = merged(f"{tmp_path}/base.safetensors+{made}")["m.weight"]
    close({"w": found}, {"w": torch.tensor([[0, 0], [12.5**0.5, 12.5**0.5], [0, 0]], dtype=torch.float64)})


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inside", "outside"), [("transformer.", ""), ("", "model."), ("a.b.", "b.a.")])
def test_other_prefixes(tmp_path: Path, inside: str, outside: str) -> None:
    """Names in memory may have other leading components than names on disk; what has none of them stays."""
    torch.manual_seed(0)
    base = {f"{outside}h.{i}.fc.weight": torch.randn(4, 3, dtype=torch.float64) for i in range(2)}
    base["lm_head.weight"] = torch.randn(5, 3, dtype=torch.float64)
    save_file(base, tmp_path / "base.safetensors")
    names = [f"{inside}h.0.fc", f"{inside}h.1.fc"]
    tensors = {k: v for i, n in enumerate(names) for k, v in factors(n, 4, 3, 2, i).items()}
    tensors |= factors("lm_head", 5, 3, 2, 9)
    made = write_adapter(tmp_path / "a", tensors)
    for i, name in enumerate(names):
        base[f"{outside}h.{i}.fc.weight"] += dense(made, name)
    base["lm_head.weight"] += dense(made, "lm_head")
    close(merged(f"{tmp_path}/base.safetensors+{made}"), base)


def test_ambiguous_names_are_refused(tmp_path: Path) -> None:
    """Two towers that both have the module: nothing is guessed."""
    save_file({f"{t}.h.0.fc.weight": torch.ones(4, 3) for t in ("vision", "text")}, tmp_path / "base.safetensors")
    made = write_adapter(tmp_path / "a", factors("h.0.fc", 4, 3, 2, 1))
    with pytest.raises(IncompatibleModels, match=r"in 2 ways: .* text\.h\.0\.fc\.weight or vision\.h"):
        merged(f"{tmp_path}/base.safetensors+{made}")


# -- tied weights and vocabularies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_tied_head_is_stored_apart(tied: Path, tmp_path: Path, module: str) -> None:
    """Only the one that the adapter was trained on changes, and the output's config unties them."""
    if module == "lm_head":
        tensors = factors(module, 40, 16, 2, 1)
    else:
        made = factors(module, 16, 40, 2, 1)
        tensors = {k.replace("lora_", "lora_embedding_").removesuffix(".weight"): v for k, v in made.items()}
    adapter = write_adapter(tmp_path / "a", tensors)
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {tied}+{adapter}}}]\n")
    geomerge.merge(recipe, tmp_path / "out")
    found, own = weights(tmp_path / "out"), weights(tied)["model.embed_tokens.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    a, b = (tensors[name] for name in sorted(tensors))
    wanted = {"lm_head.weight": own, "model.embed_tokens.weight": own}
    wanted[f"{module}.weight"] = own + (b @ a if module == "lm_head" else (b @ a).T)
    close({name: found[name] for name in wanted}, wanted)
    assert any("stored apart" in note for note in json.loads((tmp_path / "out" / "geomerge.json").read_text())["notes"])


def test_a_larger_vocabulary(tied: Path, tmp_path: Path) -> None:
    """An embedding with more rows replaces the tied one; config and tokenizer follow."""
    more = torch.randn(43, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    adapter = write_adapter(tmp_path / "a", {**factors(Q, 16, 16, 2, 1), "model.embed_tokens.weight": more})
    with pytest.raises(IncompatibleModels, match=r"43 rows and no tokenizer"):
        merged(f"{tied}+{adapter}")
    (adapter / "tokenizer_config.json").write_text('{"from": "adapter"}')
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {tied}+{adapter}}}]\n")
    geomerge.merge(recipe, tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (43, True)
    assert torch.equal(weights(out)["model.embed_tokens.weight"], more)
    assert "lm_head.weight" not in weights(out)
    assert (out / "tokenizer_config.json").read_text() == '{"from": "adapter"}'


def test_half_a_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    """An untied head must grow together with its embedding."""
    adapter = write_adapter(tmp_path / "a", {"model.embed_tokens.weight": torch.ones(43, 16)})
    with pytest.raises(IncompatibleModels, match="another size for some matrices only"):
        merged(f"{base}+{adapter}")


def test_whole_tensors_take_the_base_dtype(tmp_path: Path) -> None:
    """A float32 norm in an adapter does not make a bfloat16 model a mixed one."""
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": torch.full((16,), 1.2345678)})
    recipe = f"merge_method: passthrough\nmodels: [{{model: {base}+{adapter}}}]\n"
    found = geomerge.merge_state_dicts(recipe)["model.norm.weight"]
    assert torch.equal(found, torch.full((16,), 1.2345678).bfloat16())


# -- refusals ----------------------------------------------------------------------------------------------------------

GOOD = factors(Q, 16, 16, 2, 1)


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (GOOD, {"peft_type": "IA3"}, "of the type 'IA3', not LORA"),
        (GOOD, {"peft_type": None}, "not LORA"),
        (GOOD, {"r": 8}, "have the rank 2, its config says 8"),
        (GOOD, {"lora_alpha": None}, "lora_alpha of .* is None"),
        (GOOD, {"init_lora_weights": "pissa_niter_4"}, "started by pissa_niter_4"),
        (GOOD, {"use_dora": True}, "lacks DoRA's magnitudes"),
        (GOOD, {"target_parameters": ["x"]}, "target_parameters"),
        (GOOD, {"alora_invocation_tokens": [1]}, "activated LoRA"),
        (GOOD, {"rank_pattern": {"(a+)+": 3}}, "too complicated"),
        (GOOD, {"rank_pattern": {".*.*.*.*x": 3}}, "too complicated"),
        (GOOD, {"alpha_pattern": {"[": 3}}, "no regular expression"),
        ({**GOOD, f"{Q}.hada_w1_a": torch.ones(2, 2)}, {}, "is LoHa"),
        ({**GOOD, f"{Q}.lokr_w1": torch.ones(2, 2)}, {}, "is LoKr"),
        ({**GOOD, f"{Q}.lora_E": torch.ones(2, 1)}, {}, "is AdaLoRA"),
        ({k: v for k, v in GOOD.items() if "lora_A" in k}, {}, "not both factors"),
        (factors("model.layers.0.self_attn.q_prj", 16, 16, 2, 1), {}, "the base has no .*q_prj"),
        (factors(Q, 16, 12, 2, 1), {}, r"has B \[16, 2\] and A \[2, 12\] for .*\[16, 16\]"),
        (factors("model.layers.1.mlp.up_proj", 16, 24, 2, 1), {}, r"which has the shape \[24, 16\] in the base"),
        ({"model.norm.weight": torch.ones(17)}, {}, r"has \[17\] for model.norm.weight"),
        ({"score.weight": torch.ones(3, 16)}, {}, "the base has no score.weight"),
        ({**GOOD, f"{Q}.lora_B.bias": torch.ones(16)}, {}, "has none in the base"),
        ({f"{Q}.lora_A.weight": torch.ones(0), f"{Q}.lora_B.weight": torch.ones(16, 2)}, {}, "gathered"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 16), f"{Q}.lora_B.weight": torch.ones(16, 3)}, {}, "do not multiply"),
        ({k: v.to(torch.int32) for k, v in GOOD.items()}, {}, "is int32, not of floats"),
    ],
)
def test_refused(base: Path, tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], says: str) -> None:
    """What is not plain LoRA for this base is named and refused."""
    adapter = write_adapter(tmp_path / "a", tensors, "other/base", **config)
    with pytest.raises(ModelError, match=says) as caught:
        merged(f"{base}+{adapter}")
    assert str(adapter) in str(caught.value)


def test_places_that_hold_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A whole model, a pickle, an adapter without a base, a base that is gone, an adapter on an adapter."""
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        merged(f"{base}+{base}")
    twice, second = opened(f"{base}+{adapter}"), open_adapter(str(adapter))
    with pytest.raises(IncompatibleModels, match="has an adapter already"):
        adapt(twice, second, "x")
    alone = write_adapter(tmp_path / "alone", GOOD)
    with pytest.raises(ModelError, match="does not say what its base is"):
        merged(alone)
    gone = write_adapter(tmp_path / "gone", GOOD, str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"its base .*nowhere cannot be opened"):
        merged(gone)


def test_pickled_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    """As PEFT wrote them until 2023: only where they are allowed, and then the same merge, in a saved plan, too."""
    old = shutil.copytree(adapter, tmp_path / "old")
    expected = merged(f"{base}+{adapter}")
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.bin.*is a pickle, which can run any code"):
        merged(f"{base}+{old}")
    recipe = f"merge_method: passthrough\nmodels: [{{model: {base}+{old}}}]\n"
    plan = geomerge.plan(recipe, allow_pickle=True)
    plan.save(tmp_path / "plan.json")
    saved = Plan.load(tmp_path / "plan.json")
    out = tmp_path / "out"
    for each in (plan, saved):
        run_plan(each, out, inputs=open_inputs(each, allow_pickle=True), force=True)
        found = load_file(out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    both = [combine([each], tmp_path / "one", force=True, allow_pickle=True).layers for each in (adapter, old)]
    assert both[0] == both[1]
    torch.save({"base_model.model.x.lora_A.weight": print}, old / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin"):
        open_adapter(str(old), allow_pickle=True)


def test_a_base_in_memory_counts(base: Path, adapter: Path) -> None:
    """Two of them with one adapter are two models, to the fingerprint of samples and to the hash of everything."""
    plain = weights(base)
    given = {
        name: from_state_dict({k: v + shift for k, v in plain.items()}, name=name)
        for name, shift in (("x", 0.0), ("y", 0.25))
    }
    found = [open_model(parse_reference(f"{name}+{adapter}", NOWHERE), given=given) for name in given]
    assert found[0].fingerprint() != found[1].fingerprint()
    assert found[0].content_hash() != found[1].content_hash()


def test_a_continual_state_knows_its_base_with_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Later steps need not be told of either."""
    for seed in (7, 8):
        torch.manual_seed(seed)
        (tmp_path / str(seed)).mkdir()
        tensors = {name: value + torch.randn_like(value) / 100 for name, value in weights(base).items()}
        save_file(tensors, tmp_path / str(seed) / "model.safetensors", {"format": "pt"})
        shutil.copy(base / "config.json", tmp_path / str(seed))
    geomerge.continue_merge(tmp_path / "state", [tmp_path / "7"], base=f"{base}+{adapter}")
    geomerge.continue_merge(tmp_path / "state", [tmp_path / "8"])
    assert State.read(tmp_path / "state").base.model == "llama+adapter"


def test_an_earlier_document_takes_no_adapter(base: Path, adapter: Path) -> None:
    """An adapter belongs to a model on disk."""
    text = (
        f"name: first\nmerge_method: passthrough\nmodels: [{{model: {base}}}]\n---\n"
        f"merge_method: passthrough\nmodels: [{{model: first+{adapter}}}]\n"
    )
    with pytest.raises(RecipeError, match="earlier document"):
        geomerge.merge_state_dicts(text)


# -- kohya -------------------------------------------------------------------------------------------------------------


def kohya(path: Path, prefix: str, modules: dict[str, tuple[int, ...]], *, alpha: float | None = 1.0) -> Path:
    torch.manual_seed(5)
    tensors = {}
    for name, (out, inner, *rest) in modules.items():
        flat = prefix + name.replace(".", "_")
        tensors[f"{flat}.lora_up.weight"] = torch.randn(out, 2, *[1] * len(rest), dtype=torch.float64)
        tensors[f"{flat}.lora_down.weight"] = torch.randn(2, inner, *rest, dtype=torch.float64)
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


UNET = {"down_blocks.0.attn1.to_q": (4, 6), "down_blocks.0.conv": (4, 6, 3, 3), "proj_in": (4, 6, 1, 1)}


@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 0.5), (None, 1.0)])
def test_kohya(tmp_path: Path, alpha: float | None, scale: float) -> None:
    """Flattened names, alpha beside the factors (without one the scale is 1); the text encoder's part is left, with a note."""
    base = {f"{n}.weight": torch.randn(s, dtype=torch.float64) for n, s in UNET.items()}
    save_file(base, tmp_path / "unet.safetensors")
    path = kohya(tmp_path / "k.safetensors", "lora_unet_", UNET, alpha=alpha)
    tensors = load_file(path)
    extra = {f"lora_te_text_fc.lora_{s}.weight": torch.ones(2, 2) for s in ("up", "down")}
    save_file({**tensors, **extra}, path)
    found = merged(f"{tmp_path}/unet.safetensors+{path}")
    for name, shape in UNET.items():
        flat = "lora_unet_" + name.replace(".", "_")
        b, a = tensors[f"{flat}.lora_up.weight"], tensors[f"{flat}.lora_down.weight"]
        base[f"{name}.weight"] += scale * (b.flatten(1) @ a.flatten(1)).view(shape)
    close(found, base)
    assert any("another part" in note for note in opened(f"{tmp_path}/unet.safetensors+{path}").notes)


def test_kohya_refusals(tmp_path: Path) -> None:
    """Ambiguous, partly known, unknown, and files that are something else."""
    save_file({"a.b_c.weight": torch.ones(4, 6), "a_b.c.weight": torch.ones(4, 6)}, tmp_path / "m.safetensors")
    base = f"{tmp_path}/m.safetensors"
    path = kohya(tmp_path / "k.safetensors", "lora_unet_", {"a.b.c": (4, 6)})
    with pytest.raises(IncompatibleModels, match=r"may be a_?.b"):
        merged(f"{base}+{path}")
    save_file({"x.weight": torch.ones(4, 6)}, tmp_path / "m.safetensors")
    path = kohya(tmp_path / "k.safetensors", "lora_unet_", {"x": (4, 6), "y": (4, 6)})
    with pytest.raises(IncompatibleModels, match="no module for lora_unet_y, though it has 1 others of 2"):
        merged(f"{base}+{path}")
    path = kohya(tmp_path / "k.safetensors", "lora_te_", {"y": (4, 6)})
    with pytest.raises(IncompatibleModels, match="none of the adapter's 1 modules"):
        merged(f"{base}+{path}")
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2)}, path)
    with pytest.raises(ModelError, match="LoHa"):
        merged(f"{base}+{path}")
    with pytest.raises(ModelError, match="no LoRA file in kohya's layout"):
        merged(f"{base}+{base}")


# -- verbs -------------------------------------------------------------------------------------------------------------


def test_merge_of_two_adapters(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Task arithmetic on base+adapter is arithmetic on ΔW, also through a saved plan, and the manifest names the adapters."""
    other = write_adapter(tmp_path / "other", factors(Q, 16, 16, 3, 7), r=3, lora_alpha=3)
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n"
        f"- {{model: {base}+{adapter}, parameters: {{weight: 0.5}}}}\n"
        f"- {{model: {{model: {{path: {base}}}, lora: {other}}}, parameters: {{weight: 2}}}}\n"
    )
    geomerge.plan(recipe).save(tmp_path / "plan.json")
    wanted = weights(base)
    wanted[f"{Q}.weight"] = wanted[f"{Q}.weight"] + 0.5 * dense(adapter, Q) + 2 * dense(other, Q)
    wanted[f"{UP}.weight"] = wanted[f"{UP}.weight"] + 0.5 * dense(adapter, UP)
    close(geomerge.merge_state_dicts(recipe), wanted, 1e-11)
    geomerge.merge(recipe, tmp_path / "out")
    from geomerge.engine.plan import Plan

    geomerge.merge(Plan.load(tmp_path / "plan.json"), tmp_path / "again")
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "again"))
    assert one == two
    manifest = json.loads((tmp_path / "out" / "geomerge.json").read_text())
    assert {i.get("adapter") for i in manifest["inputs"]} == {None, "adapter", "other"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))
    with pytest.raises(GeomergeError, match="not the one that the plan was made for"):
        geomerge.merge(Plan.load(tmp_path / "plan.json"), tmp_path / "third")


@pytest.mark.parametrize("tile", [1 << 7, 1 << 17])
def test_tiles_threads_and_processes(base: Path, adapter: Path, tmp_path: Path, tile: int) -> None:
    """The bytes do not depend on them."""
    text = f"merge_method: slerp\nbase_model: {base}\nmodels: [{{model: {base}}}, {{model: {base}+{adapter}}}]\n"
    recipe = tmp_path / "r.yml"
    recipe.write_text(text + "parameters: {t: 0.3}\ndtype: bfloat16\n")
    plain = geomerge.merge_state_dicts(recipe, threads=1)
    geomerge.merge(recipe, tmp_path / "out", tile=tile, threads=3)
    geomerge.merge(recipe, tmp_path / "forked", tile=tile, executor=lambda work: Processes(work, 2))
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, plain[name])
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "forked"))
    assert one == two


def test_state_dict_base(base: Path, adapter: Path) -> None:
    """A base in memory takes an adapter from disk."""
    recipe = f"merge_method: passthrough\nmodels: [{{model: mine+{adapter}}}]\ndtype: float64\n"
    close(geomerge.merge_state_dicts(recipe, {"mine": weights(base)}), changed(base, adapter, Q, UP))


def test_live(base: Path, adapter: Path) -> None:
    """A live merge reads an adapted parent into memory, factors and all."""
    from transformers import AutoModelForCausalLM

    from geomerge.engine.live import LiveMerge

    name = f"{base}+{adapter}"
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    live = LiveMerge({name: name}, module)
    (adapter / "adapter_model.safetensors").rename(adapter / "gone")
    live.blend(geomerge.load_recipe(f"merge_method: passthrough\nmodels: [{{model: {name}}}]\n"))
    (adapter / "gone").rename(adapter / "adapter_model.safetensors")
    close(dict(module.state_dict()), changed(base, adapter, Q, UP))


def test_codes_with_an_adapter(tmp_path: Path) -> None:
    """An 8-bit base is decoded, then changed."""
    codes = torch.tensor([[10, -20, 30], [1, 2, 3]], dtype=torch.int8)
    scale = torch.tensor([0.5, 2.0])
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({"m.weight": codes, "m.weight_scale": scale}, folder / "model.safetensors")
    quantised = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "quantization_config": quantised}))
    made = write_adapter(tmp_path / "a", factors("m", 2, 3, 2, 1))
    found = merged(f"{folder}+{made}")
    close(found, {"m.weight": codes.double() * scale.double().unsqueeze(1) + dense(made, "m")})


def test_inspect(run: Program, base: Path, adapter: Path) -> None:
    """The page and the JSON say what the adapter does; NaN in a factor is found in the tensor that it changes."""
    code, out, _ = run("inspect", f"{base}+{adapter}", "--json")
    said = json.loads(out)["adapter"]
    assert (code, said["changed"], said["ranks"], said["scales"]) == (0, 2, [2], [3.0])
    code, out, _ = run("inspect", adapter)
    assert code == 0
    assert "2 tensors changed, rank 2, scale 3" in " ".join(out.split())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({**tensors, f"{PREFIX}model.norm.weight": torch.ones(16)}, adapter / "adapter_model.safetensors")
    assert "2 tensors changed, 1 replaced" in " ".join(run("inspect", adapter).out.split())
    tensors[f"{PREFIX}{Q}.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    code, out, err = run("inspect", adapter)
    assert code == 3
    assert f"{Q}.weight" in err


def test_plan_and_diagnose(run: Program, base: Path, adapter: Path, tmp_path: Path) -> None:
    """`plan` shows the note on another base; the diagnosis sees the task vector where the adapter changes something."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(base, copy)
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {copy}+{adapter}}}]\n")
    code, out, err = run("plan", recipe)
    assert (code, err) == (0, "")
    assert "names llama as its base and is added to elsewhere" in " ".join(out.split())
    other = write_adapter(tmp_path / "other", factors(Q, 16, 16, 3, 7), r=3, lora_alpha=3)
    said = diagnose(f"{base}+{adapter}", f"{base}+{other}", base=base)
    task = next(reading for reading in said.pairs[0].angles.tensors if reading.name == f"{Q}.weight").task
    assert task is not None
    ours, theirs = dense(adapter, Q), dense(other, Q)
    assert task.norms == pytest.approx((ours.norm().item(), theirs.norm().item()))
    assert task.cosine == pytest.approx((ours * theirs).sum().item() / (ours.norm() * theirs.norm()).item())


@pytest.mark.parametrize("method", ["knots", "optmerge"])
def test_methods_for_adapters(base: Path, adapter: Path, tmp_path: Path, method: str) -> None:
    """They take adapters as such; what these were merged into has to be admitted, and gives the same model."""
    other = write_adapter(tmp_path / "other", factors(Q, 16, 16, 2, 3), str(base))
    geomerge.merge(f"merge_method: passthrough\nmodels: [{{model: {other}}}]\n", tmp_path / "merged")
    mode = ", mode: lora" if method == "optmerge" else ""

    def recipe(second: Path, admitted: str) -> str:
        models = f"[{{model: {base}+{adapter}}}, {{model: {second}}}]"
        parameters = f"{{full_weights: {admitted}{mode}}}"
        return f"merge_method: {method}\nbase_model: {base}\nmodels: {models}\nparameters: {parameters}\n"

    found = geomerge.merge_state_dicts(recipe(other, "false"))
    assert not torch.equal(found[f"{Q}.weight"], weights(base)[f"{Q}.weight"])
    close(geomerge.merge_state_dicts(recipe(tmp_path / "merged", "true")), found, 1e-6)
    with pytest.raises(RecipeError, match="merged is a whole checkpoint"):
        geomerge.merge_state_dicts(recipe(tmp_path / "merged", "false"))
