"""The output's ``config.json``: a parent's, edited as plain JSON so that every field that we do not know survives.

What a merge can change is changed everywhere it is written down: the dtype, the numbers of layers and whatever the
config says layer by layer, the vocabulary, whether the head is tied to the embedding. Multi-modal configs hold these in
nested ones (``text_config``), which are edited too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from geomerge.checkpoint.dtypes import parse_dtype, recipe_name
from geomerge.checkpoint.layout import MODEL
from geomerge.checkpoint.per_layer import carry_over, is_per_layer
from geomerge.errors import IncompatibleModels

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""The names that configs give the number of layers, for models without a better statement."""

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


def edit_config(
    config: Mapping[str, Any],
    *,
    dtype: str | None = None,
    layer_counts: Mapping[str, int] | None = None,
    block_maps: Mapping[str, Sequence[int]] | None = None,
    layer_keys: Mapping[str, Sequence[str]] | None = None,
    vocab_size: int | None = None,
    tie: bool | None = None,
) -> dict[str, Any]:
    """A copy of a config with the merge's changes.

    Args:
        config: A parent's ``config.json``. Not changed.
        dtype: The weights' dtype, by safetensors or recipe name. Written as ``dtype``, and as ``torch_dtype`` where
            that older key is there; configs of diffusers and timm have no such key.
        layer_counts: Numbers of layers to write as they are, by config key (dotted for nested ones).
        block_maps: For each module (``""`` in models with one stack) the source block of every output block; the
            numbers of layers follow from their lengths.
        layer_keys: The config keys of each module's number of layers, as `geomerge.anatomy` gives them. Without it the
            usual names are looked for.
        vocab_size: Rows of the embedding.
        tie: Whether the head shares the embedding's weights; ``None`` leaves what the parent says.

    Returns:
        The new config. ``_name_or_path`` is dropped: it is the parent's name, and trainers load reference models by it.

    Raises:
        IncompatibleModels: A new order of blocks that the config cannot express.
    """
    new: dict[str, Any] = copy.deepcopy(dict(config))
    new.pop("_name_or_path", None)
    if dtype is not None and library_of(new) == "transformers":
        _set_dtype(new, recipe_name(parse_dtype(dtype)))
    if block_maps:
        _set_layers(new, block_maps, layer_keys or {})
    for key, count in (layer_counts or {}).items():
        scope, name = _find(new, key)
        scope[name] = count
    if vocab_size is not None:
        _set_vocabulary(new, vocab_size)
    if tie is not None:
        new["tie_word_embeddings"] = tie
        for text in _text_configs(new):
            text["tie_word_embeddings"] = tie
    return new


def library_of(config: Mapping[str, Any] | None) -> str | None:
    """The library that a config belongs to: ``transformers``, ``diffusers`` or ``timm``, as the hub calls them."""
    if config is None:
        return None
    return "diffusers" if "_class_name" in config else "timm" if "pretrained_cfg" in config else "transformers"


def weights_stem(config: Mapping[str, Any] | None) -> str:
    """How the library of a config wants weight files to be called."""
    return "diffusion_pytorch_model" if library_of(config) == "diffusers" else MODEL


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    config["dtype"] = dtype
    if "torch_dtype" in config:
        config["torch_dtype"] = dtype
    for nested in config.values():
        if isinstance(nested, dict):
            # A nested config that names no dtype, or null, takes the outer one.
            for key in ("dtype", "torch_dtype"):
                if nested.get(key) is not None:
                    nested[key] = dtype


def _set_layers(
    config: dict[str, Any], block_maps: Mapping[str, Sequence[int]], layer_keys: Mapping[str, Sequence[str]]
) -> None:
    # Encoder-decoders leave the decoder's number out when it equals the encoder's: it must not follow a change of that.
    if config.get("is_encoder_decoder") and "num_layers" in config and config.get("num_decoder_layers") is None:
        config["num_decoder_layers"] = config["num_layers"]
    stacks: dict[int, list[_Stack]] = {}
    for module, blocks in block_maps.items():
        usual = layer_keys.get(module) or _usual_keys(config)
        keys = [key for key in usual if _present(config, key)] or list(usual[:1])
        for i, key in enumerate(keys):
            scope, name = _find(config, key)
            old = scope.get(name)
            if not isinstance(old, int):
                types = scope.get("layer_types")
                old = len(types) if isinstance(types, list) else len(blocks)
            scope[name] = len(blocks)
            if i == 0:  # further keys are other names of the same number
                stack = _Stack(module, scope, _model_type(config, key), old, list(blocks))
                stacks.setdefault(id(scope), []).append(stack)
    for together in stacks.values():
        if len(together) == 1:
            stack = together[0]
            carry_over(stack.scope, stack.model_type, stack.old, stack.blocks)
        else:
            _carry_over_together(together)


class _Stack(NamedTuple):
    """One stack of blocks and the config, outer or nested, that speaks of it."""

    module: str
    scope: dict[str, Any]
    model_type: str
    old: int
    blocks: list[int]


def _carry_over_together(stacks: list[_Stack]) -> None:
    """Several stacks in one config (an encoder and a decoder): each owns the keys that begin with its name."""
    scope = stacks[0].scope
    shared = {k: v for k, v in scope.items() if not k.startswith(tuple(stack.module for stack in stacks))}
    for stack in stacks:
        own = {k: v for k, v in scope.items() if k.startswith(stack.module)}
        carry_over(own, stack.model_type, stack.old, stack.blocks)
        scope.update(own)
    changed = [stack for stack in stacks if len(stack.blocks) != stack.old or stack.blocks != list(range(stack.old))]
    if not changed:
        return
    first = changed[0]
    if any(stack[3:] != first[3:] for stack in changed):
        for key, value in shared.items():
            if any(is_per_layer(key, value, stack.old) for stack in changed):
                raise IncompatibleModels(
                    f"the config's list {key!r} could speak of {' or of '.join(stack.module for stack in changed)}, "
                    "and both get a new order of blocks",
                    hint="change the depth of one of them at a time",
                )
        return
    carry_over(shared, first.model_type, first.old, first.blocks)
    scope.update(shared)


def _usual_keys(config: Mapping[str, Any]) -> list[str]:
    prefixes = ("", *(f"{name}." for name in _TEXT_CONFIGS))
    for prefix in prefixes:
        found = [prefix + key for key in LAYER_COUNT_KEYS if _present(config, prefix + key)]
        if found:
            return found
    return []


def _find(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The dict that a dotted key leads to, made where it is missing, and the key's last part."""
    *path, name = key.split(".")
    for part in path:
        inner = config.get(part)
        if not isinstance(inner, dict):
            inner = config[part] = {}
        config = inner
    return config, name


def _present(config: Mapping[str, Any], key: str) -> bool:
    *path, name = key.split(".")
    for part in path:
        inner = config.get(part)
        if not isinstance(inner, dict):
            return False
        config = inner
    return name in config


def _model_type(config: dict[str, Any], key: str) -> str:
    """The ``model_type`` of the config that holds a layer count; a nested text config may leave it out."""
    scope, _ = _find(config, key)
    outer = str(config.get("model_type", ""))
    if scope is config:
        return outer
    return str(scope.get("model_type") or (f"{outer}_text" if key.startswith(_TEXT_CONFIGS) else ""))


def _text_configs(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in _TEXT_CONFIGS:
        text = config.get(name)
        if isinstance(text, dict):
            yield text


def _set_vocabulary(config: dict[str, Any], size: int) -> None:
    texts = list(_text_configs(config))
    for text in texts:
        text["vocab_size"] = size  # also where it is absent: then it had the family's default
    if "vocab_size" in config or not texts:
        config["vocab_size"] = size
