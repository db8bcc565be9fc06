"""`components:` of composite models: merged, copied from a named parent, and models whose names differ by prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import geomerge as gm
import tiny
from geomerge import anatomy
from geomerge.cli.app import main

TEXT = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": TEXT,
    "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 1},
    "tie_word_embeddings": False,
}
TOWER = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2),
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    "multi_modal_projector.linear_1.weight": (16, 8),
}
SHAPES = tiny.llama_shapes({**TEXT, "tie_word_embeddings": False})


def old(name: str) -> str:
    """A language model's tensor in a VLM saved by transformers before 4.52."""
    return f"language_model.{name}"


def new(name: str) -> str:
    """The same since then."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def vlm(folder: Path, seed: int, spell: Any = old, outer: str = "") -> dict[str, Tensor]:
    """A LLaVA by its names; returns its tensors."""
    shapes = {spell(name): shape for name, shape in SHAPES.items()} | {outer + n: s for n, s in TOWER.items()}
    tensors = tiny.random_tensors(shapes, seed)
    tiny.save(folder, tensors, LLAVA)
    return tensors


RECIPE = """merge_method: linear
models:
  - {{model: {0}/a, parameters: {{weight: 0.5}}}}
  - {{model: {0}/b, parameters: {{weight: 0.5}}}}
dtype: float32
{1}
"""


def half(a: Tensor, b: Tensor) -> Tensor:
    return ((a.double() + b.double()) / 2).float()


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "geomerge.json").read_text())
    return found


class TestRules:
    def test_each_component_by_its_rule(self, tmp_path: Path) -> None:
        """The language model is merged, the towers are taken from one parent each; the manifest says so for every tensor."""
        a, b = vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        rules = f"components: {{language: merge, vision: {{copy: {tmp_path}/a}}, projector: {{copy: {tmp_path}/b}}}}"
        gm.merge(RECIPE.format(tmp_path, rules), tmp_path / "out")
        out = load_file(tmp_path / "out/model.safetensors")
        assert set(out) == set(a)
        said = manifest(tmp_path / "out")
        for name, tensor in out.items():
            rule = said["tensors"][name]["rule"]
            if name.startswith("vision_tower"):
                assert torch.equal(tensor, a[name])
                assert rule == f"copy: component 'vision' is taken from {tmp_path}/a"
                assert said["left_out"][f"{tmp_path}/b: {name}"].endswith(f"is taken from {tmp_path}/a")
            elif name.startswith("multi_modal"):
                assert torch.equal(tensor, b[name])
                assert f"{tmp_path}/a: {name}" in said["left_out"]
            else:
                assert torch.equal(tensor, half(a[name], b[name]))
                assert rule == "merge"

    def test_what_is_not_named_is_merged(self, tmp_path: Path) -> None:
        """A rule for one component says nothing of the others."""
        a, b = vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        gm.merge(RECIPE.format(tmp_path, f"components: {{vision: {{copy: {tmp_path}/b}}}}"), tmp_path / "out")
        out = load_file(tmp_path / "out/model.safetensors")
        for name, tensor in out.items():
            assert torch.equal(tensor, b[name] if name.startswith("vision") else half(a[name], b[name]))

    def test_a_model_that_only_gives_a_tower(self, tmp_path: Path) -> None:
        """It is accounted for, too."""
        vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        c = vlm(tmp_path / "c", 3)
        gm.merge(RECIPE.format(tmp_path, f"components: {{vision: {{copy: {tmp_path}/c}}}}"), tmp_path / "out")
        out, said = load_file(tmp_path / "out/model.safetensors"), manifest(tmp_path / "out")
        for name, tensor in c.items():
            if name.startswith("vision"):
                assert torch.equal(out[name], tensor)
            else:
                assert said["left_out"][f"{tmp_path}/c: {name}"] == "only its vision is taken"

    def test_own_method_by_an_earlier_document(self, tmp_path: Path) -> None:
        """A component may be copied from another document's result, and so have a method of its own."""
        a, b = vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        first = RECIPE.format(tmp_path, "name: tower").replace("weight: 0.5", "weight: 0.25", 1).replace("0.5", "0.75")
        gm.merge(first + "---\n" + RECIPE.format(tmp_path, "components: {vision: {copy: tower}}"), tmp_path / "out")
        out = load_file(tmp_path / "out/model.safetensors")
        for name, tensor in out.items():
            mixed = (0.25 * a[name].double() + 0.75 * b[name].double()).float()
            assert torch.equal(tensor, mixed if name.startswith("vision") else half(a[name], b[name]))

    def test_component_as_a_filter(self, tmp_path: Path) -> None:
        """Parameters for one component, beside `role` and `block`; a misspelt one is refused with what there is."""
        a, b = vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        text = (
            f"merge_method: slerp\nbase_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/b}}]\n"
            "parameters: {t: [{component: vision, value: 1}, {value: 0}]}\ndtype: float32\n"
        )
        gm.merge(text, tmp_path / "out")
        for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
            assert torch.allclose(tensor, b[name] if name.startswith("vision") else a[name], atol=1e-6)
        with pytest.raises(gm.RecipeError, match="did you mean 'vision'"):
            gm.plan(text.replace("component: vision", "component: visoin"))


class TestNames:
    @pytest.mark.parametrize("spell", [old, new], ids=["old", "new"])
    def test_a_language_model_into_a_vlm(self, spell: Any, tmp_path: Path) -> None:
        """Its tensors are matched without prefixes; the towers are the VLM's; base and experts in the order of the recipe."""
        outer = "" if spell is old else "model."
        a = vlm(tmp_path / "a", 1, spell, outer)
        base = tiny.random_tensors(SHAPES, 2)
        math = tiny.random_tensors(SHAPES, 3)
        config = {**TEXT, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
        tiny.save(tmp_path / "base", base, config)
        tiny.save(tmp_path / "math", math, config)
        gm.merge(
            f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\n"
            f"models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/math}}]\nparameters: {{weight: 0.5}}\ndtype: float32\n"
            f"components: {{vision: {{copy: {tmp_path}/a}}, projector: {{copy: {tmp_path}/a}}}}\n",
            tmp_path / "out",
        )
        out = load_file(tmp_path / "out/model.safetensors")
        assert set(out) == set(a)
        for name in SHAPES:
            zero, one, two = base[name].double(), a[spell(name)].double(), math[name].double()
            assert torch.allclose(out[spell(name)], (zero + 0.5 * (one - zero) + 0.5 * (two - zero)).float(), atol=1e-6)
        assert all(torch.equal(out[outer + name], a[outer + name]) for name in TOWER)
        assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llava"

    @pytest.mark.parametrize("tied", [(True, True), (True, False), (False, True)])
    @pytest.mark.parametrize("spell", [old, new], ids=["old", "new"])
    def test_ties_go_by_the_template_s_names(self, spell: Any, tied: tuple[bool, bool], tmp_path: Path) -> None:
        """Where one of the two ties its head, the output stores both, as with models of one naming."""
        vlm(tmp_path / "full", 1, spell, "" if spell is old else "model.")
        head = spell("lm_head.weight")
        a = load_file(tmp_path / "full/model.safetensors")
        b = tiny.random_tensors(SHAPES, 2)
        if tied[0]:
            a[head] = a[spell("model.embed_tokens.weight")]
        if tied[1]:
            b["lm_head.weight"] = b["model.embed_tokens.weight"]
        tiny.save(
            tmp_path / "a",
            {n: x for n, x in a.items() if not (tied[0] and n == head)},
            {**LLAVA, "tie_word_embeddings": tied[0]},
        )
        tiny.save(
            tmp_path / "b",
            {n: x for n, x in b.items() if not (tied[1] and n == "lm_head.weight")},
            {**TEXT, "tie_word_embeddings": tied[1]},
        )
        rules = f"components: {{vision: {{copy: {tmp_path}/a}}, projector: {{copy: {tmp_path}/a}}}}"
        gm.merge(RECIPE.format(tmp_path, rules), tmp_path / "out")
        out = load_file(tmp_path / "out/model.safetensors")
        assert (head in out) == (tied != (True, True))
        assert tiny.config(tmp_path / "out")["tie_word_embeddings"] == (tied == (True, True))
        assert all(torch.equal(out[spell(n)], half(a[spell(n)], b[n])) for n in SHAPES if spell(n) in out)

    def test_two_ways_of_naming_one_vlm(self, tmp_path: Path) -> None:
        """Parents saved by transformers before and after 4.52; the output follows the first."""
        a, b = vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2, new, "model.")
        gm.merge(RECIPE.format(tmp_path, "components: {language: merge}"), tmp_path / "out")
        out = load_file(tmp_path / "out/model.safetensors")
        assert set(out) == set(a)
        assert all(torch.equal(out[old(n)], half(a[old(n)], b[new(n)])) for n in SHAPES)
        assert all(torch.equal(out[n], half(a[n], b["model." + n])) for n in TOWER)

    @pytest.mark.parametrize(
        ("model_type", "names"),
        [
            ("qwen2_vl", {"visual.blocks.0.attn.qkv.weight": "vision", "visual.merger.ln_q.weight": "projector",
                          "model.layers.0.mlp.up_proj.weight": "language", "lm_head.weight": "language"}),
            ("qwen2_5_vl", {"model.visual.blocks.0.attn.qkv.weight": "vision", "model.visual.merger.ln_q.weight": "projector",
                            "model.language_model.layers.0.mlp.up_proj.weight": "language"}),
            ("idefics3", {"model.vision_model.encoder.layers.0.mlp.fc1.weight": "vision",
                          "model.connector.modality_projection.proj.weight": "projector",
                          "model.text_model.layers.0.mlp.up_proj.weight": "language"}),
            ("paligemma", {"vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": "vision",
                           "multi_modal_projector.linear.weight": "projector",
                           "language_model.model.layers.0.mlp.up_proj.weight": "language"}),
            ("mllama", {"vision_model.transformer.layers.0.mlp.fc1.weight": "vision",
                        "vision_model.global_transformer.layers.0.mlp.fc1.weight": "vision",
                        "multi_modal_projector.weight": "projector",
                        "language_model.model.layers.0.cross_attn.q_proj.weight": "language"}),
            ("siglip", {"text_model.encoder.layers.0.mlp.fc1.weight": "text",
                        "vision_model.encoder.layers.0.mlp.fc1.weight": "vision"}),
            ("whisper", {"model.encoder.layers.0.fc1.weight": "encoder", "model.decoder.layers.0.fc1.weight": "decoder"}),
            ("t5", {"encoder.block.0.layer.0.SelfAttention.q.weight": "encoder", "shared.weight": "shared",
                    "decoder.block.0.layer.0.SelfAttention.q.weight": "decoder"}),
            ("never-heard-of", {"model.vision_tower.layers.0.a.weight": "vision", "model.language_model.layers.0.a.weight":
                                "language", "mm_projector.0.weight": "projector", "lm_head.weight": "language"}),
            ("never-heard-of", {"model.diffusion_model.input_blocks.0.0.weight": "diffusion_model",
                                "first_stage_model.encoder.conv_in.weight": "vae", "alphas_cumprod": "rest",
                                "conditioner.embedders.0.transformer.text_model.embeddings.x": "text_encoder"}),
            ("never-heard-of", {"layers.0.a.weight": "", "embed.weight": ""}),
        ],
    )  # fmt: skip
    def test_components_by_name(self, model_type: str, names: dict[str, str]) -> None:
        """Families by their rows, in old and new naming; others by the first words of their names, which is a guess."""
        found = anatomy.read(dict.fromkeys(names, (2, 2)), {"model_type": model_type})
        assert {name: part.component for name, part in found.parts.items()} == names
        assert found.guessed == (model_type == "never-heard-of")


class TestPages:
    def test_the_plan_folds_blocks_of_other_names(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A language model's blocks under a VLM's names are one line, and it alone is the card's base."""
        vlm(tmp_path / "a", 1)
        config = {**TEXT, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
        tiny.save(tmp_path / "base", tiny.random_tensors(SHAPES, 2), config)
        recipe = tmp_path / "r.yml"
        recipe.write_text(
            f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nmodels: [{{model: {tmp_path}/a}}]\n"
            f"components: {{vision: {{copy: {tmp_path}/a}}, projector: {{copy: {tmp_path}/a}}}}\nparameters: {{weight: 1}}\n"
        )
        assert main(["plan", str(recipe), "--no-estimate"]) == 0
        out = capsys.readouterr().out
        blocks = next(line for line in out.splitlines() if line.startswith("language_model.model.layers.{0-1}.*"))
        assert "2 (own name), 1" in blocks
        gm.merge(recipe, tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text("utf-8")
        assert "| base | base |" in card
        assert "| a |  |" in card

    def test_a_filter_of_a_copied_component(self, tmp_path: Path) -> None:
        """It decides nothing, and the note says why."""
        vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        text = RECIPE.format(
            tmp_path,
            f"components: {{vision: {{copy: {tmp_path}/a}}}}\n"
            "parameters: {normalize: [{component: vision, value: false}, {value: true}]}",
        )
        assert any("decides nothing: the component is copied" in note for note in gm.plan(text).notes)


class TestRefusals:
    def test_unknown_component(self, tmp_path: Path) -> None:
        """Did you mean, and what there is."""
        vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        with pytest.raises(
            gm.RecipeError, match=r"no component 'visoin'(.|\n)*'vision'(.|\n)*language, projector, vision"
        ):
            gm.plan(RECIPE.format(tmp_path, "components: {visoin: merge}"))

    @pytest.mark.parametrize(
        ("rule", "what", "hint"),
        [
            ("./a", "merged or copied from a model, not './a'", "vision: {copy: ./a}"),
            ("copy", "merged or copied from a model, not 'copy'", "vision: {copy: MODEL}"),
            ("{copy: $/llm}", "llm has no component 'vision'", "such as $/a"),
        ],
    )
    def test_rules_that_cannot_be(self, rule: str, what: str, hint: str, tmp_path: Path) -> None:
        """With the rule's line, and what to write."""
        vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        tiny.save(tmp_path / "llm", tiny.random_tensors(SHAPES, 2), {**TEXT, "architectures": ["LlamaForCausalLM"]})
        rules = f"components:\n  vision: {rule.replace('$', str(tmp_path))}"
        with pytest.raises(gm.RecipeError) as caught:
            gm.plan(RECIPE.format(tmp_path, rules))
        assert what in caught.value.what
        assert hint.replace("$", str(tmp_path)) in str(caught.value.hint)
        assert str(caught.value.where).endswith(":7")

    @pytest.mark.parametrize("other", ["new names", "text only"])
    def test_names_that_differ_by_prefixes_alone(self, other: str, tmp_path: Path) -> None:
        """Without the key they are refused, and the hint is a rule that works."""
        vlm(tmp_path / "a", 1)
        if other == "new names":
            vlm(tmp_path / "b", 2, new, "model.")
        else:
            config = {**TEXT, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
            tiny.save(tmp_path / "b", tiny.random_tensors(SHAPES, 2), config)
        with pytest.raises(gm.IncompatibleModels, match="differ by prefixes alone") as caught:
            gm.plan(RECIPE.format(tmp_path, ""))
        rule = str(caught.value.hint).split("`")[1]
        assert gm.plan(RECIPE.format(tmp_path, rule))

    def test_a_model_of_one_part_has_no_components(self, tmp_path: Path) -> None:
        """The key has nothing to say there."""
        tiny.family(tmp_path)
        with pytest.raises(gm.RecipeError, match="not made of several components"):
            gm.plan(RECIPE.format(tmp_path, "components: {language: merge}"))

    def test_a_missing_tower_needs_a_rule(self, tmp_path: Path) -> None:
        """A text-only parent cannot merge a tower: the hint says what to write."""
        vlm(tmp_path / "a", 1)
        tiny.save(tmp_path / "b", tiny.random_tensors(SHAPES, 2), {**TEXT, "architectures": ["LlamaForCausalLM"]})
        with pytest.raises(gm.RecipeError, match=r"no component 'projector'(.|\n)*vision: \{copy:"):
            gm.plan(RECIPE.format(tmp_path, "components: {language: merge}"))

    def test_other_depth_or_width(self, tmp_path: Path) -> None:
        """Layers and shapes of the matched component must be the same."""
        vlm(tmp_path / "a", 1)
        rules = f"components: {{vision: {{copy: {tmp_path}/a}}, projector: {{copy: {tmp_path}/a}}}}"
        deep = tiny.llama_shapes({**TEXT, "num_hidden_layers": 3, "tie_word_embeddings": False})
        tiny.save(tmp_path / "b", tiny.random_tensors(deep, 2), {**TEXT, "num_hidden_layers": 3})
        with pytest.raises(gm.IncompatibleModels, match=r"a has no model\.layers\.2"):
            gm.plan(RECIPE.format(tmp_path, rules))
        wide = tiny.llama_shapes({**TEXT, "intermediate_size": 32, "tie_word_embeddings": False})
        tiny.save(tmp_path / "b", tiny.random_tensors(wide, 2), {**TEXT, "intermediate_size": 32})
        with pytest.raises(gm.IncompatibleModels, match=r"shapes of language_model.*mlp.* differ"):
            gm.plan(RECIPE.format(tmp_path, rules))

    def test_another_tower_does_not_fit_the_config(self, tmp_path: Path) -> None:
        """A copied tower must have the shapes that the output's config describes, and no tensor more."""
        vlm(tmp_path / "a", 1), vlm(tmp_path / "b", 2)
        c = vlm(tmp_path / "c", 3)
        rules = f"components: {{vision: {{copy: {tmp_path}/c}}}}"
        name = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
        tiny.save(tmp_path / "c", c | {name: torch.zeros(4, 8)})
        with pytest.raises(gm.IncompatibleModels, match=r"shapes of vision_tower.* differ"):
            gm.plan(RECIPE.format(tmp_path, rules))
        tiny.save(tmp_path / "c", c | {name.replace("layers.0", "layers.1"): torch.zeros(8, 8)})
        with pytest.raises(gm.IncompatibleModels, match=r"a has no vision_tower.*layers\.1"):
            gm.plan(RECIPE.format(tmp_path, rules))

    def test_slices_say_it_themselves(self, tmp_path: Path) -> None:
        """`components` goes with `models`."""
        text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n"
        with pytest.raises(gm.RecipeError, match="goes with 'models'"):
            gm.load_recipe(text + "components: {vision: merge}\n")


def test_single_file_diffusion_by_components(tmp_path: Path) -> None:
    """Stable Diffusion's single files: the denoiser is merged, the VAE stays; the plan says that it guessed."""
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (4, 4),
        "first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (6, 4),
    }
    a, b = tiny.random_tensors(shapes, 1), tiny.random_tensors(shapes, 2)
    for name, tensors in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    plan = gm.plan(RECIPE.format(tmp_path, f"components: {{vae: {{copy: {tmp_path}/a}}}}"))
    assert any("guessed" in note and "vae" in note for note in plan.notes)
    gm.merge(RECIPE.format(tmp_path, f"components: {{vae: {{copy: {tmp_path}/a}}}}"), tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, a[name] if name.startswith("first") else half(a[name], b[name]))


def test_models_that_are_not_there(tmp_path: Path) -> None:
    """Each is told, with its own line."""
    text = f"merge_method: linear\nbase_model: {tmp_path}/a\nmodels: [{{model: {tmp_path}/b}}]\n"
    with pytest.raises(gm.ModelError) as caught:
        gm.plan(text + "parameters: {weight: 1}\ncomponents: {language: merge}\n")
    assert f"<recipe>:3: {tmp_path}/b" in str(caught.value)
    assert f"<recipe>:2: {tmp_path}/a" in str(caught.value)
