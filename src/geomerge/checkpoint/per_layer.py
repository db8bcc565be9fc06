"""What a config says layer by layer, carried over to other layers.

A merge may repeat, drop or reorder blocks. Whatever the config says about block 7 must then be said about every place
where block 7 went: lists with an entry for each layer, lists of layer indices, and rules by position ("every fourth
layer attends fully"), which are written out as lists where the new order breaks them. Other tools change the number of
layers only, and transformers then refuses the model or, worse, gives a block another block's attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from geomerge.errors import IncompatibleModels

# Lists of layer indices. Where such a name holds a flag for each layer instead (`no_rope_layers`), it is not listed.
_INDEX_LISTS = re.compile(
    r"(mlp_only|cross_attention|moe|full_attention|global_attn|look_ahead|look_backward|rope_scaling)_layers"
    r"|\w*_(indices|indexes|idxs)|\w*layer_ids"
)
# Lists that are never about layers, though in a small model their length may be the number of layers.
_NEVER = re.compile(
    r"architectures|\w*token\w*|\w*suppress\w*|\w*section\w*|\w*_(mean|std)|image_\w+|patch_size|\w*label\w*"
    r"|depths|hidden_sizes|out_features|stage_\w+|\w*channel_indices|sliding_window_pattern|attention_types"
)

# Attention types by position where the config gives none: the period's key and default, the type of most layers, that of one
# layer in each period, and whether this one is the period's first.
_PERIODS: dict[str, tuple[str | None, int, str, str, bool]] = {
    "afmoe": ("global_attn_every_n_layers", 4, "sliding_attention", "full_attention", False),
    "cohere2": ("sliding_window_pattern", 4, "sliding_attention", "full_attention", False),
    "cwm": (None, 4, "sliding_attention", "full_attention", True),
    "exaone4": ("sliding_window_pattern", 4, "sliding_attention", "full_attention", False),
    "exaone_moe": ("sliding_window_pattern", 4, "sliding_attention", "full_attention", False),
    "gemma2": (None, 2, "sliding_attention", "full_attention", False),
    "gemma3_text": ("sliding_window_pattern", 6, "sliding_attention", "full_attention", False),
    "gemma3n_text": (None, 5, "sliding_attention", "full_attention", False),
    "gpt_oss": (None, 2, "sliding_attention", "full_attention", False),
    "granite_swa": (None, 4, "sliding_attention", "full_attention", True),
    "granitemoe_swa": (None, 4, "sliding_attention", "full_attention", True),
    "minimax": (None, 2, "full_attention", "linear_attention", False),
    "modernbert": ("global_attn_every_n_layers", 3, "sliding_attention", "full_attention", True),
    "modernbert-decoder": ("global_attn_every_n_layers", 3, "sliding_attention", "full_attention", True),
    "olmo3": (None, 4, "sliding_attention", "full_attention", False),
    "qwen3_5_moe_text": ("full_attention_interval", 4, "linear_attention", "full_attention", False),
    "qwen3_5_text": ("full_attention_interval", 4, "linear_attention", "full_attention", False),
    "qwen3_next": ("full_attention_interval", 4, "linear_attention", "full_attention", False),
    "vaultgemma": (None, 2, "sliding_attention", "full_attention", False),
}
_MLP_TYPES = ("cohere2_moe", "deepseek_v32", "exaone_moe", "glm4_moe_lite", "glm_moe_dsa")
"""Families that have ``mlp_layer_types``, which then decides which blocks are dense."""

_NOPE_FAMILIES = ("smollm3", "llama4_text")


_MOST_LAYERS = 1_000_000
"""A config may claim any number; lists of that length are made of it."""


def carry_over(scope: dict[str, Any], model_type: str, old: int, blocks: Sequence[int]) -> None:
    """Rewrite, in place, what a config says about single layers.

    ``max_window_layers`` (the first layer with a sliding window, Qwen) becomes the number of output blocks that come
    from below it, which is exact while those come first; where they do not, ``layer_types`` is written out and decides.

    Args:
        scope: The config, or the nested one, that the layers belong to.
        model_type: Its ``model_type``.
        old: The number of layers that it describes.
        blocks: For each output block the block it comes from.

    Raises:
        IncompatibleModels: A source block that the config does not describe, or a rule by position that the new order
            breaks and that the config format cannot spell out.
    """
    if blocks and not 0 <= min(blocks) <= max(blocks) < old:
        raise IncompatibleModels(
            f"a block of the output comes from block {max(blocks)}, but the config describes {old} layers",
            hint="take the config from the model that has the most layers",
        )
    if old > _MOST_LAYERS:
        raise IncompatibleModels(f"the config describes {old:,} layers", hint="is its config.json whole?")
    if list(blocks) == list(range(old)):
        return
    spelled_out = _spell_out_rules(scope, model_type, old, blocks)
    for key, value in scope.items():
        if _is_index_list(key, value, old):
            scope[key] = [at for at, source in enumerate(blocks) if source in value]
        elif is_per_layer(key, value, old):
            scope[key] = [value[source] for source in blocks]
    scope.update(spelled_out)


def is_per_layer(key: str, value: Any, old: int) -> bool:
    """Whether a config's value speaks of single layers: a list of layer indices, or with an entry for each layer."""
    if _is_index_list(key, value, old):
        return True
    return isinstance(value, list) and len(value) == old and not _NEVER.fullmatch(key)


def _is_index_list(key: str, value: Any, old: int) -> bool:
    return (
        isinstance(value, list)
        and _INDEX_LISTS.fullmatch(key) is not None
        and all(type(n) is int and 0 <= n < old for n in value)
    )


def _spell_out_rules(scope: dict[str, Any], model_type: str, old: int, blocks: Sequence[int]) -> dict[str, Any]:
    """New values for the keys that state a rule by position; see `carry_over`."""
    new: dict[str, Any] = {}
    if not scope.get("layer_types"):
        types = _implied_types(scope, model_type, old)
        if types is not None and [types[s] for s in blocks] != _implied_types(scope, model_type, len(blocks)):
            new["layer_types"] = [types[s] for s in blocks]
    window = scope.get("max_window_layers")
    if isinstance(window, int):
        new["max_window_layers"] = sum(source < window for source in blocks)
    attention = scope.get("attention_types")  # GPT-Neo: [[["global", "local"], 6]]
    if isinstance(attention, list) and attention:
        flat = [kind for pattern, times in attention for kind in pattern * times]
        new["attention_types"] = [[[flat[source] for source in blocks], 1]]
    step = scope.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:  # Qwen: block i is a mixture of experts when (i + 1) is a multiple of it
        dense = set(scope.get("mlp_only_layers") or ())
        new["mlp_only_layers"] = [at for at, s in enumerate(blocks) if s in dense or (s + 1) % step]
        new["decoder_sparse_step"] = 1
    nope = scope.get("no_rope_layer_interval", 4 if model_type in _NOPE_FAMILIES else None)
    if isinstance(nope, int) and not scope.get("no_rope_layers"):
        new["no_rope_layers"] = [int((s + 1) % nope != 0) for s in blocks]
    step = scope.get("interleave_moe_layer_step")
    if isinstance(step, int) and step > 0 and scope.get("moe_layers") is None:
        new["moe_layers"] = [at for at, s in enumerate(blocks) if (s + 1) % step == 0]
    dense_first = scope.get("first_k_dense_replace")  # DeepSeek: the first k blocks are dense, which no list can say
    if isinstance(dense_first, int):
        count = sum(source < dense_first for source in blocks)
        listed = isinstance(scope.get("mlp_layer_types"), list)
        if not listed and any(source < dense_first for source in blocks[count:]):
            if model_type not in _MLP_TYPES:
                raise _unspeakable("first_k_dense_replace", dense_first)
            new["mlp_layer_types"] = ["dense" if source < dense_first else "sparse" for source in blocks]
        new["first_k_dense_replace"] = count
    for key in ("attn_layer_period", "expert_layer_period", "moe_layer_freq"):
        period = scope.get(key)
        if isinstance(period, int) and period > 1:
            offset = scope.get(key.replace("period", "offset"), 0)
            if any((at - offset) % period != (s - offset) % period for at, s in enumerate(blocks)):
                raise _unspeakable(key, period)
    return new


def _implied_types(scope: dict[str, Any], model_type: str, count: int) -> list[str] | None:
    """The ``layer_types`` that transformers derives when the config has none, or ``None`` when it derives none."""
    if model_type.startswith(("qwen2", "qwen3")) and "max_window_layers" in scope:
        sliding = scope.get("sliding_window") is not None and bool(scope.get("use_sliding_window"))
        first = scope["max_window_layers"] if sliding else count
        return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    if model_type not in _PERIODS:
        return None
    key, default, others, one, first = _PERIODS[model_type]
    period = scope.get(key, default) if key else default
    if not isinstance(period, int) or period < 1:
        return None
    return [others if (i if first else i + 1) % period else one for i in range(count)]


def _unspeakable(key: str, value: int) -> IncompatibleModels:
    return IncompatibleModels(
        f"the config's {key} = {value} says by position which blocks are of which kind, and the new order breaks it",
        hint="choose layer ranges that keep each block at a place of its own kind",
    )
