"""The components of a composite model (language, vision, projector, …), and names without the prefixes that tell them apart.

A known family's components are in its row (`families.Module.component`). In other models the first words of the names tell
them; such an anatomy is `guessed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LANGUAGE = "language"

# Words before a component's own names: `language_model.model.layers.0`, `model.language_model.layers.0` and `model.layers.0`
# are one tensor, written by different versions of transformers or by a language model alone.
_WRAPPER = re.compile(
    r"(?:model|module|base_model|transformer|language_model|text_model|llm|thinker|vision_tower|visual|vision_model"
    r"|vision_encoder|vision|audio_tower)\."
)

# What the first words mean, the model's own wrappers taken off; tried in order.
_GUESSES: tuple[tuple[str, str], ...] = (
    # Single files of Stable Diffusion, SDXL, Flux
    (r"diffusion_model\.", "diffusion_model"),
    (r"(?:first_stage_model|vae)\.", "vae"),
    (r"(?:cond_stage_model|conditioner|text_encoders?)\.", "text_encoder"),
    (
        r"(?:[a-z_]+\.)?(?:multi_modal_projector|mm_projector|projector|merger|connector|aligner|mlp1|img_projection)\.",
        "projector",
    ),
    (r"(?:vision_tower|visual|vision_model|vision_encoder|vision|image_encoder|image_newline)(?:\.|$)", "vision"),
    (r"(?:audio_tower|audio_encoder|audio_model|audio)\.", "audio"),
    (r"(?:language_model|text_model|llm)\.", LANGUAGE),
    (r"encoder\.", "encoder"),
    (r"decoder\.", "decoder"),
)
_OUTER = re.compile(r"(?:(?:model|module|base_model)\.)*")
_TOWERS = {"projector", "vision", "audio", LANGUAGE}


def inner_name(name: str) -> str:
    """A tensor's name without the words that only say which component of which wrapper it is in."""
    while (found := _WRAPPER.match(name)) is not None:
        name = name[found.end() :]
    return name


def guess(names: Iterable[str]) -> dict[str, str]:
    """The component of each tensor of a model that no family's row describes, "" for all when nothing tells them apart."""
    found: dict[str, str] = {}
    for name in names:
        inside = name[_OUTER.match(name).end() :]  # type: ignore[union-attr]
        found[name] = next((component for pattern, component in _GUESSES if re.match(pattern, inside)), "")
    named = set(found.values()) - {""}
    if named <= {LANGUAGE} or ("" not in found.values() and len(named) == 1):
        return dict.fromkeys(found, "")
    # What no prefix claims: beside a tower the language model's (or a contrastive model's text side), else a part of its own.
    rest = "rest"
    if named & _TOWERS:
        contrastive = any(name.endswith(("text_projection", "logit_scale")) for name in found)
        rest = "text" if contrastive and LANGUAGE not in named else LANGUAGE
    return {name: component or rest for name, component in found.items()}
