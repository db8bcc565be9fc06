"""A row for an architecture that the table does not know, made from its names alone.

A stack is a dotted name followed by a number (``encoder.layers.#``) under which whole submodules repeat. Stacks much
smaller than the largest are no stacks (a list of mergers, a few projections). When nothing qualifies, the largest
numbered list of plain layers (``net.0``, ``net.2``: a sequential network) is the stack.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from geomerge.anatomy.families import Family, Module, Tie

# Configuration keys that count layers, whatever the architecture calls them.
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "num_encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
# Words that say nothing about which part of a model a stack is.
_WRAPPERS = {"model", "base_model", "module", "transformer", "backbone", "layers", "layer", "h", "blocks", "block"}
_SMALL = 0.1

_TIES = tuple(
    Tie(alias, stored)
    for alias in ("lm_head.weight", "embed_out.weight", "output_layer.weight")
    for stored in (
        "embed_tokens.weight",
        "wte.weight",
        "word_embeddings.weight",
        "tok_embeddings.weight",
        "embed_in.weight",
    )
)


def _stacks(templates: Iterable[tuple[str, tuple[str, ...], int]]) -> dict[str, int]:
    """What stands before the number of each stack, with the number of its tensors.

    Args:
        templates: (template, first numbers seen, tensors) triples.
    """
    indices: dict[str, set[str]] = defaultdict(set)
    tensors: dict[str, int] = defaultdict(int)
    nested: dict[str, bool] = defaultdict(bool)
    for template, first, count in templates:
        head, number, rest = template.partition("#")
        if not number:
            continue
        indices[head] |= set(first)
        tensors[head] += count
        nested[head] |= "." in rest[1:]
    known = {head for head in tensors if head.rstrip(".").rpartition(".")[2] in _WRAPPERS}
    found = {head: tensors[head] for head in tensors if nested[head] and (len(indices[head]) > 1 or head in known)}
    if not found:
        plain = [head for head in tensors if len(indices[head]) > 1]
        found = {head: tensors[head] for head in sorted(plain, key=lambda head: -tensors[head])[:1]}
    largest = max(found.values(), default=0)
    return {head: count for head, count in found.items() if count >= _SMALL * largest}


def _names(heads: Iterable[str]) -> dict[str, str]:
    """A module name for each stack: the words that tell it from a wrapper; the whole path when that is not unique."""
    heads = list(heads)
    if len(heads) == 1:
        return {heads[0]: ""}
    short = {head: ".".join(w for w in head.rstrip(".").split(".") if w not in _WRAPPERS) or "main" for head in heads}
    unique = len(set(short.values())) == len(heads)
    return short if unique else {head: head.rstrip(".") or "main" for head in heads}


def _counts(module: str, blocks: int, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The configuration keys that hold `blocks`, looked for in the sections whose names fit the module's best first."""
    sections: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    sections += [(f"{key}.", value) for key, value in config.items() if isinstance(value, dict)]
    words = module.replace(".", "_").split("_")
    keys: list[str] = []
    for prefix, section in sorted(sections, key=lambda item: not any(w and w in item[0] for w in words)):
        if keys and prefix:
            break
        for key in _COUNTS:
            other = "decoder" if "encoder" in words else "encoder" if "decoder" in words else None
            if section.get(key) == blocks and not (other and key.startswith((other, f"num_{other}"))):
                keys.append(prefix + key)
        if keys:
            break
    return tuple(keys)


def guess(templates: Iterable[tuple[str, tuple[str, ...], int]], config: Mapping[str, Any] | None) -> Family:
    """A family row for unknown names.

    Args:
        templates: For each distinct template: itself, the values of its first number, how many tensors have it.
        config: The model's configuration, if there is one.

    Returns:
        A row named "generic". Its modules are the stacks found, largest last (the last takes the loose tensors).
    """
    templates = list(templates)
    stacks = _stacks(templates)
    sizes: dict[str, set[str]] = defaultdict(set)
    for template, first, _ in templates:
        sizes[template.partition("#")[0]] |= set(first)
    names = _names(stacks)
    modules = [
        Module(
            names[head],
            within=_own_words(head, stacks),
            blocks=head.rstrip("."),
            counts=_counts(names[head], len(sizes[head]), config or {}),
            numbering="index" if _contiguous(sizes[head]) else "rank",
        )
        for head in sorted(stacks, key=lambda head: stacks[head])
    ]
    if modules:
        last = modules[-1]
        modules[-1] = Module(last.name, "", last.blocks, last.counts, last.numbering)
    return Family("generic", (), tuple(modules) or (Module(""),), _TIES)


def _own_words(head: str, heads: Iterable[str]) -> str:
    """The components that only this stack's path has: they claim loose tensors such as ``vision.norm``."""
    others = {word for other in heads if other != head for word in other.rstrip(".").split(".")}
    own = [word for word in head.rstrip(".").split(".") if word and word not in others]
    return "|".join(own) or head.rstrip(".").replace(".", r"\.")


def _contiguous(numbers: set[str]) -> bool:
    return {int(number) for number in numbers} == set(range(len(numbers)))
