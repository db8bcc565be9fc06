"""Tokenizers: canonical tokens, overlap, ids, special tokens, templates, and rows compared by what they mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diagnose_samples import vocabulary

import tiny
import token_samples
from geomerge.diagnose import diagnose
from geomerge.errors import IncompatibleModels
from geomerge.tokens.canonical import canonical
from geomerge.tokens.vocabulary import AddedToken, Alphabet, Vocabulary

WORDS = ["[UNK]", *(f"word{i}" for i in range(39))]


def of(alphabet: Alphabet, *tokens: str, added: tuple[str, ...] = ()) -> Vocabulary:
    """A vocabulary in memory."""
    ids = {t: i for i, t in enumerate((*tokens, *added))}
    return Vocabulary(Path(), "BPE", ids, {t: AddedToken(t, special=True) for t in added}, len(ids), alphabet)


def test_canonical_tokens() -> None:
    """The same words, bytes and spaces in three spellings."""
    byte_level = canonical(of("bytes", "Ġ", "Ġthe", "ing", "Ċ", "Ã¼", "Ġ<s>", added=("<s>",)))
    pieces = canonical(of("pieces", "▁", "▁the", "ing", "<0x0A>", "ü", "▁<s>", added=("<s>",)))
    assert byte_level.keys() == pieces.keys()
    assert byte_level[b" the"] == 1
    assert set(byte_level) == {b" ", b" the", b"ing", b"\n", "ü".encode(), b" <s>", b"<s>"}
    words = canonical(of("words", "[PAD]", "the", "##ing", added=("[PAD]",)))
    assert set(words) == {b"[PAD]", b" the", b"ing"}


def test_trained_tokenizers_are_compared(tmp_path: Path) -> None:
    """A byte-level and a SentencePiece vocabulary of the same text share words that no plain comparison finds."""
    token_samples.save(tmp_path / "bpe", token_samples.bpe(token_samples.ENGLISH, 320))
    token_samples.save(tmp_path / "unigram", token_samples.unigram(token_samples.ENGLISH, 60))
    bpe, unigram = token_samples.load(tmp_path / "bpe"), token_samples.load(tmp_path / "unigram")
    raw = bpe.ids.keys() & unigram.ids.keys()
    both = canonical(bpe).keys() & canonical(unigram).keys()
    assert len(both) > len(raw)
    assert b" " in both


@pytest.mark.parametrize("plain", [False, True])
def test_single_tokens_do_not_say_what_the_alphabet_is(tmp_path: Path, plain: bool) -> None:
    """Most vocabularies hold ``##`` as text, and one of SentencePiece may hold the letter Ġ."""
    texts = token_samples.ENGLISH
    for name, extra in (("plain", []), ("marked", ["## a ### b"] * 9)):
        token_samples.save(tmp_path / f"bytes-{name}", token_samples.bpe(texts + extra, 400))
        pieces = [*texts, *(each.replace("#", "# Ġ Ġa") for each in extra)]
        token_samples.save(tmp_path / f"pieces-{name}", token_samples.unigram(pieces, 80))
        token_samples.save(tmp_path / f"words-{name}", token_samples.wordpiece([*texts, *extra], 90))
    found = {}
    for folder in tmp_path.iterdir():
        if plain:  # without the file that says how text is cut
            vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
            tokens = vocabulary if isinstance(vocabulary, dict) else {t: i for i, (t, _) in enumerate(vocabulary)}
            (folder / "vocab.json").write_text(json.dumps(tokens))
            (folder / "tokenizer.json").unlink()
        found[folder.name] = token_samples.load(folder)
    assert all(known.alphabet == name.partition("-")[0] for name, known in found.items())
    assert any(token.startswith("##") for token in found["bytes-marked"].ids)
    assert "Ġ" in found["pieces-marked"].ids or plain
    for one in ("bytes", "pieces"):
        both = [canonical(found[f"{one}-{name}"]).keys() for name in ("plain", "marked")]
        assert len(both[0] & both[1]) > 0.8 * len(both[0])


def family(root: Path, **options: object) -> None:
    """Two models with 40 words."""
    tiny.family(root, "a b", **options)
    vocabulary(root / "a", WORDS)
    vocabulary(root / "b", WORDS)


def test_same_tokenizer(tmp_path: Path) -> None:
    """O is 1 and nothing is assumed."""
    family(tmp_path)
    tokens = diagnose(tmp_path / "a", tmp_path / "b").pairs[0].tokens
    assert (tokens.overlap, tokens.assumed, tokens.same_ids, tokens.shared) == (1.0, "", 1.0, 40)
    assert (tokens.specials, tokens.chat) == (1.0, "none")


def test_overlap_and_ids(tmp_path: Path) -> None:
    """30 of 40 words are common, in 10 of them the ids differ: O = 30/50, 2/3 same ids; merging needs a policy."""
    family(tmp_path)
    other = [*WORDS[:20], *(f"new{i}" for i in range(10)), *WORDS[20:30]]
    vocabulary(tmp_path / "b", other, chat="{{ messages }}", eos_token="word3")
    found = diagnose(tmp_path / "a", tmp_path / "b")
    tokens = found.pairs[0].tokens
    assert tokens.overlap == pytest.approx(30 / 50)
    assert tokens.same_ids == pytest.approx(20 / 30)
    assert (tokens.only_a, tokens.only_b) == (10, 10)
    assert tokens.specials_differ == {"eos": (None, "word3")}
    assert tokens.chat == "second only"
    assert found.decision.scope == "embedding"
    assert "tokenizer_source: base" in found.recipe()
    # Who follows instructions comes first.
    assert found.decision.order == (1, 0)


def test_rows_are_compared_by_meaning(tmp_path: Path) -> None:
    """A model whose rows are permuted with its vocabulary is no farther away than before."""
    made = tiny.family(tmp_path, "a b")
    vocabulary(tmp_path / "a", WORDS)
    vocabulary(tmp_path / "b", WORDS)
    plain = diagnose(tmp_path / "a", tmp_path / "b")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    b = {n: t[order] if n in ("model.embed_tokens.weight", "lm_head.weight") else t for n, t in made["b"].items()}
    tiny.save(tmp_path / "p", b, tiny.LLAMA)
    vocabulary(tmp_path / "p", [WORDS[i] for i in order])
    moved = diagnose(tmp_path / "a", tmp_path / "p")
    assert moved.pairs[0].tokens.overlap == 1.0
    assert moved.pairs[0].score.omega_bar == pytest.approx(plain.pairs[0].score.omega_bar, rel=1e-6)
    assert any(d.subject == "token ids" for d in moved.pairs[0].differences)


def test_padded_embeddings(tmp_path: Path) -> None:
    """More rows than tokens: the common rows are compared, and the difference is named."""
    made = tiny.family(tmp_path, "a b")
    grown = {
        n: torch.cat([t, torch.zeros(8, 16)]) if n in ("model.embed_tokens.weight", "lm_head.weight") else t
        for n, t in made["b"].items()
    }
    tiny.save(tmp_path / "p", grown, tiny.LLAMA | {"vocab_size": 48})
    for name in "abp":
        vocabulary(tmp_path / name, WORDS)
    plain, padded = (diagnose(tmp_path / "a", tmp_path / n) for n in "bp")
    assert padded.pairs[0].score.omega_bar == pytest.approx(plain.pairs[0].score.omega_bar, rel=1e-9)
    assert padded.pairs[0].tokens.overlap == 1.0
    assert "48 rows in p" in padded.pairs[0].differences[0].what
    assert "tokenizer_source: base" in padded.recipe()


def test_no_tokenizer_is_assumed(tmp_path: Path) -> None:
    """Equal heights are taken for equal vocabularies, and it is said."""
    tiny.family(tmp_path, "a b")
    tokens = diagnose(tmp_path / "a", tmp_path / "b").pairs[0].tokens
    assert tokens.overlap == 1.0
    assert "assumed to be the same" in tokens.assumed
    tiny.llama(tmp_path / "c", 5, vocab_size=50)
    unequal = diagnose(tmp_path / "a", tmp_path / "c")
    assert unequal.pairs[0].tokens.overlap == pytest.approx(0.8)
    assert unequal.decision.mode == "do_not_merge"
    assert "put the tokenizers' files" in unequal.decision.reasons[0]


def test_disjoint_vocabularies(tmp_path: Path) -> None:
    """No token in common is an error."""
    family(tmp_path)
    vocabulary(tmp_path / "b", [f"other{i}" for i in range(40)])
    with pytest.raises(IncompatibleModels, match="disjoint"):
        diagnose(tmp_path / "a", tmp_path / "b")
