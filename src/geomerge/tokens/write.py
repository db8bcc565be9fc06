"""The output's tokenizer files: the source's own, or an edited ``tokenizer.json`` with tokens added or removed.

Files that need no change are copied byte for byte. Where tokens are added or removed, ``tokenizer.json`` is edited as
JSON (everything that this program does not know survives), checked by loading it with ``tokenizers``, and the older
formats beside it (``vocab.json``, ``merges.txt``, ``tokenizer.model``, …) are left out because they no longer agree.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomerge.errors import IncompatibleModels
from geomerge.tokens.vocabulary import (
    AddedToken,
    Vocabulary,
    assign_ids,
    read_json,
    special_tokens,
    tokenizer_files,
)

_CHAT_FILES = ("chat_template.jinja", "chat_template.json")
_COPIED_WHEN_EDITED = (*_CHAT_FILES, "normalizer.json")


@dataclass(frozen=True, slots=True, eq=False)
class OutputTokenizer:
    """The output's tokenizer as changes to one parent's.

    Attributes:
        source: The parent's vocabulary, with the directory of its files.
        appended: New tokens and their ids, which follow the source's largest remaining id.
        removed: Tokens of the source that the output lacks because no row of the embedding belongs to them.
    """

    source: Vocabulary
    appended: Mapping[AddedToken, int] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    @property
    def copied(self) -> bool:
        """Whether the source's files are the output's."""
        return not (self.appended or self.removed)

    @property
    def lost(self) -> frozenset[str]:
        """The removed tokens that do not come back under another id."""
        return self.removed - {token.content for token in self.appended}

    def ids(self) -> dict[str, int]:
        """Token to id of the output."""
        ids = {token: index for token, index in self.source.ids.items() if token not in self.removed}
        ids.update((token.content, index) for token, index in self.appended.items())
        return ids


def files(tokenizer: OutputTokenizer, chat_template: str | None = None) -> dict[str, Path | str]:
    """The output's tokenizer files.

    Args:
        tokenizer: What to write.
        chat_template: Jinja text that replaces the source's chat template; None keeps the source's.

    Returns:
        Name (with "/" for files in a folder) to the file to copy, or to the text to write.

    Raises:
        IncompatibleModels: The source has no ``tokenizer.json`` to edit, or the edited one would not give the
            planned ids.
    """
    directory = tokenizer.source.directory
    found: dict[str, Path | str] = {file.relative_to(directory).as_posix(): file for file in tokenizer_files(directory)}
    if not tokenizer.copied:
        kept = (name for name in found if name in _COPIED_WHEN_EDITED or name.endswith((".jinja", ".py")))
        found = {name: found[name] for name in kept}
        found["tokenizer.json"] = _edited_tokenizer(tokenizer)
        config = read_json(directory / "tokenizer_config.json")
        if config is not None:
            found["tokenizer_config.json"] = _dump(_edited_config(config, tokenizer))
        specials = read_json(directory / "special_tokens_map.json")
        if specials is not None:
            found["special_tokens_map.json"] = _dump(_without(specials, tokenizer.lost))
    if chat_template is not None:
        replace_chat_template(found, chat_template, directory)
    return found


def write(tokenizer: OutputTokenizer, out: Path, chat_template: str | None = None) -> list[Path]:
    """Write the output's tokenizer files into the directory `out`; returns what was written."""
    written = []
    for name, content in files(tokenizer, chat_template).items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_text(content, encoding="utf-8")
        written.append(target)
    return written


def check_editable(vocabulary: Vocabulary, where: str | None, doing: str) -> None:
    """Refuse a tokenizer whose tokens cannot be changed.

    Raises:
        IncompatibleModels: There is no ``tokenizer.json``.
    """
    if vocabulary.kind in ("plain", "opaque"):
        raise IncompatibleModels(
            f"the tokenizer has no tokenizer.json, which {doing} needs",
            where=where,
            hint="Make one: `AutoTokenizer.from_pretrained(model).save_pretrained(model)`; or choose "
            "`tokenizer_source: base` or a model that has one.",
        )


def _edited_tokenizer(tokenizer: OutputTokenizer) -> str:
    """``tokenizer.json`` with the planned tokens under the planned ids."""
    source, removed = tokenizer.source, tokenizer.removed
    check_editable(source, str(source.directory), "adding or removing tokens")
    document = read_json(source.directory / "tokenizer.json") or {}
    model = document["model"]
    _remove(model, removed, source)
    used = removed & _strings(document.get("post_processor"))
    if used:
        raise IncompatibleModels(
            f"the tokenizer puts {', '.join(map(repr, sorted(used)))} around every text, but the embedding has no row "
            "for it",
            where=str(source.directory),
            hint="Choose another model's tokenizer with `tokenizer_source`.",
        )
    planned = tokenizer.ids()
    added = [token for token in source.added.values() if token.content not in removed]
    added += tokenizer.appended
    added.sort(key=lambda token: planned[token.content])
    contents = [token.content for token in added]
    vocab: list[Any] | dict[str, int] = model["vocab"]
    given = {piece: index for index, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    if isinstance(vocab, dict) and assign_ids(vocab, len(vocab), contents) != planned:
        # The ids have holes. A token in the model's own vocabulary keeps the id written there, which no other place of
        # the file guarantees; without a merge rule that makes it, the model itself never produces it.
        vocab.update((content, planned[content]) for content in contents)
    if assign_ids(given, len(vocab), contents) != planned:
        raise IncompatibleModels(
            "the output's token ids cannot be expressed in a tokenizer.json",
            where=str(source.directory),
            hint="Choose another model's tokenizer with `tokenizer_source`.",
        )
    document["added_tokens"] = [
        {"id": planned[token.content], "content": token.content, **token.flags()} for token in added
    ]
    text = json.dumps(document, ensure_ascii=False)
    _check_loads(text, source)
    return text


def _strings(value: Any) -> set[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return set[str]().union(*map(_strings, value)) if isinstance(value, list) else set()


def check_removable(vocabulary: Vocabulary, removed: frozenset[str]) -> None:
    """Refuse to remove ordinary tokens from a tokenizer that is not BPE.

    Raises:
        IncompatibleModels: Some of the tokens are part of the model itself, which only BPE can lose.
    """
    ordinary = sorted(removed - vocabulary.added.keys())
    if ordinary and vocabulary.kind != "BPE":
        raise IncompatibleModels(
            f"{len(ordinary):,} tokens ({', '.join(map(repr, ordinary[:3]))}, …) have no row in the embedding, and a "
            f"{vocabulary.kind} tokenizer cannot lose tokens",
            where=str(vocabulary.directory),
            hint="Choose another model's tokenizer with `tokenizer_source`.",
        )


def _remove(model: dict[str, Any], removed: frozenset[str], source: Vocabulary) -> None:
    check_removable(source, removed)
    if not removed or isinstance(model["vocab"], list):
        return
    model["vocab"] = {token: index for token, index in model["vocab"].items() if token not in removed}
    if "merges" in model:
        kept = []
        for merge in model["merges"]:
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            if removed.isdisjoint((left, right, left + right)):
                kept.append(merge)
        model["merges"] = kept


def _check_loads(text: str, source: Vocabulary) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise IncompatibleModels(
            f"the tokenizer cannot be changed as planned: {error}",
            where=str(source.directory),
            hint="Choose another model's tokenizer with `tokenizer_source`.",
        ) from error


def _edited_config(config: dict[str, Any], tokenizer: OutputTokenizer) -> dict[str, Any]:
    """``tokenizer_config.json`` without the removed tokens and, where it lists added tokens, with the new ones."""
    edited = _without(config, tokenizer.lost)
    if "added_tokens_decoder" in edited:
        ids = tokenizer.ids()
        decoder: dict[str, Any] = {
            str(ids[entry["content"]]): entry
            for entry in edited["added_tokens_decoder"].values()
            if entry["content"] in ids
        }
        for token, index in tokenizer.appended.items():
            decoder[str(index)] = {"content": token.content, **token.flags()}
        edited["added_tokens_decoder"] = decoder
    return edited


def _without(config: Mapping[str, Any], removed: frozenset[str]) -> dict[str, Any]:
    """`config` with no special token that the output lacks: transformers would add it again under another id."""
    edited = dict(config)
    gone = {name for name, entry in special_tokens(config) if _content(entry) in removed}
    for name in gone:
        value = edited[name]
        if isinstance(value, dict) and "content" not in value:
            edited[name] = {key: entry for key, entry in value.items() if _content(entry) not in removed}
        elif isinstance(value, list):
            edited[name] = [entry for entry in value if _content(entry) not in removed]
        else:
            del edited[name]
    return edited


def _content(entry: Any) -> str:
    return str(entry["content"]) if isinstance(entry, dict) else str(entry)


def replace_chat_template(found: dict[str, Path | str], chat_template: str, directory: Path) -> None:
    """One template in one place: the file that transformers reads first."""
    for name in (*_CHAT_FILES, *(name for name in found if name.startswith("additional_chat_templates/"))):
        found.pop(name, None)
    found["chat_template.jinja"] = chat_template
    written = found.get("tokenizer_config.json")
    config = json.loads(written) if isinstance(written, str) else read_json(directory / "tokenizer_config.json")
    if config is not None and "chat_template" in config:
        del config["chat_template"]
        found["tokenizer_config.json"] = _dump(config)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
