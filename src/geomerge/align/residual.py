"""Which tensors of a decoder read from the residual stream and which write into it: what a rotation of its basis has to turn.

The table below is data: names within a block, what each tensor does, and for readers the norm in front of them. An
RMSNorm without its gain commutes with a rotation; the gain does not, so it is folded into the readers first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from geomerge.anatomy import Anatomy, Part
from geomerge.errors import IncompatibleModels

Action = Literal["embeds", "reads", "writes", "adds", "gain", "inside"]
"""What a tensor does to the residual stream. ``adds``: a bias beside a writer; ``inside``: it never touches the stream."""

GAIN_OFFSET: Mapping[str, float] = {
    "llama": 0.0,
    "mistral": 0.0,
    "ministral": 0.0,
    "qwen2": 0.0,
    "qwen3": 0.0,
    "phi3": 0.0,
    "granite": 0.0,
    "smollm3": 0.0,
    "mixtral": 0.0,
    "qwen2_moe": 0.0,
    "qwen3_moe": 0.0,
    "gemma": 1.0,
}
"""``model_type`` of the decoders that can be rotated → what the norm adds to its stored gain (Gemma multiplies by 1 + w)."""

_POST_NORMS = (
    "its norms behind attention and MLP scale what is written into the residual stream element by element: no rotation of "
    "the stream leaves such a model as it is"
)
_LAYER_NORM = (
    "LayerNorm subtracts the mean over the hidden dimensions, which a rotation changes; "
    "only RMSNorm decoders can be rotated"
)
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gemma3n", "olmo2", "olmo3", "glm4"), _POST_NORMS),
    **dict.fromkeys(
        ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "phi", "starcoder2", "stablelm", "olmo",
         "cohere", "cohere2", "bert", "roberta", "vit", "nemotron", "persimmon", "codegen"),
        _LAYER_NORM,
    ),
}  # fmt: skip
"""Why well-known others cannot."""

_BEFORE_ATTENTION, _BEFORE_MLP = "input_layernorm", "post_attention_layernorm"

_EXPERT = r"mlp\.(?:experts\.\d+\.|shared_expert\.)?"
BLOCK: tuple[tuple[str, Action, str], ...] = (
    (r"self_attn\.(?:q|k|v|qkv)_proj\.weight", "reads", _BEFORE_ATTENTION),
    (_EXPERT + r"(?:gate|up|gate_up)_proj\.weight", "reads", _BEFORE_MLP),
    (r"mlp\.(?:gate|shared_expert_gate)\.weight", "reads", _BEFORE_MLP),
    (r"block_sparse_moe\.(?:gate|experts\.\d+\.w[13])\.weight", "reads", _BEFORE_MLP),
    (r"self_attn\.o_proj\.weight", "writes", ""),
    (_EXPERT + r"down_proj\.weight", "writes", ""),
    (r"block_sparse_moe\.experts\.\d+\.w2\.weight", "writes", ""),
    (r"(?:self_attn\.o_proj|" + _EXPERT + r"down_proj)\.bias", "adds", ""),
    (rf"(?:{_BEFORE_ATTENTION}|{_BEFORE_MLP})\.weight", "gain", ""),
    (r"self_attn\.(?:(?:q|k|v|qkv)_proj\.bias|[qk]_norm\.weight)", "inside", ""),
    (_EXPERT + r"(?:gate|up|gate_up)_proj\.bias", "inside", ""),
)
"""Within a block: what follows the block's number, what the tensor does, the norm in front of it."""

LOOSE: tuple[tuple[str, Action, bool], ...] = (
    (r"(?:.*\.)?embed_tokens\.weight", "embeds", False),
    (r"(?:.*\.)?norm\.weight", "gain", False),
    (r"(?:lm_head|score)\.weight", "reads", True),
    (r"(?:lm_head|score)\.bias", "inside", False),
)
"""Outside the blocks: the whole name, what the tensor does, whether the last norm stands in front of it."""


@dataclass(frozen=True, slots=True)
class Place:
    """What one tensor does to the residual stream.

    Attributes:
        action: See `Action`.
        norm: For readers: the name of the gain that is folded into it.
    """

    action: Action
    norm: str = ""


@dataclass(frozen=True)
class Residual:
    """A decoder as its residual stream sees it.

    Attributes:
        places: Tensor → its place; a tied head is there under its own name, stored or not.
        width: Dimensions of the stream.
        offset: What the norms add to their stored gains.
        embedding: The name of the token embedding.
    """

    places: Mapping[str, Place]
    width: int
    offset: float
    embedding: str


def read(
    label: str, anatomy: Anatomy, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None
) -> Residual:
    """Find the place of every tensor.

    Args:
        label: The model, for messages.
        anatomy: What each tensor is.
        shapes: Tensor name → shape.
        config: ``config.json``: it alone says what the norms compute.

    Raises:
        IncompatibleModels: The architecture is not known to be a decoder whose residual basis can be rotated, or the
            model has a tensor of which it is not known what it does there.
    """
    offset = _offset(label, shapes, config)
    loose = {name: told for name, part in anatomy.parts.items() if part.block is None and (told := _loose(name))}
    norms = [n for n, (action, _) in loose.items() if action == "gain"]
    embeddings = [n for n, (action, _) in loose.items() if action == "embeds"]
    if len(norms) != 1 or len(embeddings) != 1:
        raise _refuse(label, "it has not exactly one token embedding and one last norm")
    places: dict[str, Place] = {}
    unknown = []
    for name, part in anatomy.parts.items():
        if name in anatomy.buffers:
            places[name] = Place("inside")
        elif part.block is None and part.slot is None and name in loose:
            action, behind = loose[name]
            places[name] = Place(action, norms[0] if behind else "")
        elif part.block is not None and (place := _in_block(name, part)) is not None:
            places[name] = place
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise _refuse(label, f"it is not known what {unknown[0]}{more} does to the residual stream")
    for alias, stored in anatomy.tied.items():
        if stored == embeddings[0] and _loose(alias) == ("reads", True):
            places[alias] = Place("reads", norms[0])
    if not any(place.norm == norms[0] for place in places.values()):
        raise _refuse(label, f"it has no head that the gain of {norms[0]} could be folded into")
    _check_shapes(label, places, shapes, shapes[embeddings[0]][-1])
    return Residual(places, shapes[embeddings[0]][-1], offset, embeddings[0])


def _offset(label: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None) -> float:
    if config is None:
        raise _refuse(label, "it has no config.json, which alone says what its norms compute")
    kind = str(config.get("model_type"))
    if kind in GAIN_OFFSET:
        return GAIN_OFFSET[kind]
    reason = REFUSED.get(kind)
    if reason is None and any(re.search(r"(?:norm|ln_\w+|ln\d?)\.bias$", name) for name in shapes):
        reason = _LAYER_NORM
    raise _refuse(
        label, f"model type {kind!r}: {reason or 'not one of the decoders whose residual stream is known here'}"
    )


def _loose(name: str) -> tuple[Action, bool] | None:
    return next(((action, behind) for pattern, action, behind in LOOSE if re.fullmatch(pattern, name)), None)


def _in_block(name: str, part: Part) -> Place | None:
    """The place of a tensor in a block, whose name ends in what the table matches."""
    if part.slot is None:
        return None
    components = name.split(".")
    number = [i for i, component in enumerate(components) if component.isdigit()][part.slot]
    block, rest = ".".join(components[: number + 1]), ".".join(components[number + 1 :])
    for pattern, action, norm in BLOCK:
        if re.fullmatch(pattern, rest):
            return Place(action, f"{block}.{norm}.weight" if norm else "")
    return None


def _check_shapes(label: str, places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]], width: int) -> None:
    for name, place in places.items():
        shape = shapes.get(name)
        if shape is None or place.action == "inside":
            continue
        matrix = place.action in ("embeds", "reads", "writes")
        stream = shape[0 if place.action == "writes" else -1] if shape else 0
        if len(shape) != (2 if matrix else 1) or stream != width:
            raise _refuse(label, f"{name} has the shape {list(shape)}, where the stream has {width} dimensions")
        if place.norm and place.norm not in shapes:
            raise _refuse(label, f"there is no {place.norm} in front of {name}")


def _refuse(label: str, why: str) -> IncompatibleModels:
    return IncompatibleModels(
        f"the residual basis of this model cannot be rotated: {why}",
        where=label,
        hint="`align: embedding` rotates the token embedding alone (which changes what the model computes); "
        f"`align: residual` knows {', '.join(GAIN_OFFSET)}",
    )
