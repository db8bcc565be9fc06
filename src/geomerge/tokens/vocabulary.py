"""A model's vocabulary: which token has which id, read from its tokenizer files.

The ids are those that the ``tokenizers`` library (and transformers on top of it) gives when it loads the files, which
are not always the ids written in them: an added token that the model's own vocabulary does not hold gets the next free
id, whatever ``tokenizer.json`` says. The files are read as plain JSON because building a tokenizer of 151k tokens only
to ask for its ids costs several times as much.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from geomerge.errors import DamagedCheckpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files that a tokenizer consists of; beside them ``*.tiktoken`` and ``additional_chat_templates/*.jinja``."""

_OPAQUE = (
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
)
Alphabet = Literal["bytes", "pieces", "words"]
_MARKED = 0.02
"""Of a vocabulary's tokens at least so many begin with its alphabet's mark: a fifth of BERT's, half of most others'."""
_SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched as a whole before the tokenizer's model sees the text."""

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True

    @classmethod
    def read(cls, entry: Mapping[str, Any] | str, *, special: bool = False) -> AddedToken:
        """From an entry of ``added_tokens``, ``added_tokens_decoder`` or a special token's field."""
        if isinstance(entry, str):
            return cls(entry, special=special, normalized=not special)
        special = bool(entry.get("special", special))
        return cls(
            str(entry["content"]),
            special=special,
            single_word=bool(entry.get("single_word", False)),
            lstrip=bool(entry.get("lstrip", False)),
            rstrip=bool(entry.get("rstrip", False)),
            normalized=bool(entry.get("normalized", not special)),
        )

    def flags(self) -> dict[str, bool]:
        """The five switches, in the order in which ``tokenizer.json`` writes them."""
        return {
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": self.normalized,
            "special": self.special,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A model's tokens and their ids.

    Attributes:
        directory: Where the tokenizer files lie.
        kind: The tokenizer's model in ``tokenizer.json`` ("BPE", "WordPiece", "Unigram", "WordLevel"); "plain" when
            only ``vocab.json`` or ``vocab.txt`` is there; "opaque" when only a file that is not read (SentencePiece,
            tiktoken, tekken) is there.
        ids: Token to id, added tokens included; empty for "opaque".
        added: The added tokens by content, in the order in which they got their ids.
        size: The largest id plus one: the rows that the tokenizer needs. Padded embeddings have more.
        alphabet: What tokens are written in: GPT-2's letters for bytes ("bytes"), SentencePiece's ("pieces"), or WordPiece's,
            where what continues a word begins with ``##`` ("words").
        digest: For "opaque", the SHA-256 of the files that define the ids: equal digests mean equal vocabularies.
    """

    directory: Path
    kind: str
    ids: Mapping[str, int]
    added: Mapping[str, AddedToken]
    size: int
    alphabet: Alphabet = "pieces"
    digest: str = ""

    @classmethod
    def load(cls, directory: str | Path) -> Vocabulary | None:
        """Read the tokenizer of the model in `directory`; None when it has none.

        Raises:
            DamagedCheckpoint: A tokenizer file is not valid JSON, or lacks what its format demands.
        """
        directory = Path(directory)
        config = read_json(directory / "tokenizer_config.json") or {}
        tokenizer = read_json(directory / "tokenizer.json")
        if tokenizer is not None:
            return cls._from_tokenizer_json(directory, tokenizer, config)
        plain = _plain_vocabulary(directory)
        if plain is not None:
            return cls._from_plain(directory, plain, config)
        opaque = [directory / name for name in _OPAQUE if (directory / name).is_file()]
        opaque += sorted(directory.glob("*.tiktoken"))
        if not opaque:
            return None
        extra = [directory / "added_tokens.json"] if (directory / "added_tokens.json").is_file() else []
        digest = _digest(file.read_bytes() for file in (*opaque, *extra))
        return cls(directory, "opaque", {}, {}, 0, digest=digest)

    @classmethod
    def _from_tokenizer_json(cls, directory: Path, tokenizer: dict[str, Any], config: dict[str, Any]) -> Vocabulary:
        file = directory / "tokenizer.json"
        try:
            kind, ids, count = _model_vocabulary(tokenizer["model"])
            alphabet = _alphabet_of(tokenizer, kind, ids)
            listed = [AddedToken.read(entry) for entry in tokenizer.get("added_tokens") or ()]
            named = [AddedToken.read(entry, special=special) for entry, special in _added_by_config(directory, config)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"the tokenizer file cannot be understood: {type(error).__name__}: {error}",
                where=str(file),
                hint="Save the tokenizer again with the program that made it, or copy the original model's file.",
            ) from error
        added: dict[str, AddedToken] = {}
        for token in (*listed, *named):
            # tokenizers ignores empty contents; what a later file says of a token that is there already has no effect.
            if token.content:
                added.setdefault(token.content, token)
        ids = assign_ids(ids, count, added)
        return cls(directory, kind, ids, added, max(ids.values(), default=-1) + 1, alphabet)

    @classmethod
    def _from_plain(cls, directory: Path, plain: dict[str, Any], config: dict[str, Any]) -> Vocabulary:
        file = directory / "added_tokens.json"
        added: dict[str, AddedToken] = {}
        try:
            ids = {token: int(index) for token, index in plain.items()}
            for token, index in (read_json(file) or {}).items():
                ids.setdefault(token, int(index))
                added[token] = AddedToken(token)
            decoder = config.get("added_tokens_decoder") or {}
            for index, entry in decoder.items():
                added[entry["content"]] = AddedToken.read(entry)
                ids.setdefault(entry["content"], int(index))
            named = [AddedToken.read(entry, special=special) for entry, special in _added_by_config(directory, config)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"the added tokens cannot be understood: {type(error).__name__}: {error}",
                where=str(directory),
                hint="Save the tokenizer again with the program that made it.",
            ) from error
        for extra in named:
            added.setdefault(extra.content, extra)
        alphabet = _most_common_alphabet(ids)
        ids = assign_ids(ids, len(ids), added)
        return cls(directory, "plain", ids, added, max(ids.values(), default=-1) + 1, alphabet)

    def within(self, rows: int) -> Mapping[str, int]:
        """The tokens that have a row in an embedding of `rows` rows."""
        if self.size <= rows:
            return self.ids
        return {token: index for token, index in self.ids.items() if index < rows}

    def same_ids(self, other: Vocabulary) -> bool:
        """Whether both give every token the same id."""
        if "opaque" in (self.kind, other.kind):
            return self.digest == other.digest
        return self.ids == other.ids


def assign_ids(model: Mapping[str, int], count: int, added: Iterable[str]) -> dict[str, int]:
    """The ids that ``tokenizers`` gives to `added` when it loads them in this order.

    A token that the model's vocabulary holds keeps its id; any other gets the id after the largest given so far, or
    `count` (the number of tokens in the model's vocabulary, not its largest id plus one) when that is larger.
    """
    ids = dict(model)
    following = count
    for token in added:
        if token not in ids:
            ids[token] = following
            following += 1
    return ids


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer files in `directory`, chat templates and a tokenizer's own Python code included, by name."""
    found = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    found += [file for file in directory.glob("*.tiktoken") if file.is_file()]
    found += [file for file in directory.glob("additional_chat_templates/*.jinja") if file.is_file()]
    config = read_json(directory / "tokenizer_config.json") or {}
    if config.get("auto_map"):
        found += [file for file in directory.glob("tokenization*.py") if file.is_file()]
    return sorted(found)


def read_json(file: Path) -> dict[str, Any] | None:
    """The JSON object in `file`; None when there is no such file.

    Raises:
        DamagedCheckpoint: It is not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"not valid JSON: {error}", where=str(file), hint="Copy the file from the original model again."
        ) from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"holds a JSON {type(value).__name__} where an object is expected", where=str(file))
    return value


def special_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(field, entry) for every special token that a ``tokenizer_config.json`` or ``special_tokens_map.json`` names."""
    for name in _SPECIAL_NAMES:
        if config.get(f"{name}_token"):
            yield f"{name}_token", config[f"{name}_token"]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        several = config.get(field) or ()
        for entry in several.values() if isinstance(several, dict) else several:
            yield field, entry


def steps_of(node: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder of ``tokenizer.json``, sequences opened."""
    if isinstance(node, dict):
        inner = node.get("pretokenizers") or node.get("normalizers") or node.get("decoders")
        if node.get("type") == "Sequence" and isinstance(inner, list):
            for each in inner:
                yield from steps_of(each)
        else:
            yield node


def _model_vocabulary(model: dict[str, Any]) -> tuple[str, dict[str, int], int]:
    """(kind, token to id, number of entries) of ``tokenizer.json``'s model."""
    vocab = model["vocab"]
    kind = model.get("type") or _guess_kind(model)
    if isinstance(vocab, list):
        return kind, {piece: index for index, (piece, _) in enumerate(vocab)}, len(vocab)
    return kind, dict(vocab), len(vocab)


def _guess_kind(model: Mapping[str, Any]) -> str:
    """Old files do not name the model's type."""
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _alphabet_of(tokenizer: Mapping[str, Any], kind: str, ids: Iterable[str]) -> Alphabet:
    if kind == "WordPiece" or tokenizer["model"].get("continuing_subword_prefix") == "##":
        return "words"
    parts = {step.get("type") for name in ("pre_tokenizer", "decoder") for step in steps_of(tokenizer.get(name))}
    if "ByteLevel" in parts:
        return "bytes"
    return "pieces" if parts & {"Metaspace", "ByteFallback"} else _most_common_alphabet(ids)


def _most_common_alphabet(ids: Iterable[str]) -> Alphabet:
    """From how most tokens begin: a few prove nothing, since most vocabularies hold ``##`` as text."""
    number = Counter(token[:2] if token.startswith("##") else token[:1] for token in ids)
    marks: dict[Alphabet, int] = {"pieces": number["▁"], "bytes": number["Ġ"] + number["Ċ"], "words": number["##"]}
    most = max(marks, key=lambda alphabet: marks[alphabet])
    return most if marks[most] >= _MARKED * number.total() else "pieces"


def _added_by_config(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[Any, bool]]:
    """(entry, special) of the tokens that transformers adds on loading: first the decoder's, then the named ones."""
    decoder = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        yield entry, False
    named = dict(config)
    if not decoder:
        # Only files from before the decoder existed are completed from the map beside them.
        for field, entry in (read_json(directory / "special_tokens_map.json") or {}).items():
            named.setdefault(field, entry)
    for _, entry in special_tokens(named):
        yield entry, True


def _plain_vocabulary(directory: Path) -> dict[str, Any] | None:
    ids = read_json(directory / "vocab.json")
    if ids is not None:
        return ids
    file = directory / "vocab.txt"
    if file.is_file():
        # Only "\n" ends a token: str.splitlines would also split at the line separators that vocabularies contain.
        try:
            lines = file.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise DamagedCheckpoint(f"not UTF-8 text: {error}", where=str(file)) from error
        return {token.removesuffix("\r"): index for index, token in enumerate(lines)}
    return None


def _digest(parts: Iterable[bytes]) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()
