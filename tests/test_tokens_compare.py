"""geomerge.tokens.compare: how vocabularies differ and what is said about it."""

from __future__ import annotations

from pathlib import Path

from geomerge.tokens.compare import difference, without_policy
from geomerge.tokens.vocabulary import AddedToken, Vocabulary
from token_samples import ENGLISH, GERMAN, bpe, load, save, special


def vocabulary(tokens: str, *added: str) -> Vocabulary:
    """Ids in the order of the words in `tokens`."""
    ids = {token: index for index, token in enumerate(tokens.split())}
    return Vocabulary(Path("nowhere"), "BPE", ids, {token: AddedToken(token) for token in added}, len(ids))


def test_counts_examples_and_jaccard() -> None:
    """A case small enough to count by hand."""
    found = difference(vocabulary("a b c d"), vocabulary("a c b e f"))
    assert (found.only_a, found.only_b, found.moved, found.shared) == (1, 2, 2, 3)
    assert found.examples_a == ("d",)
    assert found.examples_b == ("e", "f")
    assert found.examples_moved == (("b", 1, 2), ("c", 2, 1))
    assert found.jaccard == 3 / 6
    assert not found.same
    assert not found.relabelled_only


def test_equal_vocabularies() -> None:
    """Nothing differs, whatever the order of the dictionaries."""
    a = vocabulary("a b")
    b = Vocabulary(Path("nowhere"), "BPE", {"b": 1, "a": 0}, {}, 2)
    assert difference(a, b).same
    assert difference(a, b).jaccard == 1


def test_examples_are_the_first_by_id() -> None:
    """At most as many as asked for, and the sentence says that there are more."""
    found = difference(vocabulary("a b c d e"), vocabulary("a"), examples=2)
    assert found.examples_a == ("b", "c")
    assert "4 tokens only in left ('b', 'c', …)" in found.describe("left", "right")


def test_different_rows_are_refused_with_names_tokens_and_policy(tmp_path: Path) -> None:
    """The message has both shapes, the tokens that differ and the ways out."""
    a = load(save(tmp_path / "a", bpe(ENGLISH, 280)))
    b = load(save(tmp_path / "b", bpe(ENGLISH, 280, special("<|im_start|>"))))
    error, _ = without_policy([("org/a", a, a.size), ("org/b", b, b.size)])
    assert error is not None
    for piece in ("280", "281", "org/a", "org/b", "<|im_start|>", "tokenizer_source: union"):
        assert piece in str(error)


def test_equal_rows_with_other_ordinary_tokens_are_refused(tmp_path: Path) -> None:
    """Two tokenizers of one size whose rows mean different words are not merged silently."""
    a, b = (load(save(tmp_path / name, bpe(text, 290))) for name, text in (("a", ENGLISH), ("b", GERMAN)))
    error, _ = without_policy([("a", a, 290), ("b", b, 290)])
    assert error is not None
    assert "same row means different tokens" in str(error)


def test_renamed_reserved_tokens_are_only_a_warning(tmp_path: Path) -> None:
    """A fine-tune that renamed a reserved token shares every ordinary row with its parent."""
    a = load(save(tmp_path / "a", bpe(ENGLISH, 280, special("<|reserved_0|>"))))
    b = load(save(tmp_path / "b", bpe(ENGLISH, 280, special("<|im_start|>"))))
    error, warnings = without_policy([("a", a, 281), ("b", b, 281)])
    assert error is None
    assert len(warnings) == 1
    assert "<|im_start|>" in warnings[0]


def test_missing_tokenizers_are_judged_by_rows() -> None:
    """Without tokenizer files only the shapes can disagree."""
    assert without_policy([("a", None, 5), ("b", None, 5)]) == (None, ())
    error, _ = without_policy([("a", None, 5), ("b", None, 6)])
    assert error is not None
