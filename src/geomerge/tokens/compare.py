"""How two vocabularies differ, and what to say when a recipe merges them without a policy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from geomerge.errors import IncompatibleModels
from geomerge.tokens.vocabulary import Vocabulary

POLICIES = (
    "Say which vocabulary the output gets: `tokenizer_source: base` keeps the base model's, `tokenizer_source: union` "
    "keeps every token of every model, `tokenizer_source: <model>` keeps that model's."
)
ONE_VOCABULARY = "give all of them one vocabulary first: `geomerge transplant` does it"


@contextlib.contextmanager
def one_vocabulary() -> Iterator[None]:
    """Where no recipe can say which vocabulary the output gets, errors say what to do instead."""
    try:
        yield
    except IncompatibleModels as error:
        if error.hint == POLICIES:
            error.hint = ONE_VOCABULARY
        raise


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between the vocabularies `a` and `b`.

    Attributes:
        only_a, only_b: How many tokens only one of them has.
        moved: How many tokens both have under different ids.
        shared: How many tokens both have.
        relabelled_only: Every id that both use for different tokens is an added token's in one of them at least (a
            fine-tune that renamed reserved tokens), so that all ordinary tokens mean the same rows.
        examples_a, examples_b: The first of the tokens that only one has, by id.
        examples_moved: (token, id in a, id in b), by id in a.
    """

    only_a: int
    only_b: int
    moved: int
    shared: int
    relabelled_only: bool
    examples_a: tuple[str, ...]
    examples_b: tuple[str, ...]
    examples_moved: tuple[tuple[str, int, int], ...]

    @property
    def same(self) -> bool:
        """Whether both give the same tokens the same ids."""
        return not (self.only_a or self.only_b or self.moved)

    @property
    def jaccard(self) -> float:
        """Tokens that both have, over tokens that at least one has; 1 for two empty vocabularies."""
        union = self.shared + self.only_a + self.only_b
        return self.shared / union if union else 1.0

    def describe(self, a: str, b: str) -> str:
        """One sentence that names the models `a` and `b`."""
        parts = []
        if self.only_a:
            parts.append(f"{self.only_a:,} tokens only in {a} ({_listed(self.examples_a, self.only_a)})")
        if self.only_b:
            parts.append(f"{self.only_b:,} tokens only in {b} ({_listed(self.examples_b, self.only_b)})")
        if self.moved:
            moved = [f"{token!r} {i} and {j}" for token, i, j in self.examples_moved]
            parts.append(f"{self.moved:,} tokens with different ids ({', '.join(moved)}{_more(moved, self.moved)})")
        if not parts:
            return f"{a} and {b} have the same vocabulary"
        return f"{'; '.join(parts)}; {100 * self.jaccard:.4g} % of all tokens are in both"


def difference(a: Vocabulary, b: Vocabulary, *, examples: int = 3) -> Difference:
    """Compare two vocabularies token by token.

    Args:
        a, b: Vocabularies whose ids are known (not "opaque").
        examples: How many tokens to name of each kind.
    """
    if a.ids == b.ids:
        return Difference(0, 0, 0, len(a.ids), True, (), (), ())
    shared = a.ids.keys() & b.ids.keys()
    only_a = sorted(a.ids.keys() - shared, key=a.ids.__getitem__)
    only_b = sorted(b.ids.keys() - shared, key=b.ids.__getitem__)
    moved = sorted((token for token in shared if a.ids[token] != b.ids[token]), key=a.ids.__getitem__)
    return Difference(
        only_a=len(only_a),
        only_b=len(only_b),
        moved=len(moved),
        shared=len(shared),
        relabelled_only=_relabelled_only(a, b, [*only_a, *moved]),
        examples_a=tuple(only_a[:examples]),
        examples_b=tuple(only_b[:examples]),
        examples_moved=tuple((token, a.ids[token], b.ids[token]) for token in moved[:examples]),
    )


def without_policy(
    models: Sequence[tuple[object, Vocabulary | None, int]],
) -> tuple[IncompatibleModels | None, tuple[str, ...]]:
    """Whether the models' embeddings can be merged row by row without a tokenizer policy.

    Args:
        models: (model, its vocabulary or None, rows of its embedding) of every input; the first is compared with the
            others.

    Returns:
        The error to raise, or None, and warnings. Different numbers of rows, or ordinary tokens that mean different
        rows, are errors; renamed or added special tokens within the same number of rows are a warning.
    """
    warnings: list[str] = []
    if not models:
        return None, ()
    first, vocabulary, rows = models[0]
    for other, other_vocabulary, other_rows in models[1:]:
        known = _difference_or_none(vocabulary, other_vocabulary)
        tokens = f": {known.describe(str(first), str(other))}" if known and not known.same else ""
        if rows != other_rows:
            return (
                IncompatibleModels(
                    f"the vocabularies differ: {first} has {rows:,} embedding rows, {other} has {other_rows:,}{tokens}",
                    hint=POLICIES,
                ),
                (),
            )
        if known and not known.relabelled_only:
            return (
                IncompatibleModels(
                    f"the vocabularies differ although both have {rows:,} embedding rows, so that the same row "
                    f"means different tokens{tokens}",
                    hint=POLICIES,
                ),
                (),
            )
        if known and not known.same:
            warnings.append(
                f"the added tokens of {first} and {other} differ{tokens}; their rows are merged by id. {POLICIES}"
            )
        elif known is None and vocabulary and other_vocabulary and not vocabulary.same_ids(other_vocabulary):
            warnings.append(
                f"the tokenizers of {first} and {other} cannot be compared (only one format of the two is readable, "
                "or the binary files differ); their rows are merged by id"
            )
    return None, tuple(warnings)


def _difference_or_none(a: Vocabulary | None, b: Vocabulary | None) -> Difference | None:
    """None when a vocabulary is missing or its ids cannot be read."""
    if a is None or b is None or "opaque" in (a.kind, b.kind):
        return None
    return difference(a, b)


def _relabelled_only(a: Vocabulary, b: Vocabulary, suspects: Sequence[str]) -> bool:
    """Whether every id that means one token in `a` and another in `b` is an added token's id in `a` or `b`."""
    at_b = {index: token for token, index in b.ids.items()}
    for token in suspects:
        other = at_b.get(a.ids[token])
        if other is not None and other != token and token not in a.added and other not in b.added:
            return False
    return True


def _listed(examples: Sequence[str], count: int) -> str:
    return ", ".join(repr(token) for token in examples) + _more(examples, count)


def _more(examples: Sequence[object], count: int) -> str:
    return ", …" if count > len(examples) else ""
