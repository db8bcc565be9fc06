"""A tokenizer as GGUF metadata.

llama.cpp has two algorithms for these models. ``gpt2`` is byte-level BPE: tokens, merges, and the name of the regular
expression that cuts the text up first. ``llama`` is SentencePiece's BPE: tokens whose scores say which pair is joined first;
where there is only a ``tokenizer.json``, a piece's score is minus the rank of the merge that makes it, as in SentencePiece.

Ids are those of `geomerge.tokens.vocabulary`. Rows of the embedding without a token become unused tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from geomerge.errors import ModelError, did_you_mean
from geomerge.export.families import Value
from geomerge.export.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    read_sentencepiece,
)
from geomerge.tokens import chat
from geomerge.tokens.vocabulary import AddedToken, Vocabulary, read_json, steps_of

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST: ("dbrx", "llama-bpe"),
    _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST: ("qwen2", None),
    _CASED % ("", "", ""): (None, "tekken"),
    _CASED % (_WORDS + "?", _WORDS + "?", "{1,3}"): ("gpt-4o", None),
}
"""The expression that cuts text up → llama.cpp's name for it, of tokenizers that always merge, and of those that take a piece
whole that is a token (``ignore_merges``)."""

_NAMES = (
    "default llama3 llama-v3 llama-bpe llama4 falcon falcon3 falcon-h1 pixtral midm-2.0 lfm2 deepseek-llm deepseek-coder "
    "deepseek-v3 deepseek-r1-qwen mpt starcoder gpt-2 gpt-4o phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de "
    "jina-v2-code gigachat a.x-4.0 mellum roberta-bpe refact command-r qwen2 kormo megrez stablelm2 olmo dbrx smaug-bpe "
    "poro-chat glm4 chatglm-bpe viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4 chameleon minerva-7b "
    "superbpe trillion granite-docling bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense kimi-k2 grok-2 "
    "afmoe minimax-m2"
)
_KNOWN = _NAMES.split()
"""llama.cpp's names of pre-tokenizers, to notice a misspelt one; it may have more by now."""

_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Names of special tokens → llama.cpp's, in its own spelling."""

_ADDED = -1000.0
"""The score of tokens that are matched as a whole before anything is joined."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def tokenizer_metadata(
    folder: Path | None, rows: int, config: Mapping[str, Any], pre_tokenizer: str | None, where: str
) -> tuple[dict[str, Value], list[str]]:
    """The metadata of a tokenizer, and what is to be said of it.

    Args:
        folder: Where its files lie.
        rows: Of the embedding: the file has so many tokens.
        config: The model's, for special tokens that the tokenizer's files do not name.
        pre_tokenizer: llama.cpp's name of the expression that cuts text up; by default it is recognised.
        where: The model, for messages.

    Raises:
        ModelError: There is none, or one that llama.cpp's algorithms for these models do not have.
    """
    vocabulary = None if folder is None else Vocabulary.load(folder)
    if folder is None or vocabulary is None:
        raise ModelError(
            "has no tokenizer, and a GGUF file is of no use without",
            where=where,
            hint="name a model's with --tokenizer DIR",
        )
    file = folder / "tokenizer.model"
    pieces = read_sentencepiece(file) if file.is_file() else None
    tokenizer = read_json(folder / "tokenizer.json") or {}
    settings = read_json(folder / "tokenizer_config.json") or {}
    model = tokenizer.get("model") or {}
    ids, added_tokens = dict(vocabulary.ids), vocabulary.added
    if vocabulary.kind == "opaque" and pieces is not None:
        ids, added_tokens = _opaque(folder, pieces, settings)
    bpe = vocabulary.kind == "BPE" and not model.get("byte_fallback")
    found: dict[str, Value]
    if bpe and "ByteLevel" in (part.get("type") for part in steps_of(tokenizer.get("pre_tokenizer"))):
        pre = pre_tokenizer or _recognised(tokenizer, str(folder))
        found = {
            "ggml.model": "gpt2",
            "ggml.pre": pre,
            "ggml.merges": [_joined(pair) for pair in model.get("merges", ())],
        }
    elif (vocabulary.kind == "BPE" and not bpe) or (pieces is not None and vocabulary.kind != "Unigram" and pieces.bpe):
        found = {
            "ggml.model": "llama",
            "ggml.pre": "default",
            "ggml.add_space_prefix": _prefix(tokenizer, settings, pieces),
        }
        if pieces is not None:
            found["ggml.remove_extra_whitespaces"] = pieces.remove_extra_whitespaces
    else:
        kind = "unigram" if pieces is not None else vocabulary.kind
        raise ModelError(
            f"has a tokenizer of the kind {kind}; written are byte-level BPE (tokenizer.json) and SentencePiece's BPE "
            "(tokenizer.json with byte_fallback, or tokenizer.model)",
            where=str(folder),
            hint="--tokenizer DIR takes another model's, if its tokens are the same",
        )
    notes = []
    if pre_tokenizer is not None and found["ggml.model"] == "gpt2" and pre_tokenizer not in _KNOWN:
        suggestion = did_you_mean(pre_tokenizer, _KNOWN)
        notes.append(
            f"{pre_tokenizer!r} is no name of a pre-tokenizer that is known here: llama.cpp may refuse the file"
            + (f" ({suggestion})" if suggestion else "")
        )
    beyond = [token for token, index in ids.items() if index >= rows]
    if beyond:
        notes.append(f"{len(beyond)} tokens have no row in the embedding and are left out ({beyond[0]!r})")
    special = set(_special_names(settings))
    scores = _scores(model, pieces) if found["ggml.model"] == "llama" else None
    kinds = {text: number for text, _, number in pieces.pieces} if pieces is not None else {}
    if unknown := model.get("unk_token"):
        kinds.setdefault(unknown, UNKNOWN)
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    values = [_ADDED] * rows
    for token, index in ids.items():
        if index >= rows:
            continue
        number = NORMAL if scores is None else kinds.get(token, BYTE if _BYTE.fullmatch(token) else NORMAL)
        added = added_tokens.get(token)
        if added is not None and number not in (UNKNOWN, BYTE):
            number = CONTROL if added.special or token in special else USER_DEFINED
        # llama.cpp looks for these tokens in the text as it is given.
        tokens[index] = token.replace("▁", " ") if scores is not None and number == USER_DEFINED else token
        types[index] = number
        if scores is not None and token in scores:
            values[index] = scores[token]
    found |= {"ggml.tokens": list(tokens), "ggml.token_type": list(types)}
    if scores is not None:
        found["ggml.scores"] = list(values)
    found |= _special_ids(settings, config, ids, rows)
    found |= _added_around(tokenizer, settings)
    template = chat.read(folder)
    if template:
        found["chat_template"] = template
    return {f"tokenizer.{key}": value for key, value in found.items()}, notes


def _recognised(tokenizer: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text up."""
    parts = list(steps_of(tokenizer.get("pre_tokenizer")))
    kinds = [part.get("type") for part in parts]
    own = parts[-1].get("use_regex", True) and not parts[-1].get("add_prefix_space", False)
    name = None
    if kinds == ["ByteLevel"] and own:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and own and parts[0].get("individual_digits"):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        expression = (parts[0].get("pattern") or {}).get("Regex")
        whole = bool((tokenizer.get("model") or {}).get("ignore_merges"))
        name = _SPLITS.get(str(expression), (None, None))[whole]
    if name is None:
        raise ModelError(
            "cuts text up before it is tokenized in a way that is not known by llama.cpp's names",
            where=where,
            hint="say which it is with --pre-tokenizer (the names are in llama.cpp's convert_hf_to_gguf_update.py)",
        )
    return name


def _joined(pair: Any) -> str:
    """A merge as llama.cpp reads it: two tokens with a space between them, in which spaces are Ġ."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)


def _scores(model: Mapping[str, Any], pieces: Pieces | None) -> dict[str, float]:
    """Of pieces: SentencePiece's own, else minus the rank of the first merge that makes them; last what no merge makes."""
    if pieces is not None:
        return {text: score for text, score, _ in pieces.pieces}
    scores: dict[str, float] = {}
    merges = model.get("merges") or ()
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        scores.setdefault(left + right, -float(rank))
    for token in model.get("vocab") or ():
        special = _BYTE.fullmatch(token) or token == model.get("unk_token")
        scores.setdefault(token, 0.0 if special else -float(len(merges)))
    return scores


def _opaque(folder: Path, pieces: Pieces, settings: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, AddedToken]]:
    """The ids of a SentencePiece model and of the tokens that were added to it, and those tokens."""
    ids = {text: i for i, (text, _, _) in enumerate(pieces.pieces)}
    added: dict[str, AddedToken] = {}
    for text, index in (read_json(folder / "added_tokens.json") or {}).items():
        ids.setdefault(text, int(index))
        added[text] = AddedToken(text)
    for index, entry in (settings.get("added_tokens_decoder") or {}).items():
        token = AddedToken.read(entry)
        ids.setdefault(token.content, int(index))
        added[token.content] = token
    return ids, added


def _prefix(tokenizer: Mapping[str, Any], settings: Mapping[str, Any], pieces: Pieces | None) -> bool:
    """Whether a space goes before the text."""
    if isinstance(settings.get("add_prefix_space"), bool):
        return bool(settings["add_prefix_space"])
    if not tokenizer:
        return pieces is None or pieces.dummy_prefix
    for part in steps_of(tokenizer.get("normalizer")):
        if part.get("type") == "Prepend":
            return True
    for part in steps_of(tokenizer.get("pre_tokenizer")):
        if part.get("type") == "Metaspace":
            return bool(
                part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
            )
    return False


def _special_names(settings: Mapping[str, Any]) -> Iterator[str]:
    for name in _IDS:
        entry = settings.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            yield text


def _special_ids(
    settings: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int], rows: int
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for name, theirs in _IDS.items():
        entry = settings.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        index = ids.get(text) if isinstance(text, str) else None
        if index is None:
            index = config.get(f"{name}_token_id")
            index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < rows:
            found[f"ggml.{theirs}_token_id"] = index
    return found


def _added_around(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Value]:
    """Whether the tokenizer puts its first and last special token around a text. Always said: llama.cpp's own guess differs."""
    template: list[Any] = []
    processor = tokenizer.get("post_processor") or {}
    for each in processor.get("processors") or [processor]:
        if each.get("type") == "TemplateProcessing":
            template = each.get("single") or []
    first, last = ("SpecialToken" in template[at] if len(template) > 1 else False for at in (0, -1))
    # SentencePiece's own files say nothing of it: such tokenizers put a first token and no last one.
    found = {"bos": first if tokenizer else True, "eos": last}
    for name in found:
        if isinstance(settings.get(f"add_{name}_token"), bool):
            found[name] = settings[f"add_{name}_token"]
    return {f"ggml.add_{name}_token": value for name, value in found.items()}
