"""Files with several documents: names, order, circles."""

from __future__ import annotations

from textwrap import dedent

import pytest

from geomerge.errors import RecipeError
from geomerge.recipe import loads


def document(name: str | None, *models: str, more: str = "") -> str:
    """One `linear` document."""
    listed = "".join(f"  - model: {model}\n" for model in models)
    return (f"name: {name}\n" if name else "") + f"merge_method: linear\nmodels:\n{listed}{more}"


def order(*documents: str) -> list[str | None]:
    """The names in the order in which the documents run."""
    return [recipe.name for recipe in loads("---\n".join(documents), "r.yml").recipes]


def refused(*documents: str) -> str:
    """The message of the error."""
    with pytest.raises(RecipeError) as caught:
        order(*documents)
    return str(caught.value)


def test_order() -> None:
    """Each document comes after those it uses, wherever it stands; the one without a name comes last."""
    assert order(document("a", "x"), document(None, "a")) == ["a", None]
    assert order(document(None, "c", "y"), document("c", "a", "b"), document("b", "a"), document("a", "x")) == [
        "a",
        "b",
        "c",
        None,
    ]


def test_uses_beside_models() -> None:
    """A base, an adapter and a tokenizer may be results, too."""
    last = document(None, "m+lora", more="base_model: base\ntokenizer_source: words\n")
    stages = [document(name, "x") for name in ("words", "lora", "base")]
    assert set(order(last, *stages)) == {"words", "lora", "base", None}
    rule = document(None, "m", more="tokenizer: {tokens: {t: {source: words}}}\n")
    assert order(rule, stages[0]) == ["words", None]


def test_names_are_literal() -> None:
    """A name with @ or + is not taken apart."""
    pipeline = loads(document("v1@home+x", "a") + "---\n" + document(None, "v1@home+x"), "r.yml")
    assert pipeline.output.models()[0].path == "v1@home+x"
    assert len(pipeline.recipes) == 2


def test_unused_documents_are_noted() -> None:
    """What the output does not use is left out, and a note says so."""
    pipeline = loads(document("a", "x") + "---\n" + document(None, "y"), "r.yml")
    assert [recipe.name for recipe in pipeline.recipes] == [None]
    assert pipeline.notes == ("r.yml:1: the output does not use 'a'",)


def test_each_document_keeps_its_lines_and_the_whole_text() -> None:
    """Lines count through the file, and every recipe carries the file's text."""
    text = document("a", "x") + "---\n" + document(None, "a")
    first, last = loads(text, "r.yml").recipes
    assert (first.where.line, last.where.line, last.at("models").line) == (1, 6, 7)
    assert first.text == last.text == text


def test_empty_documents_are_skipped() -> None:
    """A separator at the beginning or the end is no document."""
    assert order("", document("a", "x"), document(None, "a"), "") == ["a", None]


def test_circles() -> None:
    """A circle is named in order; a document that uses itself is one."""
    message = refused(document(None, "a"), document("a", "b"), document("b", "c"), document("c", "a"))
    assert "documents need each other in a circle: a → b → c → a" in message
    assert "a → a" in refused(document("a", "a"), document(None, "a"))
    assert "a → b → a" in refused(document("a", "b"), document("b", "a"), document(None, "x"))


def test_names() -> None:
    """Names differ, exactly one document has none, and a name is no path."""
    assert refused(document("a", "x"), document("a", "y"), document(None, "a")) == (
        "r.yml:6: two documents have the name 'a'\n  the other is at r.yml:1; names must differ"
    )
    assert "r.yml:5: a second document has no name" in refused(document(None, "x"), document(None, "y"))
    assert "every document has a name" in refused(document("a", "x"), document("b", "a"))
    for name in ("/abs", "../up", "a/../b", "~/x"):
        assert "looks like a path" in refused(document(name, "x"))


def test_long_chains() -> None:
    """A thousand documents in a row are no problem."""
    documents = [document(f"s{i}", f"s{i - 1}" if i else "x") for i in range(300)]
    assert order(*reversed(documents), document(None, "s299"))[-2:] == ["s299", None]


def test_profile_per_document() -> None:
    """`compat` holds for its document; the caller's profile holds for all."""
    text = document("a", "x", more="compat: mergekit\n") + "---\n" + document(None, "a")
    assert [r.compat for r in loads(text).recipes] == ["mergekit", None]
    assert [r.compat for r in loads(dedent(text), compat="mergekit").recipes] == ["mergekit", "mergekit"]
