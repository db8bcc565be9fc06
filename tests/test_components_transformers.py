"""What transformers makes of composite merges: the result loads, generates, and its copied towers compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import geomerge as gm

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=63,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "rope_scaling": rope, "tie_word_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def clip() -> Any:
    text = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim", "max_position_embeddings")}
    text |= {"max_position_embeddings": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def pair(root: Path, make: Any) -> list[Any]:
    """Two models with random weights everywhere, saved as a and b."""
    made = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        made.append(model)
    return made


def merged(root: Path, kind: Any, components: str, models: str = "ab") -> Any:
    """The merge of halves, loaded; every key must be there."""
    listed = ", ".join(f"{{model: {root}/{name}, parameters: {{weight: 0.5}}}}" for name in models)
    gm.merge(f"merge_method: linear\nmodels: [{listed}]\ncomponents: {components.format(root)}\n", root / "out")
    model, info = kind.from_pretrained(root / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def halfway(out: Any, a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    mean = {n: ((left[n].double() + right[n].double()) / 2).float() for n in left if left[n].is_floating_point()}
    return all(torch.equal(out.state_dict()[n], mean[n]) for n in mean)


@pytest.mark.parametrize("make", [llava, gemma3], ids=["llava", "gemma3"])
def test_vlm_with_towers_of_two_parents(make: Any, tmp_path: Path) -> None:
    """The language models meet half-way, vision is a's and the projector b's, each computing what it did there."""
    a, b = pair(tmp_path, make)
    rules = "{{language: merge, vision: {{copy: {0}/a}}, projector: {{copy: {0}/b}}}}"
    out = merged(tmp_path, type(a), rules)
    assert halfway(out.model.language_model, a.model.language_model, b.model.language_model)
    assert same(out.model.vision_tower, a.model.vision_tower)
    assert same(out.model.multi_modal_projector, b.model.multi_modal_projector)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        seen, expected = (m.model.vision_tower(pixels).last_hidden_state for m in (out, a))
        assert torch.allclose(seen, expected, atol=1e-6)
        assert out.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape[1] > 3


def test_qwen2_vl(tmp_path: Path) -> None:
    """Its projector lies within the vision model's names."""
    a, b = pair(tmp_path, qwen2_vl)
    out = merged(tmp_path, type(a), "{{vision: {{copy: {0}/a}}, projector: {{copy: {0}/b}}}}")
    assert halfway(out.model.language_model, a.model.language_model, b.model.language_model)
    assert same(out.model.visual.blocks, a.model.visual.blocks)
    assert same(out.model.visual.merger, b.model.visual.merger)


def test_clip(tmp_path: Path) -> None:
    """The text side is merged, the vision tower computes what it did in a."""
    a, b = pair(tmp_path, clip)
    out = merged(tmp_path, type(a), "{{text: merge, vision: {{copy: {0}/a}}}}")
    assert halfway(out.text_model, a.text_model, b.text_model)
    with torch.no_grad():
        pixels = torch.randn(1, 3, 16, 16)
        seen, expected = (m.get_image_features(pixel_values=pixels) for m in (out, a))
        seen, expected = (getattr(x, "pooler_output", x) for x in (seen, expected))
        # Products of matrices have the same bits only in memory of equal alignment.
        assert torch.allclose(seen, expected, atol=1e-6)
    assert same(out.vision_model, a.vision_model)
    assert torch.equal(out.visual_projection.weight, a.visual_projection.weight)


def test_text_only_expert(tmp_path: Path) -> None:
    """A Llama meets a LLaVA: the language model is their mean, the towers are the VLM's, and the result generates."""
    a, _ = pair(tmp_path, llava)
    torch.manual_seed(7)
    expert = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=False)).eval()
    expert.save_pretrained(tmp_path / "math")
    rules = "{{vision: {{copy: {0}/a}}, projector: {{copy: {0}/a}}}}"
    listed = (
        f"{{model: {tmp_path}/a, parameters: {{weight: 0.5}}}}, {{model: {tmp_path}/math, parameters: {{weight: 0.5}}}}"
    )
    gm.merge(f"merge_method: linear\nmodels: [{listed}]\ncomponents: {rules.format(tmp_path)}\n", tmp_path / "out")
    out, info = type(a).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert halfway(out.model.language_model, a.model.language_model, expert.model)
    assert halfway(out.lm_head, a.lm_head, expert.lm_head)
    assert same(out.model.vision_tower, a.model.vision_tower)
    out.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
