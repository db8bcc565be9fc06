"""Parameters of single tensors: gradients, filters, precedence, filters that match nothing, and speed."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomerge.anatomy import Part
from geomerge.errors import RecipeError
from geomerge.recipe import (
    Entry,
    Filter,
    Lookup,
    Recipe,
    Setting,
    Where,
    check_filters,
    layer_t,
    loads,
    resolve_parameter,
    scopes,
    unused_entries,
)


def part(name: str, role: str = "other", block: int | None = None) -> Part:
    """A tensor."""
    return Part(name=name, role=role, module="", block=block, depth=None, position="pre" if block is None else "block")


MLP = part("model.layers.2.mlp.up_proj.weight", "mlp", 2)
ATTENTION = part("model.layers.2.self_attn.q_proj.weight", "attention", 2)
EMBEDDING = part("model.embed_tokens.weight", "embedding")
PARTS = (EMBEDDING, ATTENTION, MLP)


def setting(*entries: tuple[Filter | None, object]) -> Setting:
    """A setting whose entries stand on lines 1, 2, …"""
    return Setting(tuple(Entry(f, v, Where("r.yml", i)) for i, (f, v) in enumerate(entries, 1)))  # type: ignore[arg-type]


class TestGradients:
    """Values over the depth of a slice."""

    @pytest.mark.parametrize(
        ("anchors", "t", "value"),
        [
            ((0.5,), 0.3, 0.5),
            ((0, 1), 0.0, 0),
            ((0, 1), 0.25, 0.25),
            ((0, 1), 1.0, 1),
            ((1, 2, 4), 0.5, 2),
            ((1, 2, 4), 0.24, 1.48),
            ((1, 2, 4), 0.76, 3.04),
            ((0, 0.5, 0.3, 0.7, 1), 0.75, 0.7),
            ((0, 0.5, 0.3, 0.7, 1), 0.875, 0.85),
            ((True, False), 0.99, True),
            ((True, False), 1.0, False),
            (("a", "b", "c"), 0.49, "a"),
            (("a", "b", "c"), 0.5, "b"),
            ((0.0, True), 0.7, 0.0),
            ((0, 1), -1.0, 0),
            ((0, 1), 2.0, 1),
        ],
    )
    def test_by_hand(self, anchors: tuple[float, ...], t: float, value: object) -> None:
        """Numbers interpolate linearly between anchors, words and truth values step (all as mergekit 0.1.5 does)."""
        found = Entry(None, anchors).at(t)
        assert found == (pytest.approx(value, abs=1e-15) if isinstance(value, float) else value)

    def test_scalar_ignores_depth(self) -> None:
        """One value is the same at every depth."""
        assert {Entry(None, 0.3).at(t) for t in (0.0, 0.5, 1.0)} == {0.3}

    @given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0, 1))
    def test_between_neighbours(self, anchors: list[float], t: float) -> None:
        """The value lies between its two anchors, and reversing the anchors reverses the depth."""
        value = Entry(None, tuple(anchors)).at(t)
        assert isinstance(value, float)
        low = min(int(t * (len(anchors) - 1)), len(anchors) - 1)
        near = anchors[low : low + 2]
        assert min(near) - 1e-12 <= value <= max(near) + 1e-12
        assert Entry(None, tuple(reversed(anchors))).at(1 - t) == pytest.approx(value, abs=1e-9)

    def test_layer_t(self) -> None:
        """Depth runs from 0 to 1 in a slice; a lone block has depth 1."""
        assert [layer_t(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
        assert layer_t(0, 1) == 1


class TestPrecedence:
    """Which entry of which scope counts."""

    def test_first_match_wins(self) -> None:
        """Entries are tried in order; without a match there is no value."""
        chosen = setting((Filter("self_attn"), 1), (Filter("layers"), 2), (Filter("mlp"), 3))
        assert [chosen.value_for(p, 0) for p in PARTS] == [None, 1, 2]

    def test_scopes_fall_through(self) -> None:
        """A scope without a matching entry leaves the tensor to the next one."""
        inner = {"t": setting((Filter("mlp"), 1))}
        outer = {"t": setting((None, 7)), "other": setting((None, 8))}
        found = [resolve_parameter("t", p, 0.5, (inner, {}, outer)) for p in PARTS]
        assert [f.value for f in found if f] == [7, 7, 1]
        assert found[2] is not None
        assert found[2].entry is inner["t"].entries[0]
        assert resolve_parameter("absent", MLP, 0, (inner, outer)) is None

    def test_all_scopes_of_a_recipe(self) -> None:
        """source → slice → module → recipe, checked by taking them away one by one."""
        lines = {
            "source": "sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}]",
            "slice": "parameters: {weight: 2}",
            "module": "parameters: {weight: 3}",
            "recipe": "parameters: {weight: 4}",
        }
        for missing, expected in (
            ((), 1),
            (("source",), 2),
            (("source", "slice"), 3),
            (("source", "slice", "module"), 4),
        ):
            said = {k: v.replace("weight", "density") if k in missing else v for k, v in lines.items()}
            recipe = loads(
                f"merge_method: ties\nbase_model: b\n{said['recipe']}\nmodules:\n  m:\n    {said['module']}\n"
                f"    slices:\n    - {said['slice']}\n      {said['source']}\n"
            ).output
            (module,) = recipe.modules
            (each,) = module.slices
            found = resolve_parameter("weight", MLP, 0, scopes(recipe, module, each, each.sources[0]))
            assert found is not None
            assert found.value == expected
        shared = scopes(recipe, module, each)
        assert len(shared) == 3

    @given(st.data())
    def test_lookup_is_resolve_parameter(self, data: st.DataObject) -> None:
        """A prepared lookup gives what the plain function gives, for any scopes, tensors and depths."""
        filters = st.sampled_from([None, Filter("mlp"), Filter("*"), Filter(role="attention"), Filter(blocks=(2, 2))])
        value = st.one_of(st.floats(0, 1), st.tuples(st.floats(0, 1), st.floats(0, 1)), st.booleans())
        entries = st.lists(st.tuples(filters, value), min_size=1, max_size=3).map(lambda e: setting(*e))
        drawn = data.draw(st.lists(st.dictionaries(st.sampled_from(["t", "u"]), entries), max_size=3))
        used: set[int] = set()
        lookup = Lookup("t", drawn, used)
        asked = data.draw(st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from([0.0, 0.25, 1.0]))))
        expected = [resolve_parameter("t", p, t, drawn) for p, t in asked]
        assert [lookup.at(p, t) for p, t in asked] == expected
        deciding = {id(e.entry) for e in expected if e}
        assert deciding == used or lookup.constant is not None
        assert lookup.absent == all("t" not in scope for scope in drawn)

    def test_constants_are_known_beforehand(self) -> None:
        """A plain value needs no tensor; an equal answer is one object."""
        lookup = Lookup("t", [{}, {"t": setting((None, 0.3))}])
        assert lookup.constant is not None
        assert lookup.constant.value == 0.3
        assert Lookup("t", [{"t": setting((None, (0, 1)))}]).constant is None
        assert Lookup("t", [{"t": setting((Filter("mlp"), 1), (None, 2))}]).constant is None
        gradient = Lookup("t", [{"t": setting((Filter("*"), (0, 1)))}])
        assert gradient.at(MLP, 0.5) is gradient.at(ATTENTION, 0.5)


RECIPE = """\
merge_method: slerp
base_model: a
models: [{model: b}]
parameters:
  t:
    - filter: layers
      value: 0.1
    - filter: mlp
      value: 0.2
    - filter: mpl
      value: 0.3
    - filter: "*"
      value: 0.4
steps:
  - scale: [{filter: nowhere, value: 2}]
"""


class TestUnused:
    """Filters that decide nothing."""

    def resolved(self, text: str) -> tuple[Recipe, set[int]]:
        """A recipe whose parameters have been looked up for all tensors."""
        recipe = loads(text, "r.yml").output
        used: set[int] = set()
        for name, several in (("t", [recipe.parameters]), ("value", [step.parameters for step in recipe.steps])):
            lookup = Lookup(name, several, used)
            for each in PARTS:
                lookup.at(each, 0.0)
        return recipe, used

    def test_unused_entries(self) -> None:
        """Entries that decided nothing are known by identity, those of steps included."""
        recipe, used = self.resolved(RECIPE)
        found = unused_entries(recipe, used)
        assert [(u.parameter, str(u.entry.filter), u.entry.where.line) for u in found] == [
            ("t", "filter: mlp", 8),
            ("t", "filter: mpl", 10),
            ("value", "filter: nowhere", 15),
        ]

    def test_filter_that_matches_nothing_is_refused(self) -> None:
        """The first filter without any tensor is an error with its line; one that comes too late is not."""
        recipe, used = self.resolved(RECIPE)
        with pytest.raises(RecipeError) as caught:
            check_filters(recipe, used, iter(PARTS))
        assert str(caught.value) == (
            "r.yml:10: 'filter: mpl' of 't' matches no tensor\n"
            "  for example 'model.layers.2.self_attn.q_proj.weight' is a tensor's name"
        )

    @pytest.mark.parametrize("condition", ["filter: lm_head", "role: head"])
    def test_a_tied_head_goes_by_another_name(self, condition: str) -> None:
        recipe, used = self.resolved(
            f"merge_method: slerp\nmodels: [{{model: b}}]\nparameters: {{t: [{{{condition}, value: 1}}, {{value: 2}}]}}"
        )
        with pytest.raises(RecipeError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
            check_filters(recipe, used, PARTS, {"lm_head.weight": "model.embed_tokens.weight"})

    def test_under_compat_it_is_a_note(self) -> None:
        """mergekit's profile only tells."""
        recipe, used = self.resolved(RECIPE + "compat: mergekit\n")
        assert check_filters(recipe, used, PARTS) == (
            "r.yml:8: 'filter: mlp' of 't' decides nothing: others come before it",
            "r.yml:10: 'filter: mpl' of 't' matches no tensor",
            "r.yml:15: 'filter: nowhere' of 'value' matches no tensor",
        )

    def test_nothing_to_say(self) -> None:
        """Entries without a filter are never reported."""
        recipe, used = self.resolved(
            "merge_method: slerp\nmodels: [{model: b}]\nparameters: {t: [{value: 1}, {value: 2}]}"
        )
        assert check_filters(recipe, used, PARTS) == ()


def test_hundred_thousand_tensors() -> None:
    """Resolving is linear and cheap: 100,000 tensors, three models, three parameters each."""
    recipe = loads(
        """\
merge_method: breadcrumbs
base_model: b
models:
- model: a
  parameters:
    weight: 0.3
    density: [{filter: '*.attn.*', value: [0, 1]}, {filter: '/experts\\.\\d+7\\./', value: 0.5}]
- model: c
  parameters: {weight: [0.1, 0.2, 0.3], density: [{role: expert, block: 3-70, value: 0.3}, {value: 1}]}
- model: d
parameters: {weight: 0.2, density: 0.7, gamma: 0.01}
"""
    ).output
    (module,) = recipe.modules
    (each,) = module.slices
    parts = [
        part(f"model.layers.{block}.mlp.experts.{expert}.w1.weight", "expert", block)
        for block in range(100)
        for expert in range(1000)
    ]
    start = time.thread_time()
    lookups = [
        Lookup(name, scopes(recipe, module, each, source))
        for source in each.sources
        for name in ("weight", "density", "gamma")
    ]
    total = 0.0
    for p in parts:
        t = layer_t(p.block or 0, 100)
        for lookup in lookups:
            found = lookup.at(p, t)
            assert found is not None
            assert isinstance(found.value, int | float)
            total += found.value
    elapsed = time.thread_time() - start
    weight = 0.3 + 0.2 + 0.2
    # 99 experts of each block have two digits or more and end in 7; 68 of the 100 blocks lie in 3-70.
    density = (0.099 * 0.5 + 0.901 * 0.7) + (0.68 * 0.3 + 0.32 * 1) + 0.7
    assert total == pytest.approx(100_000 * (weight + density + 3 * 0.01))
    # About 0.3 s on a slow core; the bound only catches something quadratic.
    assert elapsed < 5
