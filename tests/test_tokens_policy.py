"""geomerge.tokens.policy and rows: row plans against a slow per-token reference, and every refusal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomerge.errors import IncompatibleModels, RecipeError
from geomerge.recipe.values import ModelRef, TokenizerSpec, Where
from geomerge.tokens.policy import build
from geomerge.tokens.rows import MEAN, PAD, ZERO, TokenPlan
from geomerge.tokens.vocabulary import AddedToken, Vocabulary
from token_samples import ENGLISH, GERMAN, bpe, load, rule, save, spec, special, wordpiece

Inputs = list[tuple[ModelRef, Vocabulary | None, int]]


def vocabulary(ids: dict[str, int], *added: str, kind: str = "BPE") -> Vocabulary:
    """A vocabulary that no file holds."""
    tokens = {token: AddedToken(token, special=token.startswith("<")) for token in added}
    return Vocabulary(Path("nowhere"), kind, ids, tokens, max(ids.values()) + 1)


def words(text: str, *added: str, kind: str = "BPE") -> Vocabulary:
    """Ids in the order of the words."""
    return vocabulary({token: index for index, token in enumerate(text.split())}, *added, kind=kind)


def inputs(*vocabularies: Vocabulary, rows: list[int] | None = None) -> Inputs:
    """Models m0, m1, …"""
    counts = rows or [v.size for v in vocabularies]
    return [(ModelRef(f"m{k}"), v, count) for k, (v, count) in enumerate(zip(vocabularies, counts))]


def matrices(models: Inputs) -> list[np.ndarray]:
    """A distinct random matrix per model."""
    return [np.random.default_rng(k).standard_normal((rows, 3)) for k, (_, _, rows) in enumerate(models)]


def slow(
    policy: TokenizerSpec, models: Inputs, base: int | None, plan: TokenPlan, weights: list[np.ndarray], k: int
) -> np.ndarray:
    """The re-indexed matrix of model k, token by token, straight from the specification."""
    known = [{t: i for t, i in v.ids.items() if i < rows} for _, v, rows in models]
    rules = {r.token: r for r in policy.tokens}
    index = {str(ref): i for i, (ref, _, _) in enumerate(models)}
    out = np.full((plan.size, weights[0].shape[1]), np.nan)
    for row, token in enumerate(plan.names):
        if token is None:
            continue
        r = rules.get(token)
        owners = [j for j in range(len(models)) if token in known[j]]
        if k in owners and not (r and r.force):
            out[row] = weights[k][known[k][token]]
        elif r and r.kind == "zero":
            out[row] = 0
        elif r and r.kind == "model":
            j = index[str(r.model)]
            out[row] = weights[j][known[j][token]]
        elif r:
            j = index[str(r.model)]
            source = known[j][r.source_token] if r.source_token is not None else r.source_token_id
            out[row] = weights[j][source]
        elif base is not None and base in owners:
            out[row] = weights[base][known[base][token]]
        else:
            out[row] = sum(weights[j][known[j][token]] for j in owners) / len(owners)
    nameless = np.isnan(out[:, 0])
    out[nameless] = out[~nameless].mean(axis=0)
    return out


def check_against_slow(policy: TokenizerSpec, models: Inputs, base: int | None) -> TokenPlan:
    """Compare every model's matrix; tiles and runs must give the same."""
    plan = build(policy, models, base, cut_padding=True)
    weights = matrices(models)
    for k in range(len(models)):
        rows = plan.rows_for(k)
        expected = slow(policy, models, base, plan, weights, k)
        np.testing.assert_allclose(rows.apply(weights), expected, rtol=1e-14)
        for start, stop, source, first in rows.runs():
            if source >= 0:
                np.testing.assert_array_equal(weights[source][first : first + stop - start], expected[start:stop])
        assert rows.runs()[:, 1].tolist() == [*rows.runs()[1:, 0].tolist(), plan.size]
        if not rows.needs_pad:
            tiles = [rows.tile(at, at + 2).apply(weights) for at in range(0, plan.size, 2)]
            np.testing.assert_array_equal(np.concatenate(tiles), rows.apply(weights))
    return plan


TOKENS = list("abcdefgh")
id_maps = st.lists(st.sampled_from(TOKENS), min_size=1, unique=True).flatmap(
    lambda tokens: st.lists(st.integers(0, 11), min_size=len(tokens), max_size=len(tokens), unique=True).map(
        lambda ids: dict(zip(tokens, ids))
    )
)


@settings(deadline=None, max_examples=150)
@given(
    maps=st.lists(id_maps, min_size=1, max_size=3),
    extra=st.integers(0, 3),
    source=st.sampled_from(["union", "base", "m0"]),
    base=st.booleans(),
    pad=st.sampled_from([None, 4]),
    data=st.data(),
)
def test_plans_equal_the_slow_reference(
    maps: list[dict[str, int]], extra: int, source: str, base: bool, pad: int | None, data: Any
) -> None:
    """Any vocabularies with holes, any padding, any rules: fast and slow agree for every model."""
    vocabularies = [vocabulary(ids) for ids in maps]
    models = inputs(*vocabularies, rows=[v.size + extra for v in vocabularies])
    base_index = len(models) - 1 if base or source == "base" else None
    available = sorted(set().union(*maps) if source == "union" else maps[base_index if source == "base" else 0])
    rules = []
    for token in data.draw(st.lists(st.sampled_from(available), unique=True, max_size=3)):
        kind = data.draw(st.sampled_from(["zero", "model", "token", "id"]))
        force = data.draw(st.booleans())
        owner = data.draw(st.sampled_from([k for k, ids in enumerate(maps) if token in ids]))
        if kind == "zero":
            rules.append(rule(token, "zero", force=force))
        elif kind == "model":
            rules.append(rule(token, "model", f"m{owner}", force=force))
        elif kind == "token":
            other = data.draw(st.sampled_from(sorted(maps[owner])))
            rules.append(rule(token, "model_token", f"m{owner}", source_token=other, force=force))
        else:
            row = data.draw(st.integers(0, models[owner][2] - 1))
            rules.append(rule(token, "model_token", f"m{owner}", source_token_id=row, force=force))
    check_against_slow(spec(source, *rules, pad=pad), models, base_index)


def test_missing_tokens_base_then_owner_then_mean() -> None:
    """The three fallbacks, by hand."""
    models = inputs(words("a b"), words("b c d"), words("d c e"))
    plan = build(spec("union"), models, 0)
    assert plan.names == ("a", "b", "c", "d", "e")
    assert plan.row_maps.tolist() == [[0, 1, -1, -1, -1], [-1, 0, 1, 2, -1], [-1, -1, 1, 0, 2]]
    assert plan.fallback.tolist() == [0, 0, MEAN, MEAN, 2]
    assert plan.fallback_row.tolist() == [0, 1, -1, -1, 2]
    assert plan.rows_for(0).donors == (0, 1, 2)
    assert plan.rows_for(1).donors == (0, 1, 2)
    assert plan.counts()["m0"] == {"own": 2, "borrowed": 1, "mean": 2, "zero": 0, "sum": 0, "padding": 0}
    weights = matrices(models)
    expected = (weights[1][1] + weights[2][1]) / 2
    np.testing.assert_allclose(plan.rows_for(0).apply(weights)[2], expected, rtol=1e-15)


def test_without_base_the_first_model_only_gives_the_ids() -> None:
    """A union without base starts with the first tokenizer, but its rows have no precedence."""
    plan = build(spec("union"), inputs(words("a b"), words("b a"), words("c")), None)
    assert plan.names == ("a", "b", "c")
    assert plan.fallback.tolist() == [MEAN, MEAN, 2]


def test_union_appends_ordinary_tokens_before_added_ones() -> None:
    """All models' ordinary tokens in order, then all models' added tokens with their flags."""
    models = inputs(words("a <p>", "<p>"), words("<q> b a", "<q>"), words("<r> c <q>", "<r>"))
    plan = build(spec("union"), models, None)
    assert plan.names == ("a", "<p>", "b", "c", "<q>", "<r>")
    assert [token.special for token in plan.tokenizer.appended] == [False, False, True, True]
    assert any("2 ordinary tokens" in note for note in plan.notes)


def test_means_are_float64() -> None:
    """The mean of float16 rows does not overflow or lose bits on the way."""
    models = inputs(words("x"), words("t"), words("t"))
    weights = [np.full((1, 2), value, np.float16) for value in (0, 60000, 50016)]
    out = build(spec("union"), models, None).rows_for(0).apply(weights)
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out[1], np.float16(55008))


def test_force_uses_the_rule_for_models_that_have_the_token() -> None:
    """Without force an owner keeps its row; other tokens are untouched; means still see the owners' rows."""
    models = inputs(words("a b"), words("b a"))
    weak = check_against_slow(spec("base", rule("a", "model", "m1")), models, 0)
    assert weak.row_maps[:, 0].tolist() == [0, 1]
    forced = check_against_slow(spec("base", rule("a", "model", "m1", force=True)), models, 0)
    assert forced.rows_for(0).source.tolist() == [1, 0]
    assert forced.rows_for(0).row.tolist() == [1, 1]
    zero = check_against_slow(spec("base", rule("a", "zero", force=True)), models, 0)
    assert zero.rows_for(1).source.tolist() == [ZERO, 1]


def test_rules_add_tokens_to_the_output() -> None:
    """A token that the source lacks is appended, with another input's flags, or as a new token with a note."""
    models = inputs(words("a b"), words("a <q>", "<q>"))
    plan = check_against_slow(spec("base", rule("<q>", "model", "m1")), models, 0)
    assert plan.names == ("a", "b", "<q>")
    assert [token.special for token in plan.tokenizer.appended] == [True]
    new = check_against_slow(spec("base", rule("<qq>", "model_token", "m0", source_token="b")), models, 0)
    assert new.names == ("a", "b", "<qq>")
    assert any("<qq>" in note and "'<q>'" in note for note in new.notes)


def test_identical_inputs_are_the_identity_and_keep_their_padding() -> None:
    """Nothing is re-indexed; the padding rows stay unless they are to be cut."""
    a = words("a b <p>", "<p>")
    models = inputs(a, words("a b <p>", "<p>"), rows=[8, 8])
    for source in ("base", "union", "m1"):
        plan = build(spec(source), models, 0)
        assert (plan.identity, plan.size) == (True, 8)
        assert plan.rows_for(1).runs().tolist() == [[0, 8, 1, 0]]
        assert any("5 rows beyond the tokenizer are kept" in note for note in plan.notes)
    cut = build(spec("base"), models, 0, cut_padding=True)
    assert (cut.identity, cut.size) == (False, 3)
    assert build(spec("base"), inputs(a, a), 0, cut_padding=True).identity


def test_padding_of_inputs_that_differ_is_cut_with_a_note() -> None:
    """Qwen's case: more rows than tokens."""
    plan = build(spec("base"), inputs(words("a b c"), words("a b d"), rows=[5, 3]), 0)
    assert plan.size == 3
    assert not plan.identity
    assert any(note.startswith("m0: the 2 embedding rows beyond") for note in plan.notes)


def test_pad_to_multiple_of_adds_mean_rows() -> None:
    """Padding rows are the mean of the model's re-indexed rows, also where the inputs agree."""
    models = inputs(words("a b c"), words("a b c"))
    plan = check_against_slow(spec("base", pad=4), models, 0)
    assert plan.size == 4
    assert plan.rows_for(0).source.tolist() == [0, 0, 0, PAD]
    assert plan.rows_for(0).needs_pad
    assert build(spec("base", pad=3), models, 0).identity


def test_tokens_beyond_the_embedding_count_as_missing() -> None:
    """A tokenizer longer than its embedding: the token is removed, or comes back where another input has a row."""
    short, full = words("a b <p>", "<p>"), words("a <p>", "<p>")
    alone = check_against_slow(spec("base"), inputs(short, full, rows=[2, 2]), 0)
    assert alone.names == ("a", "b")
    assert alone.tokenizer.lost == {"<p>"}
    assert any("have no row" in note for note in alone.notes)
    union = check_against_slow(spec("union"), inputs(short, full, rows=[2, 2]), 0)
    assert union.names == ("a", "b", "<p>")
    assert union.tokenizer.lost == frozenset()


def test_151k_tokens_take_under_a_second() -> None:
    """A union with per-token rules of three Qwen-sized vocabularies."""
    ids = {f"Ġtoken{index}": index for index in range(151_000)}
    other = {token: len(ids) - 1 - index for token, index in ids.items()}
    other |= {f"other{index}": 151_000 + index for index in range(665)}
    models = inputs(vocabulary(ids), vocabulary(other), vocabulary(dict(ids)), rows=[151_936, 152_064, 151_000])
    policy = spec("union", rule("Ġtoken5", "model", "m1", force=True), pad=128)
    start = time.thread_time()
    plan = build(policy, models, 0)
    parts = [plan.rows_for(k) for k in range(3)]
    assert time.thread_time() - start < 1
    assert plan.size == 151_680
    assert parts[1].row[:2].tolist() == [150_999, 150_998]


@pytest.mark.parametrize(
    ("policy", "error", "says"),
    [
        (spec("base", rule("zz", "model", "m1")), RecipeError, "no input has this token"),
        (spec("base", rule("d", "model", "m0")), RecipeError, "m0 has no row for the token 'd'"),
        (spec("base", rule("a", "model", "m7")), RecipeError, "'m7', which is not an input"),
        (spec("base", rule("a", "model_token", "m1", source_token="zz")), RecipeError, "no row for the token 'zz'"),
        (spec("base", rule("a", "model_token", "m1", source_token_id=3)), RecipeError, "token_id 3 is out of range"),
        (spec("base", rule("a", "model_token", "m1", source_token_id=-1)), RecipeError, "token_id -1 is out of range"),
        (spec("m9"), RecipeError, "the tokenizer source names the model 'm9'"),
        (spec("unoin"), RecipeError, r"'unoin'[\s\S]*did you mean 'union'"),
        (spec("base", pad=0), RecipeError, "positive"),
    ],
)
def test_wrong_policies_are_refused(policy: TokenizerSpec, error: type[Exception], says: str) -> None:
    """Unknown tokens, models and rows are named."""
    with pytest.raises(error, match=says):
        build(policy, inputs(words("a b c"), words("a b d")), 0)


def test_refusals_name_the_line_and_a_likely_token() -> None:
    """The rule's own place in the recipe, and the token that was meant."""
    place = Where("recipe.yml", 12)
    policy = spec("base", rule("<|im_strat|>", "model", "m0", where=place))
    with pytest.raises(RecipeError) as caught:
        build(policy, inputs(words("a <|im_start|>", "<|im_start|>")), 0)
    assert caught.value.where == "recipe.yml:12"
    assert "'<|im_start|>'" in str(caught.value)


def test_base_without_a_base_model_is_refused() -> None:
    """`base` needs one."""
    with pytest.raises(RecipeError, match="no base model"):
        build(spec("base"), inputs(words("a")), None)


def test_a_model_without_tokenizer_is_refused() -> None:
    """The model is named and the way out is given."""
    with pytest.raises(IncompatibleModels, match="tokenizer files") as caught:
        build(spec("union"), [(ModelRef("x"), words("a"), 1), (ModelRef("org/y"), None, 1)], None)
    assert caught.value.where == "org/y"
    assert caught.value.hint


def test_only_bpe_can_lose_ordinary_tokens(tmp_path: Path) -> None:
    """A WordPiece embedding without rows for ordinary tokens is refused; a BPE one is cut."""
    words_model = load(save(tmp_path / "w", wordpiece(ENGLISH, 60)))
    with pytest.raises(IncompatibleModels, match="WordPiece tokenizer cannot lose tokens"):
        build(spec("base"), inputs(words_model, rows=[50]), 0)
    assert build(spec("base"), inputs(load(save(tmp_path / "b", bpe(ENGLISH, 280))), rows=[270]), 0).size == 270


def test_binary_tokenizers_only_when_all_agree(tmp_path: Path) -> None:
    """SentencePiece files are copied for equal inputs, and refused where ids are needed."""
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    a, b, c = (load(tmp_path / name) for name in "abc")
    plan = build(spec("base"), inputs(a, b, rows=[7, 7]), 0)
    assert (plan.identity, plan.size) == (True, 7)
    assert plan.tokenizer.copied
    for policy, models in (
        (spec("union"), inputs(a, b, rows=[7, 7])),
        (spec("base"), inputs(a, c, rows=[7, 7])),
        (spec("base"), inputs(a, b, rows=[7, 8])),
        (spec("base"), inputs(a, words("a"), rows=[7, 7])),
        (spec("base", pad=8), inputs(a, b, rows=[7, 7])),
        (spec("base", rule("x", "zero")), inputs(a, b, rows=[7, 7])),
    ):
        with pytest.raises(IncompatibleModels, match="binary tokenizer"):
            build(policy, models, 0)


def test_plain_vocabularies_cannot_be_extended() -> None:
    """vocab.txt alone can be copied, not edited."""
    models = inputs(words("a b", kind="plain"), words("a c"))
    assert build(spec("base"), models, 0).names == ("a", "b")
    with pytest.raises(IncompatibleModels, match=r"no tokenizer\.json"):
        build(spec("union"), models, 0)


def test_real_tokenizers_of_two_languages(tmp_path: Path) -> None:
    """Trained tokenizers from files, under every source."""
    a = load(save(tmp_path / "a", bpe(ENGLISH, 290, special("<|end|>"))))
    b = load(save(tmp_path / "b", bpe(GERMAN, 300, special("<|im_start|>"), special("<|end|>"))))
    models = inputs(a, b, rows=[a.size + 5, b.size])
    for source in ("union", "base", "m1"):
        check_against_slow(spec(source), models, 0)


def test_plans_cannot_be_changed() -> None:
    """The arrays of a plan are read-only: threads share them."""
    plan = build(spec("union"), inputs(words("a"), words("b")), None)
    with pytest.raises(ValueError, match="read-only"):
        plan.row_maps[0, 0] = 5


def test_intersection_keeps_what_all_have() -> None:
    """The source's tokens less those that another lacks; kept ids stay, and every kept row is each model's own."""
    models = inputs(words("a b c d"), words("d x a c"))
    plan = build(spec("intersection"), models, 0)
    assert [n for n in plan.names if n is not None] == ["a", "c", "d"]
    for k, model in enumerate((("a", "b", "c", "d"), ("d", "x", "a", "c"))):
        rows = plan.rows_for(k)
        for row, name in enumerate(plan.names):
            if name is not None:
                assert (rows.source[row], rows.row[row]) == (k, model.index(name))
    assert any("not every model has" in note for note in plan.notes)


def test_intersection_of_equals_is_the_identity() -> None:
    models = inputs(words("a b c"), words("a b c"))
    plan = build(spec("intersection"), models, 0)
    assert plan.names == ("a", "b", "c")
    assert plan.rows_for(1).row.tolist() == [0, 1, 2]


def test_disjoint_vocabularies_have_no_intersection() -> None:
    with pytest.raises(IncompatibleModels, match="no token in common"):
        build(spec("intersection"), inputs(words("a b"), words("x y")), 0)
