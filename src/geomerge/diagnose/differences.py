"""What differs between two models beside their weights' values, in words, and what to do about it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from geomerge.checkpoint.dtypes import recipe_name
from geomerge.engine.config_differences import Difference, config_differences
from geomerge.engine.models import Model

if TYPE_CHECKING:
    from geomerge.diagnose.parents import Parents
    from geomerge.diagnose.tokens import TokenComparison


def differences(parents: Parents, a: int, b: int, tokens: TokenComparison) -> list[Difference]:
    """All differences of two of the models, the worst first."""
    one, other = parents.models[a], parents.models[b]
    names = parents.names[a], parents.names[b]
    found = [
        *config_differences(one, other, names),
        *_dtypes(one, other, names),
        *_vocabulary(one, other, names, tokens),
        *_tied(one, other, names),
        *_lacking(parents, names),
        *_quantised(one, other, names),
    ]
    order = {"blocking": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda d: order[d.severity])


def _dtypes(a: Model, b: Model, names: tuple[str, str]) -> list[Difference]:
    here, there = main_dtype(a), main_dtype(b)
    if here == there:
        return []
    return [
        Difference(
            "note",
            "dtype",
            f"the number formats differ: {here} in {names[0]}, {there} in {names[1]}",
            "the merge is computed in float64 anyway; set `dtype:` to what the output shall have",
        )
    ]


def main_dtype(model: Model) -> str:
    """The dtype of most of a model's elements, as recipes write it."""
    from math import prod

    counts: Counter[str] = Counter()
    for kind in model.tensors.values():
        counts[kind.dtype] += prod(kind.shape)
    return recipe_name(counts.most_common(1)[0][0])


def _vocabulary(a: Model, b: Model, names: tuple[str, str], tokens: TokenComparison) -> list[Difference]:
    made = []
    rows_a, rows_b = a.embedding_rows(), b.embedding_rows()
    policy = "choose a policy: `tokenizer_source: base`, `union`, or a model"
    if rows_a != rows_b:
        what = f"the embeddings have different heights: {_rows(rows_a)} in {names[0]}, {_rows(rows_b)} in {names[1]}"
        if tokens.assumed and None not in (rows_a, rows_b):
            advice = "nothing says which rows belong together: put the tokenizers' files into both directories"
            made.append(Difference("blocking", "vocabulary", what, advice))
        else:
            made.append(Difference("warning", "vocabulary", what, policy))
    if tokens.only_a or tokens.only_b:
        what = f"the vocabularies differ: {tokens.only_a:,} tokens only in {names[0]}, {tokens.only_b:,} only in {names[1]}"
        made.append(Difference("warning", "tokenizer", what, policy))
    if tokens.same_ids is not None and tokens.same_ids < 1:
        what = f"{100 * (1 - tokens.same_ids):.3g} % of the common tokens have different ids"
        advice = f"rows must be put in one order before they are merged: {policy}"
        made.append(Difference("warning", "token ids", what, advice))
    if tokens.assumed and rows_a is not None:
        advice = "put the tokenizer's files into both directories, or know that they are the same"
        made.append(Difference("note", "tokenizer", tokens.assumed, advice))
    for role, (x, y) in (tokens.specials_differ or {}).items():
        what = f"the {role} tokens differ: {x or 'none'} in {names[0]}, {y or 'none'} in {names[1]}"
        advice = "the output gets the first model's tokenizer: put the model whose prompts you will use first"
        made.append(Difference("note", f"{role} token", what, advice))
    said = {
        "differ": "the chat templates differ",
        "first only": f"only {names[0]} has a chat template",
        "second only": f"only {names[1]} has a chat template",
    }
    if tokens.chat in said:
        advice = "the output gets the first model's; `chat_template: auto` or a file's name chooses another"
        made.append(Difference("note", "chat template", said[tokens.chat], advice))
    return made


def _rows(rows: int | None) -> str:
    return "none" if rows is None else f"{rows:,} rows"


def _tied(a: Model, b: Model, names: tuple[str, str]) -> list[Difference]:
    ties_a, ties_b = bool(a.anatomy.tied), bool(b.anatomy.tied)
    if ties_a == ties_b:
        return []
    tying = names[0] if ties_a else names[1]
    advice = "the output gets a head of its own, merged from the head of one and the embedding of the other"
    return [Difference("warning", "tied weights", f"only {tying} ties its head to its embedding", advice)]


def _lacking(parents: Parents, names: tuple[str, str]) -> list[Difference]:
    made: dict[str, list[str]] = {}
    for tensor, without in parents.lacking.items():
        for name in names:
            if name in without:
                made.setdefault(name, []).append(tensor)
    return [
        Difference(
            "warning",
            "tensors",
            f"{name} lacks {len(tensors):,} tensor{'s' if len(tensors) > 1 else ''} that the other has: {tensors[0]}"
            + (", …" if len(tensors) > 1 else ""),
            "`unmatched: copy` takes them from the model that has them",
        )
        for name, tensors in made.items()
    ]


def _quantised(a: Model, b: Model, names: tuple[str, str]) -> list[Difference]:
    coded = [n for m, n in zip((a, b), names, strict=True) if m.checkpoint is not None and m.checkpoint.coded]
    advice = "codes are decoded for the merge; the original 16-bit model gives a better one"
    return [Difference("note", "quantisation", f"{name} is stored as codes", advice) for name in coded]
