"""Filters: substrings, globs, regular expressions, roles and blocks; and regular expressions that could run forever."""

from __future__ import annotations

import time

import pytest

from geomerge.anatomy import Part
from geomerge.recipe import Filter
from geomerge.recipe.patterns import MAX_PATTERN, classify, searcher


def part(name: str, role: str = "attention", block: int | None = 3) -> Part:
    """A tensor."""
    return Part(
        name=name, role=role, module="", block=block, depth=0.5, position="block" if block is not None else "pre"
    )


Q = part("model.layers.3.self_attn.q_proj.weight")
HEAD = part("lm_head.weight", "head", None)


@pytest.mark.parametrize(
    ("text", "pattern", "kind"),
    [
        ("self_attn", "self_attn", "substring"),
        ("*", "*", "substring"),
        ("", "", "substring"),
        ("/", "/", "substring"),
        ("//", "//", "substring"),
        ("a/b", "a/b", "substring"),
        ("*.mlp.*", "*.mlp.*", "glob"),
        ("layers.?.", "layers.?.", "glob"),
        ("layers.[0-3].*", "layers.[0-3].*", "glob"),
        (r"/layers\.\d+/", r"layers\.\d+", "regex"),
    ],
)
def test_kinds(text: str, pattern: str, kind: str) -> None:
    """The text itself tells what it is."""
    assert classify(text) == (pattern, kind)


@pytest.mark.parametrize(
    ("chosen", "hits", "misses"),
    [
        (Filter("self_attn"), [Q], [HEAD]),
        (Filter("*"), [Q, HEAD], []),
        (Filter(""), [Q, HEAD], []),
        (Filter(), [Q, HEAD], []),
        (Filter("q_proj.weight.x"), [], [Q]),
        (Filter("*.self_attn.*", kind="glob"), [Q], [HEAD]),
        (Filter("self_attn*", kind="glob"), [], [Q]),
        (Filter("model.layers.[0-3].*", kind="glob"), [Q], [part("model.layers.4.x")]),
        (Filter(r"layers\.\d\.", kind="regex"), [Q], [part("model.layers.12.x"), HEAD]),
        (Filter("^lm_head", kind="regex"), [HEAD], [Q]),
        (Filter(role="attention"), [Q], [HEAD]),
        (Filter(blocks=(3, 7)), [Q, part("x", block=7)], [HEAD, part("x", block=2), part("x", block=8)]),
        (Filter(blocks=(3, 3)), [Q], [part("x", block=4)]),
        (Filter("q_proj", "attention", (0, 3)), [Q], [part("q_proj", "mlp"), part("q_proj", block=4), part("k_proj")]),
    ],
)
def test_matches(chosen: Filter, hits: list[Part], misses: list[Part]) -> None:
    """All conditions of a filter must hold; a glob is over the whole name, a regular expression anywhere in it."""
    assert [chosen.matches(p) for p in hits] == [True] * len(hits)
    assert [chosen.matches(p) for p in misses] == [False] * len(misses)


@pytest.mark.parametrize(
    ("chosen", "text", "everywhere"),
    [
        (Filter("mlp"), "filter: mlp", False),
        (Filter("a|b", kind="regex"), "filter: /a|b/", False),
        (Filter("q", "attention", (3, 7)), "filter: q, role: attention, block: 3-7", False),
        (Filter(blocks=(3, 3)), "block: 3", False),
        (Filter("*", "attention"), "filter: *, role: attention", False),
        (Filter("*"), "filter: *", True),
        (Filter(), "filter: *", True),
    ],
)
def test_as_text(chosen: Filter, text: str, everywhere: bool) -> None:
    """A filter reads as in the recipe, and knows whether it is for all tensors."""
    assert (str(chosen), chosen.everywhere) == (text, everywhere)


@pytest.mark.parametrize(
    "pattern",
    [
        r"layers\.\d+\.mlp",
        r"^model\.layers\.\d+\.(self_attn|mlp)\..*$",
        r"\.(q|k|v|o)_proj\.weight$",
        r"layers\.(1[0-9]|2[0-3])\.",
        r"(?:foo)?bar+",
        r"(?i)NORM",
        r"^(?!.*norm)",
        r"(?P<what>mlp)",
        r"(ab)+",
        r"a{2,3}b{4}",
        r"[)(*+]{2}",
        r"\(\)+",
    ],
)
def test_ordinary_expressions(pattern: str) -> None:
    """What people write is accepted."""
    assert classify(f"/{pattern}/") == (pattern, "regex")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a*)*$",
        "(a|a)*$",
        "(a|aa)+$",
        r"(\w+\s?)*$",
        "(.*)*x",
        "((a?)){30}",
        "((a+)?)+x",
        "([a-z]+){2,}$",
        "(?P<n>a+)+",
        "(?:a+)+?x",
        "(?x)(a+) +$",
        "(a+)(?#comment)+$",
        r"(a)\1",
        "(?P<n>a)(?P=n)",
        "(a)(?(1)b|c)",
        "a?" * 30 + "a" * 30,
        "(.|.)" * 40,
        ".*" * 8 + "x",
        "a{1,90}" * 20,
        "a" * (MAX_PATTERN + 1),
        "(",
        "[",
        "a**",
        "*a",
    ],
)
def test_dangerous_or_broken_expressions(pattern: str) -> None:
    """What can take exponential time, refers back, is too long, or is no regular expression is refused unrun."""
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"/|characters"):
        classify(f"/{pattern}/")
    assert time.thread_time() - start < 0.5


@pytest.mark.parametrize("pattern", [".*.*.*x$", "a*a*a*(b|c)?x", "(?=.*.*.*x)", "(a|b|c).*(a|b).*x"])
def test_worst_accepted_expressions_end(pattern: str) -> None:
    """The worst of what is accepted still answers at once on names as long as any tensor's."""
    classify(f"/{pattern}/")
    start = time.thread_time()
    assert searcher("regex", pattern)("a" * 120) is None
    assert time.thread_time() - start < 1


def test_long_globs() -> None:
    """Globs are bounded, too; substrings are harmless."""
    with pytest.raises(ValueError, match="characters"):
        classify("*" * (MAX_PATTERN + 1))
    assert classify("a" * 5000)[1] == "substring"
