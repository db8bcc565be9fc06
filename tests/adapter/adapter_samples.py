"""Small bases and adapters, made by PEFT or written tensor by tensor, for the adapter tests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import geomerge

PREFIX = "base_model.model."


def llama(folder: Path, *, tie: bool = False, dtype: torch.dtype = torch.float64, bias: bool = False) -> Path:
    """A Llama of two blocks, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=tie,
        attention_bias=bias,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def peft_adapter(base: Path, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Train nothing, but save a PEFT adapter with random factors; returns the weights that PEFT's own merge gives."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B.default.weight" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    merged = model.merge_and_unload()
    return {name: value.detach().clone() for name, value in merged.state_dict().items()}


def write_adapter(folder: Path, tensors: dict[str, Tensor], base: str | None = None, **config: Any) -> Path:
    """A PEFT directory from module paths and factors: ``{"m.lora_A.weight": …}``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def factors(module: str, out: int, inner: int, rank: int, seed: int) -> dict[str, Tensor]:
    """Random factors of one linear layer in float64."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def dense(adapter: Path, module: str) -> Tensor:
    """ΔW of one module, computed independently of the code under test from what lies in the files (no patterns)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "AB")
    rank = a.shape[0]
    alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * (b @ a)


def merged(model: object, dtype: str = "float64") -> dict[str, Tensor]:
    """The tensors of ``base+adapter`` as a merge sees them."""
    return geomerge.merge_state_dicts(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\ndtype: {dtype}\n")


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Equal names, and equal values but for the order of float64 sums."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)
