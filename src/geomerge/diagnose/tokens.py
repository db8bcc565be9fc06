"""How far two tokenizers agree: the overlap O of their vocabularies, ids, special tokens, chat templates.

Vocabularies are compared by what their tokens *mean*: see `geomerge.tokens.canonical`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from geomerge.tokens import chat
from geomerge.tokens.canonical import canonical, roles
from geomerge.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geomerge.engine.models import Model


@dataclass(frozen=True)
class TokenComparison:
    """How two tokenizers compare.

    Attributes:
        overlap: O, the Jaccard index of the canonical tokens, 0 to 1.
        assumed: In words what O rests on when the tokens could not be compared; empty otherwise.
        shared, only_a, only_b: How many canonical tokens both have, or one of them.
        same_ids: The share of the shared tokens that have the same id in both.
        specials: The share of the special tokens (bos, eos, pad, …) on which both agree; None when neither names any.
        specials_differ: Role → the tokens that the two have for it.
        chat: ``same``, ``differ``, ``first only``, ``second only`` or ``none``.
    """

    overlap: float
    assumed: str = ""
    shared: int = 0
    only_a: int = 0
    only_b: int = 0
    same_ids: float | None = None
    specials: float | None = None
    specials_differ: Mapping[str, tuple[str | None, str | None]] | None = None
    chat: str = "none"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "overlap": self.overlap,
            "assumed": self.assumed,
            "shared": self.shared,
            "only_first": self.only_a,
            "only_second": self.only_b,
            "same_ids": self.same_ids,
            "special_tokens": self.specials,
            "special_tokens_differ": {k: list(v) for k, v in (self.specials_differ or {}).items()},
            "chat_template": self.chat,
        }


def compare(a: Model, b: Model) -> TokenComparison:
    """Compare the tokenizers of two models."""
    specials, differ = _compare_specials(a, b)
    vocabularies = _compare_vocabularies(a, b)
    return replace(vocabularies, specials=specials, specials_differ=differ, chat=_compare_chat(a, b))


def _compare_vocabularies(a: Model, b: Model) -> TokenComparison:
    rows_a, rows_b = a.embedding_rows(), b.embedding_rows()
    if rows_a is None or rows_b is None:
        return TokenComparison(1.0, "no vocabulary: the models have no token embedding")
    va, vb = a.vocabulary, b.vocabulary
    if va is None or vb is None or "opaque" in (va.kind, vb.kind):
        return TokenComparison(*_assumed(va, vb, rows_a, rows_b))
    if va.ids == vb.ids and rows_a == rows_b:
        return TokenComparison(1.0, shared=len(va.within(rows_a)), same_ids=1.0)
    ids_a, ids_b = canonical(va, rows_a), canonical(vb, rows_b)
    both = ids_a.keys() & ids_b.keys()
    union = len(ids_a) + len(ids_b) - len(both)
    same = sum(ids_a[token] == ids_b[token] for token in both)
    return TokenComparison(
        overlap=len(both) / union if union else 1.0,
        shared=len(both),
        only_a=len(ids_a) - len(both),
        only_b=len(ids_b) - len(both),
        same_ids=same / len(both) if both else None,
    )


def _assumed(va: Vocabulary | None, vb: Vocabulary | None, rows_a: int, rows_b: int) -> tuple[float, str]:
    """O where the tokens themselves cannot be compared, and what it rests on."""
    if va is not None and vb is not None and va.kind == vb.kind == "opaque" and va.same_ids(vb):
        return 1.0, "" if rows_a == rows_b else "the tokenizer files are the same; the embeddings' heights differ"
    why = "there is no tokenizer to compare" if va is None or vb is None else "the tokenizer's format cannot be read"
    if rows_a == rows_b:
        return 1.0, f"{why}: assumed to be the same, because both embeddings have {rows_a:,} rows"
    share = min(rows_a, rows_b) / max(rows_a, rows_b)
    return share, f"{why}: assumed to agree on the rows that both embeddings have ({rows_a:,} and {rows_b:,})"


def shared_rows(vocabularies: Sequence[Vocabulary | None], heights: Sequence[int]) -> NDArray[np.int64] | None:
    """The rows of the tokens that all models have, in the first model's order.

    Args:
        vocabularies: The models' vocabularies.
        heights: Rows of the matrix in each model.

    Returns:
        Shape ``(models, tokens)``; `None` when the matrices are equal in height and order. Without tokenizers, the rows
        that all matrices have are taken to be the same tokens.
    """
    known = [v for v in vocabularies if v is not None and v.kind != "opaque"]
    if len(known) < len(vocabularies):
        if len(set(heights)) == 1:
            return None
        return np.tile(np.arange(min(heights), dtype=np.int64), (len(heights), 1))
    first = known[0]
    if all(v.ids == first.ids for v in known[1:]):
        if len(set(heights)) == 1:
            return None
        return np.tile(np.arange(min(heights), dtype=np.int64), (len(heights), 1))
    maps = [canonical(v, rows) for v, rows in zip(known, heights, strict=True)]
    common = set(maps[0]).intersection(*maps[1:])
    order = sorted(common, key=maps[0].__getitem__)
    return np.array([[ids[token] for token in order] for ids in maps], dtype=np.int64).reshape(len(maps), -1)


def _compare_specials(a: Model, b: Model) -> tuple[float | None, dict[str, tuple[str | None, str | None]]]:
    here, there = _specials(a), _specials(b)
    roles = sorted(here.keys() | there.keys())
    differ = {r: (here.get(r), there.get(r)) for r in roles if here.get(r) != there.get(r)}
    return (1 - len(differ) / len(roles) if roles else None), differ


def _specials(model: Model) -> dict[str, str]:
    """Role → token, of the roles that name exactly one."""
    return {} if model.folder is None else roles(model.folder)


def _compare_chat(a: Model, b: Model) -> str:
    here, there = has_chat(a), has_chat(b)
    if here is None and there is None:
        return "none"
    if here is None or there is None:
        return "second only" if here is None else "first only"
    return "same" if here == there else "differ"


def has_chat(model: Model) -> str | None:
    """The model's chat template, if it has one."""
    return chat.read(model.folder) if model.folder is not None else None
