"""Token ids in a config that must follow the vocabulary: the end of text is a token, and its id changes with the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HOLDS_IDS = re.compile(r"\w+_token_ids?|\w+_token_index|(begin_)?suppress_tokens|bad_words_ids")


def follow(
    config: Mapping[str, Any], old: Mapping[int, str], new: Mapping[str, int], owner: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A config whose token ids mean the same tokens in another vocabulary.

    Args:
        config: A ``config.json`` or ``generation_config.json``. Not changed.
        old: The vocabulary that its ids belong to; ids that it does not know (padding rows) stay as they are.
        new: The output's vocabulary.
        owner: The same config of the model whose tokenizer the output gets: its value replaces one whose token is gone.

    Returns:
        The new config, and a note for each value that could not be kept.
    """
    notes: list[str] = []

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [moved(key, v) for v in value]
        if type(value) is not int or value not in old:
            return value
        return new[old[value]]

    def walk(part: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in part.items():
            theirs = other.get(key)
            if isinstance(value, dict):
                made[key] = walk(value, theirs if isinstance(theirs, dict) else {})
            elif _HOLDS_IDS.fullmatch(key):
                try:
                    made[key] = moved(key, value)
                except KeyError as lost:
                    made[key] = theirs
                    notes.append(
                        f"the output's tokenizer lacks the token {lost.args[0]!r} that {key} named: it is now {theirs}"
                    )
            else:
                made[key] = value
        return made

    return walk(config, owner), tuple(notes)
