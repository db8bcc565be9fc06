"""What tokens mean, whatever the tokenizer's alphabet.

A space at a word's start is ``Ġ`` in byte-level BPE, ``▁`` in SentencePiece and the absence of ``##`` in WordPiece; a byte is a
letter of GPT-2's alphabet or ``<0x0A>``. Canonical tokens are byte strings in which all of these are the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from geomerge.tokens.vocabulary import Vocabulary, read_json, special_tokens

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def canonical(vocabulary: Vocabulary, rows: int | None = None) -> dict[bytes, int]:
    """Canonical token → id (the lowest, where several tokens mean the same).

    Args:
        vocabulary: Its ids must be known.
        rows: Only tokens with a row in an embedding of so many.
    """
    ids = vocabulary.ids if rows is None else vocabulary.within(rows)
    said = meanings(vocabulary)
    found: dict[bytes, int] = {}
    for token, index in ids.items():
        means = said(token)
        if found.setdefault(means, index) > index:
            found[means] = index
    return found


def meanings(vocabulary: Vocabulary) -> Callable[[str], bytes]:
    """What tells the canonical form of a vocabulary's tokens."""
    decode = _decoder(vocabulary)
    return lambda token: token.encode("utf-8", "surrogatepass") if token in vocabulary.added else decode(token)


def roles(directory: Path) -> dict[str, str]:
    """Role (bos, eos, pad, …) → token, of the roles for which a tokenizer names exactly one."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for field, entry in special_tokens(read_json(directory / name) or {}):
            if field.endswith("_token"):
                found[field.removesuffix("_token")] = str(entry["content"] if isinstance(entry, dict) else entry)
    return found


def _decoder(vocabulary: Vocabulary) -> Callable[[str], bytes]:
    return {"bytes": _from_bytes, "pieces": _from_pieces, "words": _from_words}[vocabulary.alphabet]


def _from_words(token: str) -> bytes:
    """A WordPiece token."""
    text = token[2:] if token.startswith("##") else f" {token}"
    return text.encode("utf-8", "surrogatepass")


def _from_bytes(token: str) -> bytes:
    """A byte-level BPE token."""
    alphabet = _alphabet()
    try:
        return bytes(alphabet[c] for c in token)
    except KeyError:
        return token.encode("utf-8", "surrogatepass")


def _from_pieces(token: str) -> bytes:
    """A SentencePiece token."""
    byte = _BYTE.fullmatch(token)
    if byte:
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode("utf-8", "surrogatepass")


@functools.cache
def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable bytes stand for themselves, the others follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in plain}
    others = (b for b in range(256) if b not in set(plain))
    alphabet.update((chr(0x100 + i), b) for i, b in enumerate(others))
    return alphabet
