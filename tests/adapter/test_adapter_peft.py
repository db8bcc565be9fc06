"""`base+adapter` is what PEFT itself merges, to float64's last digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import close, llama, merged, peft_adapter

import geomerge

pytest.importorskip("peft", reason="peft is not installed: its merge is what these tests compare with")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

ATTENTION = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ATTENTION},
        {"target_modules": ATTENTION, "use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        {"target_modules": "all-linear", "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 11, "down_proj": 3.5}},
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 1}},
    ],
    ids=lambda s: "+".join(k for k in s if k != "target_modules") or str(s["target_modules"]),
)
def test_settings(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Scales, patterns, whole modules, embeddings and DoRA."""
    wanted = peft_adapter(base, tmp_path / "adapter", **settings)
    close(merged(f"{base}+{tmp_path / 'adapter'}"), wanted)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(tmp_path: Path, bias: str) -> None:
    """Biases that were trained come whole."""
    base = llama(tmp_path / "base", bias=True)
    wanted = peft_adapter(base, tmp_path / "adapter", target_modules=ATTENTION, bias=bias)
    close(merged(f"{base}+{tmp_path / 'adapter'}"), wanted)


def test_lora_bias(tmp_path: Path) -> None:
    """A bias of B adds s times itself."""
    base = llama(tmp_path / "base", bias=True)
    wanted = peft_adapter(base, tmp_path / "adapter", target_modules=ATTENTION, lora_bias=True)
    close(merged(f"{base}+{tmp_path / 'adapter'}"), wanted)


def test_tied_modules(tied: Path, tmp_path: Path) -> None:
    """An embedding that PEFT trained together with its head stays one tensor."""
    wanted = peft_adapter(
        tied, tmp_path / "adapter", target_modules=ATTENTION, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    assert torch.equal(wanted.pop("lm_head.weight"), wanted["model.embed_tokens.weight"])
    close(merged(f"{tied}+{tmp_path / 'adapter'}"), wanted)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}])
def test_a_head_apart(tied: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """A head of its own over a tied embedding: what the adapted model computes, the embedding unchanged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    peft_adapter(tied, tmp_path / "adapter", **{"target_modules": ATTENTION, **settings})
    model = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float64)
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        wanted = adapted(tokens).logits
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {tied}+{tmp_path / 'adapter'}}}]\n")
    geomerge.merge(recipe, tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens).logits, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dora", [False, True])
def test_conv1d(tmp_path: Path, dora: bool) -> None:
    """GPT-2 stores its linear layers as (in, out), a square one among them; the file has no `transformer.` prefix."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    GPT2LMHeadModel(config).double().save_pretrained(tmp_path / "base")
    wanted = peft_adapter(
        tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "c_proj", "c_fc"], use_dora=dora
    )
    found = merged(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    wanted.pop("lm_head.weight")  # tied
    close(found, {name: wanted[name] for name in wanted})


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_convolutions(tmp_path: Path, size: int, dora: bool) -> None:
    """Factors with the kernel's dimensions; the base is no known architecture."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 8, size), torch.nn.Conv2d(8, 4, size)).double()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    adapted = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"], init_lora_weights=False, use_dora=dora)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = {n: v.detach().clone() for n, v in adapted.merge_and_unload().state_dict().items()}
    close(merged(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'adapter'}"), wanted)
