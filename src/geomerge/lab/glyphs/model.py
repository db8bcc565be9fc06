"""The backbone of the glyphs suite: transformers' ViT without a classifier; its features are the mean over all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from geomerge.checkpoint.strict_json import read_json
from geomerge.errors import ModelError, first_line
from geomerge.lab.glyphs.settings import Settings
from geomerge.lab.training import reproducible
from geomerge.quietly import quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor, nn


def new_backbone(settings: Settings, seed: int) -> nn.Module:
    """A backbone with random weights, in float32."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=settings.side,
        patch_size=settings.patch,
        num_channels=1,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.attention_heads,
        intermediate_size=4 * settings.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=settings.width**-0.5,
    )
    with reproducible(seed, None):
        made: nn.Module = ViTModel(config, add_pooling_layer=False)
    return made


def features(model: nn.Module, images: Tensor) -> Tensor:
    """Features ``(samples, width)``: the mean over all tokens of the last hidden state."""
    hidden: Tensor = model(images).last_hidden_state
    return hidden.mean(1)


def save_backbone(model: nn.Module, out_dir: Path) -> None:
    """Write a model directory as transformers writes it, its weights in bfloat16."""
    import copy

    import torch
    from transformers import ViTModel

    rounded = copy.deepcopy(model).to(torch.bfloat16)
    assert isinstance(rounded, ViTModel)
    with quiet_transformers():
        rounded.save_pretrained(out_dir)


def load_backbone(path: Path) -> nn.Module:
    """A backbone from its directory, in float32 and in evaluation mode.

    Raises:
        ModelError: The directory holds no ViT.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import ViTModel

    try:
        kind = read_json(path / "config.json", what="config.json").get("model_type")
        if kind != "vit":
            raise ModelError(
                f"it is of the type {kind}, and the suite glyphs is for image classifiers (vit)", where=str(path)
            )
        with reproducible(0, None), quiet_transformers():
            model, report = ViTModel.from_pretrained(
                str(path), dtype=torch.float32, add_pooling_layer=False, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"it cannot be loaded as a ViT: {first_line(error)}", where=str(path)) from None
    if report["missing_keys"]:
        raise ModelError(f"weights are missing: {min(report['missing_keys'])} and perhaps others", where=str(path))
    loaded: nn.Module = model
    return loaded.eval()
