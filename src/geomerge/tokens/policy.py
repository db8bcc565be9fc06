"""From a recipe's tokenizer policy to row maps: which row of which parent becomes which row of the output's embedding.

Every embedding (and head) of every input is re-indexed to the output's vocabulary before the merge. Where a model
lacks a token, the row comes from, in this order: the token's rule in the recipe; what the policy's ``missing`` says; the base
model, if it has the token; the only model that has it; the mean of the models that have it. The maps are arrays, so that an
engine can stream them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from geomerge.errors import IncompatibleModels, RecipeError, did_you_mean
from geomerge.tokens.canonical import canonical, meanings, roles
from geomerge.tokens.rows import MEAN, OMP, PAD, ZERO, TokenPlan
from geomerge.tokens.vocabulary import AddedToken, Vocabulary
from geomerge.tokens.write import OutputTokenizer, check_editable, check_removable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from geomerge.recipe.values import ModelRef, TokenizerSpec, TokenRule
    from geomerge.tokens.rows import IntArray

_MAKE_TOKENIZER = "Make a tokenizer.json: `AutoTokenizer.from_pretrained(model).save_pretrained(model)`."
_ENDS = ("bos", "eos", "unk", "sep", "cls", "mask", "pad")
"""The roles whose tokens stand for each other in different tokenizers."""


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """The inputs of one merge; `ids[k]` holds the tokens of model k that have a row in its embedding."""

    models: tuple[object, ...]
    names: tuple[str, ...]
    vocabularies: tuple[Vocabulary, ...]
    ids: tuple[Mapping[str, int], ...]
    rows: tuple[int, ...]
    where: str | None
    inside: int
    """How many of them are merged; those after give their tokenizer only."""

    def index(self, model: object, what: str, where: str | None, words: Sequence[str] = (), more: str = "") -> int:
        """The position of `model` among the inputs, by value or as written; `words` could have been meant as well, and `more`
        is what the hint adds.

        Raises:
            RecipeError: It is not an input.
        """
        if model in self.models:
            return self.models.index(model)
        if str(model) in self.names:
            return self.names.index(str(model))
        raise RecipeError(
            f"{what} names the model {str(model)!r}, which is not an input of this merge",
            where=where,
            hint="; ".join(filter(None, (did_you_mean(str(model), [*self.names, *words]), more))),
        )

    def same_ids(self) -> bool:
        return all(self.vocabularies[0].same_ids(other) for other in self.vocabularies[1:])

    def merged(self, model: object, what: str, where: str | None) -> int:
        """The position of a model that is merged.

        Raises:
            RecipeError: It is not.
        """
        found = self.index(model, what, where)
        if found >= self.inside:
            raise RecipeError(
                f"{what} names {self.names[found]}, whose rows are of another space: it is not merged", where=where
            )
        return found


def build(
    spec: TokenizerSpec,
    vocabularies: Sequence[tuple[ModelRef, Vocabulary | None, int]],
    base_index: int | None,
    *,
    cut_padding: bool = False,
    outsiders: int = 0,
) -> TokenPlan:
    """Plan the output's vocabulary.

    Args:
        spec: The recipe's tokenizer policy: the source ("union", "base" or a model), rules per token, padding.
        vocabularies: (model, its vocabulary, rows of its embedding) of every input, in the recipe's order.
        base_index: Which of them is the base model; None without one.
        cut_padding: Cut the embedding to the tokenizer's length even when all inputs agree in vocabulary and rows, as
            mergekit does. Otherwise such inputs keep their padding rows. Inputs that differ are always cut.
        outsiders: How many of the models, the last ones, are not merged: they give their tokenizer, and for ``missing: omp`` a
            space to find coefficients in, but no rows.

    Raises:
        RecipeError: A rule names an unknown model or token, or a row out of range; "base" without a base model.
        IncompatibleModels: A model has no readable tokenizer, or the output's tokenizer cannot be made.
    """
    if spec.pad_to_multiple_of is not None and spec.pad_to_multiple_of < 1:
        raise RecipeError(
            f"pad_to_multiple_of is {spec.pad_to_multiple_of}; it must be a positive number", where=str(spec.where)
        )
    inputs = _inputs(vocabularies, str(spec.where), outsiders)
    source = _source_index(spec, inputs, base_index)
    if spec.missing == "omp" or outsiders:
        inputs = _by_meaning(inputs, source)
    if any(vocabulary.kind == "opaque" for vocabulary in inputs.vocabularies):
        return _opaque_plan(spec, inputs, source)

    notes: list[str] = []
    tokenizer = _output_tokenizer(spec, inputs, source, notes)
    ids = tokenizer.ids()
    length = max(ids.values(), default=-1) + 1
    forced = any(rule.force for rule in spec.tokens)
    agree = inputs.same_ids() and len(set(inputs.rows)) == 1 and tokenizer.copied
    keep = agree and not forced and spec.pad_to_multiple_of is None and not cut_padding
    size = max(length, inputs.rows[0]) if keep else _padded(length, spec.pad_to_multiple_of)
    _note_lengths(notes, inputs, length, size, keep)

    tokens = list(ids)
    at = np.fromiter(ids.values(), np.int64, len(ids))
    names = np.full(size, None, dtype=object)
    names[at] = tokens
    nameless = np.setdiff1d(np.arange(size), at)
    owned = np.full((len(inputs.names), size), -1, np.int64)
    for k, known in enumerate(inputs.ids):
        owned[k, at] = np.fromiter(map(known.get, tokens, repeat(-1)), np.int64, len(tokens))
    if keep:
        # holes and padding: every model has a row of its own there
        owned[:, nameless] = nameless
    fallback, fallback_row = _fallback(spec, inputs, owned, base_index, source)
    own = owned.copy()
    for rule in spec.tokens:
        row = ids[rule.token]
        fallback[row], fallback_row[row] = _rule_source(rule, inputs)
        if rule.force:
            own[:, row] = -1
    return TokenPlan(
        size=size,
        identity=_is_identity(own[: inputs.inside], inputs.rows[: inputs.inside]),
        models=inputs.names,
        names=tuple(names.tolist()),
        row_maps=_frozen(own),
        owner_rows=_frozen(owned),
        fallback=_frozen(fallback),
        fallback_row=_frozen(fallback_row),
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


def _inputs(
    vocabularies: Sequence[tuple[ModelRef, Vocabulary | None, int]], where: str | None, outsiders: int
) -> _Inputs:
    if not vocabularies:
        raise IncompatibleModels("a tokenizer policy needs at least one model", where=where)
    found: list[Vocabulary] = []
    for model, vocabulary, rows in vocabularies:
        if vocabulary is None:
            raise IncompatibleModels(
                "the model has no tokenizer files, so that its embedding rows cannot be matched with the others'",
                where=str(model),
                hint="Copy the tokenizer files into the model's directory, or leave out `tokenizer_source`, "
                "`tokenizer` and `tokens` to merge the rows by position.",
            )
        if rows <= 0:
            raise IncompatibleModels(f"the embedding has {rows} rows", where=str(model))
        found.append(vocabulary)
    return _Inputs(
        models=tuple(model for model, _, _ in vocabularies),
        names=tuple(str(model) for model, _, _ in vocabularies),
        vocabularies=tuple(found),
        ids=tuple(vocabulary.within(rows) for vocabulary, (_, _, rows) in zip(found, vocabularies, strict=True)),
        rows=tuple(rows for _, _, rows in vocabularies),
        where=where,
        inside=len(found) - outsiders,
    )


def _by_meaning(inputs: _Inputs, source: int) -> _Inputs:
    """The same inputs; those that write the source's tokens in another alphabet (``▁the`` for ``Ġthe``), or have another token
    for the same role (``<|end|>`` for ``</s>``), have them too."""
    mine = roles(inputs.vocabularies[source].directory)
    ids = list(inputs.ids)
    tokens: dict[bytes, list[str]] | None = None
    for k, vocabulary in enumerate(inputs.vocabularies):
        if k == source or vocabulary.kind == "opaque" or inputs.vocabularies[source].kind == "opaque":
            continue
        if tokens is None:
            tokens, means = {}, meanings(inputs.vocabularies[source])
            for token in inputs.ids[source]:
                tokens.setdefault(means(token), []).append(token)
        known = dict(inputs.ids[k])
        for same, index in canonical(vocabulary, inputs.rows[k]).items():
            for token in tokens.get(same, ()):
                known.setdefault(token, index)
        for role, token in roles(vocabulary.directory).items():
            if role in _ENDS and role in mine and token in known and mine[role] in inputs.ids[source]:
                known.setdefault(mine[role], known[token])
        ids[k] = known
    return replace(inputs, ids=tuple(ids))


def _source_index(spec: TokenizerSpec, inputs: _Inputs, base_index: int | None) -> int:
    """Whose tokenizer the output's starts from."""
    if spec.source in ("union", "intersection"):
        return 0 if base_index is None else base_index
    if spec.source == "base":
        if base_index is None:
            raise RecipeError(
                "the tokenizer source is `base`, but the recipe has no base model",
                where=inputs.where,
                hint="Add `base_model:`, or name a model: `tokenizer_source: <model>`, or use `union`.",
            )
        return base_index
    words = ("union", "base", "intersection")
    more = "a model that is not merged gives its tokenizer with `missing: omp`, `mean` or `zero`"
    return inputs.index(spec.source, "the tokenizer source", inputs.where, words, more)


def _opaque_plan(spec: TokenizerSpec, inputs: _Inputs, source: int) -> TokenPlan:
    """Tokenizers in binary files can be copied, and the rows kept as they are, when all inputs have the same one."""
    opaque = [k for k, vocabulary in enumerate(inputs.vocabularies) if vocabulary.kind == "opaque"]
    where = inputs.names[opaque[0]]
    problem = None
    if spec.source in ("union", "intersection"):
        problem = f"the {spec.source} of vocabularies needs token ids"
    elif spec.tokens or spec.pad_to_multiple_of is not None:
        problem = "rules for tokens and padding need token ids"
    elif not inputs.same_ids():
        problem = "the inputs' tokenizers differ, and matching their rows needs token ids"
    elif len(set(inputs.rows)) > 1:
        counts = ", ".join(f"{name} {rows:,}" for name, rows in zip(inputs.names, inputs.rows, strict=True))
        problem = f"the inputs have different numbers of embedding rows ({counts}), and matching them needs token ids"
    if problem:
        raise IncompatibleModels(
            f"{problem}; this model has only a binary tokenizer file, which is not read",
            where=where,
            hint=_MAKE_TOKENIZER,
        )
    size = inputs.rows[0]
    own = np.tile(np.arange(size, dtype=np.int64), (len(inputs.names), 1))
    return TokenPlan(
        size=size,
        identity=True,
        models=inputs.names,
        names=(None,) * size,
        row_maps=_frozen(own),
        owner_rows=_frozen(own),
        fallback=_frozen(np.zeros(size, np.int64)),
        fallback_row=_frozen(np.arange(size, dtype=np.int64)),
        tokenizer=OutputTokenizer(inputs.vocabularies[source]),
        notes=("all inputs have the same binary tokenizer file: it is copied, and every embedding row is kept",),
    )


def _output_tokenizer(spec: TokenizerSpec, inputs: _Inputs, source: int, notes: list[str]) -> OutputTokenizer:
    """The source's tokenizer less the tokens without a row, plus, for a union, the others' tokens, plus the rules'."""
    vocabulary, kept = inputs.vocabularies[source], inputs.ids[source]
    removed: frozenset[str] = frozenset()
    if spec.source == "intersection":
        kept = _common(inputs, source, notes)
    if len(kept) < len(vocabulary.ids):
        removed = frozenset(vocabulary.ids.keys() - kept.keys())
        check_removable(vocabulary, removed)
    appended: dict[str, AddedToken] = {}
    if spec.source == "union":
        _append_others(inputs, source, appended, notes)
    for rule in spec.tokens:
        if rule.token not in kept and rule.token not in appended:
            appended[rule.token] = _rule_token(rule, inputs, notes)
    # A token that the source lacks a row for and another input has comes back under a new id.
    lost = removed - inputs.ids[source].keys() - appended.keys()
    if lost:
        shown = ", ".join(map(repr, sorted(lost)[:3]))
        notes.append(
            f"{len(lost):,} tokens of {inputs.names[source]} ({shown}{', …' if len(lost) > 3 else ''}) have no row in "
            f"its embedding of {inputs.rows[source]:,} rows: the output's tokenizer lacks them"
        )
    start = max(kept.values(), default=-1) + 1
    tokenizer = OutputTokenizer(vocabulary, {token: start + i for i, token in enumerate(appended.values())}, removed)
    if not tokenizer.copied:
        check_editable(vocabulary, inputs.names[source], "adding or removing tokens")
    return tokenizer


def _common(inputs: _Inputs, source: int, notes: list[str]) -> Mapping[str, int]:
    """The tokens of the source that every input has.

    Raises:
        IncompatibleModels: There are none.
    """
    kept = {token: i for token, i in inputs.ids[source].items() if all(token in ids for ids in inputs.ids)}
    if not kept:
        raise IncompatibleModels(
            f"the vocabularies of {' and '.join(inputs.names)} have no token in common",
            where=inputs.where,
            hint="`tokens: union` keeps all tokens of all models",
        )
    gone = len(inputs.ids[source]) - len(kept)
    if gone:
        notes.append(
            f"{gone:,} tokens of {inputs.names[source]} that not every model has are taken out of its tokenizer; the ids of "
            "the others stay"
        )
    return kept


def _append_others(inputs: _Inputs, source: int, appended: dict[str, AddedToken], notes: list[str]) -> None:
    """All models' ordinary tokens in the order of models and ids, then their added tokens."""
    have = inputs.ids[source]
    others = [k for k in range(len(inputs.names)) if k != source]
    added: dict[str, AddedToken] = {}
    for k in reversed(others):
        added.update(inputs.vocabularies[k].added)  # the first model's switches count
    missing: list[str] = []
    for k in others:
        known = inputs.ids[k]
        missing += sorted((token for token in known if token not in have), key=known.__getitem__)
    appended.update((token, AddedToken(token)) for token in missing if token not in added)
    ordinary = len(appended)
    appended.update((token, added[token]) for token in missing if token in added)
    if ordinary:
        notes.append(
            f"{ordinary:,} ordinary tokens of other models are appended to the tokenizer of {inputs.names[source]} as "
            "added tokens: they are matched literally, before its own segmentation"
        )


def _rule_token(rule: TokenRule, inputs: _Inputs, notes: list[str]) -> AddedToken:
    """The token that a rule adds to the output's vocabulary.

    Raises:
        RecipeError: The rule takes the row from the token itself, and no input has it.
    """
    for vocabulary, known in zip(inputs.vocabularies, inputs.ids, strict=True):
        if rule.token in known:
            return vocabulary.added.get(rule.token, AddedToken(rule.token))
    # Only added tokens are suggested: comparing with 151k ordinary ones would take seconds.
    hint = did_you_mean(rule.token, set[str]().union(*(vocabulary.added for vocabulary in inputs.vocabularies)))
    if rule.kind == "model":
        _refuse_rule(rule, "no input has this token", hint)
    for vocabulary in inputs.vocabularies:
        if rule.token in vocabulary.added:  # known to a tokenizer, but without a row: keep its switches
            return vocabulary.added[rule.token]
    guess = f" ({hint})" if hint and hint.startswith("did you mean") else ""
    notes.append(f"the token {rule.token!r} is in no input's tokenizer: its rule adds it as a new token{guess}")
    return AddedToken(rule.token)


def _rule_source(rule: TokenRule, inputs: _Inputs) -> tuple[int, int]:
    """(model index or ZERO, its row) that the rule asks for.

    Raises:
        RecipeError: The model is not an input, lacks the token, or has no such row.
    """
    if rule.kind == "zero":
        return ZERO, -1
    model = inputs.merged(rule.model, f"the rule for the token {rule.token!r}", str(rule.where))
    token = rule.token if rule.kind == "model" else rule.source_token
    if token is not None:
        row = inputs.ids[model].get(token)
        if row is None:
            what = f"{inputs.names[model]} has no row for the token {token!r}"
            _refuse_rule(rule, what, did_you_mean(token, inputs.vocabularies[model].added))
        return model, row
    index = rule.source_token_id
    if index is None or not 0 <= index < inputs.rows[model]:
        _refuse_rule(
            rule,
            f"token_id {index} is out of range: the embedding of {inputs.names[model]} has rows 0 to "
            f"{inputs.rows[model] - 1:,}",
            None,
        )
    return model, index


def _refuse_rule(rule: TokenRule, what: str, hint: str | None) -> NoReturn:
    raise RecipeError(
        f"the rule for the token {rule.token!r} cannot be followed: {what}", where=str(rule.where), hint=hint
    )


def _padded(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _fallback(
    spec: TokenizerSpec, inputs: _Inputs, owned: IntArray, base_index: int | None, source: int
) -> tuple[IntArray, IntArray]:
    """For every output row what models without the token use, as the policy's ``missing`` says; see `_default_fallback`.

    Raises:
        RecipeError: It names a model that is not merged.
        IncompatibleModels: ``omp`` has no shared tokens to make sums of.
    """
    inside = owned[: inputs.inside]
    fallback, row = _default_fallback(inside, None if spec.missing == "average" else base_index)
    known: NDArray[np.bool_] = np.any(owned >= 0, axis=0)
    if spec.missing in ("mean", "zero"):
        fallback[known], row[known] = (PAD if spec.missing == "mean" else ZERO), -1
    elif spec.missing == "omp":
        donor = (owned >= 0).argmax(axis=0)
        for first in (base_index, source):
            if first is not None:
                donor[owned[first] >= 0] = first
        fallback[known] = OMP - donor[known]
        row[known] = np.take_along_axis(owned, donor[None], axis=0)[0][known]
        _check_anchors(inputs, owned, donor, known)
    elif not isinstance(spec.missing, str):
        model = inputs.merged(spec.missing, "`missing: copy`", inputs.where)
        has = owned[model] >= 0
        fallback[has], row[has] = model, owned[model][has]
    return fallback, row


def _check_anchors(inputs: _Inputs, owned: IntArray, donor: IntArray, known: NDArray[np.bool_]) -> None:
    for k in range(inputs.inside):
        lacking = known & (owned[k] < 0)
        for j in np.unique(donor[lacking]).tolist():
            if not ((owned[k] >= 0) & (owned[j] >= 0)).any():
                raise IncompatibleModels(
                    f"{inputs.names[k]} and {inputs.names[j]} share no token of the output, from which sums could be made",
                    where=inputs.where,
                    hint="`missing: mean` needs none",
                )


def _default_fallback(owned: IntArray, base_index: int | None) -> tuple[IntArray, IntArray]:
    """For every output row the (model, its row) that models without the token use, or MEAN or PAD.

    Args:
        owned: Shape (models, rows): each model's own row, -1 where it lacks the token.
    """
    has = owned >= 0
    owners = has.sum(axis=0)
    fallback = np.where(owners == 1, has.argmax(axis=0), MEAN)
    fallback[owners == 0] = PAD
    if base_index is not None:
        fallback[has[base_index]] = base_index
    row = np.take_along_axis(owned, np.maximum(fallback, 0)[None], axis=0)[0]
    row[fallback < 0] = -1
    return fallback.astype(np.int64), row


def _is_identity(own: IntArray, rows: Sequence[int]) -> bool:
    size = own.shape[1]
    return all(count == size for count in rows) and bool((own == np.arange(size)).all())


def _note_lengths(notes: list[str], inputs: _Inputs, length: int, size: int, keep: bool) -> None:
    if keep and size > length:
        notes.append(
            f"all inputs have the same vocabulary of {length:,} ids and {size:,} embedding rows: the {size - length:,} "
            "rows beyond the tokenizer are kept"
        )
        return
    merged = zip(inputs.names, inputs.vocabularies, inputs.rows, strict=True)
    for name, vocabulary, rows in islice(merged, inputs.inside):
        if rows > vocabulary.size:
            notes.append(
                f"{name}: the {rows - vocabulary.size:,} embedding rows beyond its tokenizer's {vocabulary.size:,} ids "
                f"are cut (the output has {size:,} rows; `pad_to_multiple_of` adds padding)"
            )
        elif rows < vocabulary.size:
            notes.append(
                f"{name}: its tokenizer has {vocabulary.size:,} ids, its embedding only {rows:,} rows: the ids beyond "
                "count as missing in it"
            )
    if size > length:
        notes.append(f"{size - length:,} padding rows are added: each is the mean of the model's other rows")


def _frozen(array: NDArray[Any]) -> IntArray:
    array.flags.writeable = False
    return array
