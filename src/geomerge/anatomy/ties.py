"""Which names share one tensor: from the family's pairs, the configuration's flag, and the names that are there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from geomerge.anatomy.families import Family

# Where multimodal configurations keep the language model's settings.
_TEXT_SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config", "decoder")


def flag(config: Mapping[str, Any] | None) -> bool | None:
    """``tie_word_embeddings``: the top level's, else the language model's, else None."""
    if not config:
        return None
    sections = [config] + [config[key] for key in _TEXT_SECTIONS if isinstance(config.get(key), dict)]
    return next((bool(s["tie_word_embeddings"]) for s in sections if s.get("tie_word_embeddings") is not None), None)


def _spell(ending: str, prefixes: tuple[str, ...], loose: Collection[str]) -> str | None:
    """The name among `loose` with this ending: under a likely prefix, else the shortest; None when there is none."""
    for prefix in prefixes:
        if prefix + ending in loose:
            return prefix + ending
    return min((name for name in loose if name.endswith("." + ending)), key=len, default=None)


def tied(family: Family, config: Mapping[str, Any] | None, loose: Collection[str], inside: str) -> dict[str, str]:
    """The pairs that hold in this model.

    Args:
        family: The model's row.
        config: Its configuration, if there is one.
        loose: Names of the tensors in no block.
        inside: The base model's prefix as the blocks show it ("model.", "bert.", "").

    Returns:
        alias → stored name. A pair needs one of its names to be present; the other is spelt as the prefixes suggest.
    """
    # `language_model.model.layers` goes with `language_model.lm_head`, `model.language_model.layers` with `lm_head`.
    outside = inside.removesuffix("model.") if inside.endswith(".model.") else ""
    wanted, guessed = flag(config), family.name == "generic"
    pairs: dict[str, str] = {}
    for tie in family.ties:
        if not (tie.always or (family.tied if wanted is None else wanted)):
            continue
        alias_prefix = inside if tie.alias_inside else outside
        stored_prefix = inside if tie.stored_inside else outside
        alias = _spell(tie.alias, (alias_prefix, outside, inside), loose)
        stored = _spell(tie.stored, (stored_prefix, inside, outside), loose)
        if stored is None and (alias is None or guessed):
            continue
        alias = alias or alias_prefix + tie.alias
        stored = stored or stored_prefix + tie.stored
        if alias != stored:
            pairs[alias] = stored
    if guessed:
        # Every known spelling was tried: keep the heads that are there, else the usual name of one that is not.
        return {alias: pairs[alias] for alias in pairs if alias in loose} or dict(list(pairs.items())[:1])
    return pairs
