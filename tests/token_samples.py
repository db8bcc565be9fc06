"""Small real tokenizers for the tests of geomerge.tokens: BPE, WordPiece and Unigram, trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from geomerge.recipe.values import ModelRef, TokenizerSpec, TokenRule
from geomerge.tokens.vocabulary import Vocabulary

ENGLISH = ["The cat sat on the mat.", "A cold morning in the old town, and nothing else matters."] * 3
GERMAN = ["Die Katze sitzt auf der Matte.", "Ein kalter Morgen in der alten Stadt, und sonst zählt nichts."] * 3
SCRIPTS = [
    "the cat sat",
    "Größe und Maß",
    "Привет, мир",
    "你好世界",
    "مرحبا",
    "🙂 done\n\n  x",
    "<|im_start|>user<|end|>",
    "",
]


def special(content: str) -> AddedToken:
    """A special token, matched as written."""
    return AddedToken(content, special=True, normalized=False)


def _add(tokenizer: Tokenizer, added: tuple[AddedToken, ...]) -> Tokenizer:
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def bpe(texts: list[str], size: int, *added: AddedToken) -> Tokenizer:
    """Byte-level BPE (256 bytes and `size` - 256 merges), as GPT-2, Llama 3 and Qwen use it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _add(tokenizer, added)


def wordpiece(texts: list[str], size: int, *added: AddedToken) -> Tokenizer:
    """WordPiece whose special tokens are part of the model's own vocabulary, as in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[PAD]", "[UNK]", "[CLS]"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _add(tokenizer, added)


def unigram(texts: list[str], size: int, *added: AddedToken) -> Tokenizer:
    """Unigram with SentencePiece's word boundary, as in T5 and XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _add(tokenizer, added)


def save(directory: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    (directory / "tokenizer_config.json").write_text(text)
    return directory


def load(directory: Path) -> Vocabulary:
    """The vocabulary in `directory`, which must have one."""
    vocabulary = Vocabulary.load(directory)
    assert vocabulary is not None
    return vocabulary


def spec(source: str, *rules: TokenRule, pad: int | None = None) -> TokenizerSpec:
    """A policy; any source but "union" and "base" is a model."""
    return TokenizerSpec(source if source in ("union", "base", "intersection") else ModelRef(source), rules, pad)


def rule(token: str, kind: str, model: str | None = None, **more: Any) -> TokenRule:
    """A rule for one token."""
    return TokenRule(token, kind, ModelRef(model) if model else None, **more)
