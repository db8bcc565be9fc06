"""geomerge.tokens.vocabulary: ids equal those that tokenizers and transformers give."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from geomerge.errors import DamagedCheckpoint
from geomerge.tokens.vocabulary import AddedToken as Added
from geomerge.tokens.vocabulary import Vocabulary, assign_ids, tokenizer_files
from token_samples import ENGLISH, bpe, load, save, special, unigram, wordpiece


@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [
        ("BPE", bpe(ENGLISH, 290, special("<|end|>"), AddedToken("<note>"))),
        ("WordPiece", wordpiece(ENGLISH, 60, AddedToken("[ENT]"))),
        ("Unigram", unigram(ENGLISH, 40, special("<extra_0>"))),
    ],
)
def test_ids_are_the_librarys(tmp_path: Path, kind: str, tokenizer: Tokenizer) -> None:
    """Every token and id that `tokenizers` knows, and no other."""
    vocabulary = load(save(tmp_path, tokenizer))
    assert vocabulary.kind == kind
    assert vocabulary.ids == tokenizer.get_vocab()
    assert vocabulary.size == max(tokenizer.get_vocab().values()) + 1


def test_added_tokens_keep_their_switches(tmp_path: Path) -> None:
    """Special, strip and normalisation flags are read as written."""
    tokenizer = bpe(ENGLISH, 270, special("<|end|>"), AddedToken("<m>", lstrip=True, single_word=True))
    added = load(save(tmp_path, tokenizer)).added
    assert added["<|end|>"] == Added("<|end|>", special=True, normalized=False)
    assert added["<m>"] == Added("<m>", lstrip=True, single_word=True)


def test_tokens_named_only_by_the_config(tmp_path: Path) -> None:
    """Tokens of `added_tokens_decoder` and named special tokens get the ids that transformers gives them."""
    from transformers import AutoTokenizer

    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    decoder = {
        "270": {"content": "<|end|>", "special": True, **flags},
        "299": {"content": "<z>", "special": False, **flags},
        "298": {"content": "<y>", "special": True, **flags},
    }
    config = {"added_tokens_decoder": decoder, "eos_token": "<|end|>", "pad_token": "<pad>", "bos_token": "<s>"}
    save(tmp_path, bpe(ENGLISH, 270, special("<|end|>")), **config)
    ids = load(tmp_path).ids
    assert ids == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert (ids["<|end|>"], ids["<y>"], ids["<z>"], ids["<s>"], ids["<pad>"]) == (270, 271, 272, 273, 274)


def test_assigned_ids_with_holes_and_overlaps() -> None:
    """Whatever ids a file states, added tokens get the ids that `tokenizers` really gives, holes or not."""
    draw = random.Random(7)
    for _ in range(100):
        vocab = {f"t{index}": index for index in draw.sample(range(12), draw.randint(1, 7))}
        added = draw.sample([f"t{index}" for index in range(14)] + ["x", "y"], 5)
        document = json.loads(Tokenizer(models.WordLevel(vocab, unk_token="t0")).to_str())
        document["added_tokens"] = [
            {"id": 50 + i, "content": content, **Added(content, special=draw.random() < 0.5).flags()}
            for i, content in enumerate(added)
        ]
        assert assign_ids(vocab, len(vocab), added) == Tokenizer.from_str(json.dumps(document)).get_vocab()


def test_old_files_without_a_model_type(tmp_path: Path) -> None:
    """The model's type is guessed where an old file leaves it out."""
    for kind, tokenizer in (("BPE", bpe(ENGLISH, 260)), ("WordPiece", wordpiece(ENGLISH, 40))):
        save(tmp_path, tokenizer)
        document = json.loads((tmp_path / "tokenizer.json").read_text())
        del document["model"]["type"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        assert load(tmp_path).kind == kind


def test_plain_vocabularies(tmp_path: Path) -> None:
    """Without tokenizer.json: vocab.txt (line separators inside tokens survive), vocab.json and added_tokens.json."""
    (tmp_path / "vocab.txt").write_text("[PAD]\na\n\u2028\nb\n", encoding="utf-8")
    assert load(tmp_path).ids == {"[PAD]": 0, "a": 1, "\u2028": 2, "b": 3}
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 5}')
    vocabulary = load(tmp_path)
    assert vocabulary.ids == {"a": 0, "b": 1, "<x>": 5}
    assert (vocabulary.kind, vocabulary.size) == ("plain", 6)


def test_binary_tokenizers_are_compared_by_content(tmp_path: Path) -> None:
    """A SentencePiece file has no readable ids; equal bytes are an equal vocabulary."""
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    a, b, c = (load(tmp_path / name) for name in "abc")
    assert a.kind == "opaque"
    assert a.same_ids(b)
    assert not a.same_ids(c)


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    """A directory without tokenizer files has no vocabulary, and no files to copy."""
    (tmp_path / "config.json").write_text("{}")
    assert Vocabulary.load(tmp_path) is None
    assert tokenizer_files(tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": ["a"]}}', "\xff"])
def test_damaged_tokenizer_files_are_refused(tmp_path: Path, text: str) -> None:
    """Broken JSON or JSON of another shape names the file."""
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedCheckpoint, match=r"tokenizer\.json"):
        Vocabulary.load(tmp_path)


def test_within_leaves_out_tokens_without_a_row(tmp_path: Path) -> None:
    """A tokenizer longer than the embedding has only the tokens that have rows."""
    vocabulary = load(save(tmp_path, bpe(ENGLISH, 260, special("<p>"))))
    assert vocabulary.within(300) is vocabulary.ids
    assert vocabulary.ids.keys() - vocabulary.within(260).keys() == {"<p>"}
