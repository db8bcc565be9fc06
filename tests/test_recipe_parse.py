"""Recipes read from YAML: mergekit's whole grammar, geomerge's additions, and what is refused with which line."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from geomerge.errors import RecipeError, UsageError
from geomerge.recipe import Entry, Filter, ModelRef, Recipe, Setting, TokenRule, load, loads

GRADIENT_SLERP = """\
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""


def one(text: str, **options: str) -> Recipe:
    """The recipe of a text with one document."""
    return loads(dedent(text), "r.yml", **options).output


def linear(more: str = "", beside: str = "") -> str:
    """A recipe for `linear` with further top-level lines, and further lines beside its one model."""
    entry = "".join(f"    {line}\n" for line in dedent(beside).splitlines())
    return f"merge_method: linear\nmodels:\n  - model: a\n{entry}{dedent(more)}"


def refused(text: str, **options: str) -> str:
    """The message of the error that the text gives."""
    with pytest.raises(RecipeError) as caught:
        loads(dedent(text), "r.yml", **options)
    return str(caught.value)


def values(setting: Setting) -> list[object]:
    """A setting's values without filters and places."""
    return [entry.value for entry in setting.entries]


class TestStructure:
    """Models, slices, modules."""

    def test_gradient_slerp(self) -> None:
        """mergekit's gradient SLERP example comes out in full."""
        recipe = one(GRADIENT_SLERP)
        assert (recipe.method, recipe.dtype, recipe.base_model) == (
            "slerp",
            "float16",
            ModelRef("psmathur/orca_mini_v3_13b"),
        )
        (module,) = recipe.modules
        assert (module.name, dict(module.parameters)) == (None, {})
        (each,) = module.slices
        assert [(str(s.model), s.layer_range) for s in each.sources] == [
            ("psmathur/orca_mini_v3_13b", (0, 40)),
            ("garage-bAInd/Platypus2-13B", (0, 40)),
        ]
        assert [(e.filter, e.value, e.where.line) for e in recipe.parameters["t"].entries] == [
            (Filter("self_attn"), (0, 0.5, 0.3, 0.7, 1), 11),
            (Filter("mlp"), (1, 0.5, 0.7, 0.3, 0), 13),
            (None, 0.5, 15),
        ]
        assert recipe.notes == ()

    def test_models_make_one_slice_without_ranges(self) -> None:
        """`models` is one slice over all blocks; the base comes last among the models when it is not listed."""
        recipe = one("merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]\nbase_model: c")
        ((each,),) = (module.slices for module in recipe.modules)
        assert [source.layer_range for source in each.sources] == [None, None]
        assert each.sources[0].parameters["weight"].entries[0].value == 1
        assert [str(m) for m in recipe.models()] == ["a", "b", "c"]

    def test_models_are_distinct_and_include_the_bases_of_slices(self) -> None:
        """A model used in two slices counts once, and a slice's own base counts."""
        recipe = one("""\
            merge_method: task_arithmetic
            base_model: base
            slices:
              - sources: [{model: a, layer_range: [0, 2]}, {model: base, layer_range: [0, 2]}]
                base_model: other
                parameters: {weight: 0.5}
              - sources: [{model: a, layer_range: [2, 4]}]
            """)
        assert [str(m) for m in recipe.models()] == ["a", "base", "other"]
        first, second = recipe.slices()
        assert (first.base_model, second.base_model) == (ModelRef("other"), None)
        assert values(first.parameters["weight"]) == [0.5]

    def test_modules(self) -> None:
        """Each module has its own models or slices and parameters."""
        recipe = one("""\
            merge_method: linear
            modules:
              text:
                parameters: {weight: 0.3}
                models: [{model: a}, {model: b}]
              vision:
                slices: [{sources: [{model: a, layer_range: [0, 12]}]}]
            """)
        assert [(m.name, len(m.slices), m.where.line) for m in recipe.modules] == [("text", 1, 3), ("vision", 1, 6)]
        assert values(recipe.modules[0].parameters["weight"]) == [0.3]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("merge_method: linear", "exactly one of 'models', 'slices' and 'modules'"),
            (
                "merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
                "one",
            ),
            ("merge_method: linear\nmodels: [{model: a}]\nmodules: {x: {models: [{model: a}]}}", "exactly one"),
            (
                "merge_method: linear\nmodules: {x: {}}",
                "r.yml:2: the module 'x' has exactly one of 'models' and 'slices'",
            ),
            ("merge_method: linear\nmodules: {}", "r.yml:2: 'modules' is empty"),
            ("models: [{model: a}]", "r.yml:1: the recipe needs 'merge_method'"),
            ("merge_method: linear\nmodels: []", "r.yml:2: 'models' is empty"),
            ("merge_method: linear\nmodels: [a]", "r.yml:2: a model of 'models' must be a mapping, not 'a'"),
            ("merge_method: linear\nmodels:\n- parameters: {}", "r.yml:3: a model of 'models' needs 'model'"),
            ("merge_method: linear\nslices:\n- sources:\n  - model: a", "r.yml:4: a source needs 'layer_range'"),
            ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3]}]}]", "two whole numbers"),
            ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, yes]}]}]", "two whole numbers"),
            ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [-1, 3]}]}]", "two whole numbers"),
            ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [4, 3]}]}]", "ends before it starts"),
            ("merge_method: linear\nmodels: {model: a}", "'models' must be a list, not a mapping"),
        ],
    )
    def test_refused(self, text: str, message: str) -> None:
        """Structures that mean nothing are refused with the line."""
        assert message in refused(text)

    def test_sources_of_a_slice_have_equal_length(self) -> None:
        """The shorter source's line is given."""
        message = refused("""\
            merge_method: linear
            slices:
              - sources:
                  - model: a
                    layer_range: [0, 8]
                  - model: b
                    layer_range: [8, 15]
            """)
        assert message.startswith("r.yml:6: the sources of a slice have 8 and 7 blocks\n")

    def test_parameters_out_of_place(self) -> None:
        """The commonest mistake: beside a model, or at the top. mergekit takes no notice of it."""
        text = (
            "merge_method: ties\nbase_model: b\ndensity: 0.3\nmodels: [{model: a, weight: 1}]\nparameters: {weight: 1}"
        )
        said = refused(text)
        assert "the recipe has no key 'density'\n  it is a parameter: put it under `parameters:`" in said
        assert "a model of 'models' has no key 'weight'" in said
        assert any("'density'" in note for note in one(text + "\ncompat: mergekit").notes)

    def test_empty_layer_range(self) -> None:
        """A slice without blocks is allowed: people use it to choose where the head comes from."""
        recipe = one("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [32, 32]}]}]")
        assert next(recipe.slices()).sources[0].layer_range == (32, 32)

    def test_residual_weight_is_noted(self) -> None:
        """`residual_weight` is accepted, and a note says that it does nothing."""
        text = "merge_method: linear\nslices:\n- residual_weight: 0.5\n  sources: [{model: a, layer_range: [0, 1]}]"
        assert one(text).notes == ("r.yml:3: 'residual_weight' has no effect",)
        assert "must be a number" in refused(text.replace("0.5", "half"))

    def test_single_document_with_a_name(self) -> None:
        """A lone document may have a name."""
        assert one(linear("name: soup")).name == "soup"

    def test_file_paths_as_models(self) -> None:
        """mergekit-pytorch's form, where models are files, is the same grammar."""
        recipe = one(linear("base_model: ./dir/base.safetensors").replace("model: a", "model: ./dir/a.safetensors"))
        assert [m.path for m in recipe.models()] == ["./dir/a.safetensors", "./dir/base.safetensors"]


class TestParameters:
    """Values, gradients, filters, and the check of names against the method."""

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("0.5", 0.5),
            ("1", 1),
            ("-2", -2),
            ("1e-5", 1e-5),
            ('"1e-5"', 1e-5),
            ("'0.25'", 0.25),
            (".5", 0.5),
            ("+3.", 3.0),
            ("true", True),
            ("off", False),
            ("No", False),
            ("word", "word"),
            ("'true'", "true"),
            ("1.2.3", "1.2.3"),
            ("!!str yes", "yes"),
            ("[0, '1', 1e-3]", (0, 1, 1e-3)),
            ("[true, false]", (True, False)),
            ("[0.5]", (0.5,)),
        ],
    )
    def test_values(self, text: str, value: object) -> None:
        """Scalars are read as YAML 1.1 reads truth values and as people write numbers, quoted or not."""
        (entry,) = one(linear(f"parameters: {{weight: {text}}}")).parameters["weight"].entries
        assert entry.filter is None
        assert (entry.value, type(entry.value)) == (value, type(value))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "'weight' must be a value or a list of values, not nothing"),
            ("[]", "'weight' is an empty list"),
            ("[[1, 2], 3]", "'weight' must be a value or a list of values, not a list"),
            (".nan", "'weight' must be finite"),
            ("-.inf", "'weight' must be finite"),
            ("1e999", "'weight' must be finite"),
            ("[{value: 1}, 2]", "an entry of a parameter must be a mapping, not '2'"),
            ("{filter: mlp}", "an entry of a parameter needs 'value'"),
            ("{filter: mlp, value: {value: 1}}", "'value' must be a value or a list of values, not a mapping"),
            ("{filter: mlp, value: []}", "'value' is an empty list"),
            ("{fliter: mlp, value: 1}", "did you mean 'filter'?"),
            ("{filter: [mlp], value: 1}", "'filter' must be text, not a list"),
        ],
    )
    def test_bad_values(self, text: str, message: str) -> None:
        """A value that is none is refused on its line."""
        error = refused(linear(f"parameters:\n  weight: {text}"))
        assert error.startswith("r.yml:5: ")
        assert message in error

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{value: 3, filter: mlp}", [(Filter("mlp"), 3)]),
            ("{value: [0, 1]}", [(None, (0, 1))]),
            ("[{filter: '*', value: 3}]", [(Filter("*"), 3)]),
            ("[{filter: null, value: 3}]", [(None, 3)]),
            ("[{filter: '*.mlp.*', value: 3}]", [(Filter("*.mlp.*", kind="glob"), 3)]),
            ("[{filter: '/q|k/', value: 3}]", [(Filter("q|k", kind="regex"), 3)]),
            ("[{role: attention, value: 3}]", [(Filter(role="attention"), 3)]),
            (
                "[{block: 3, value: 1}, {block: 4-7, value: 2}]",
                [(Filter(blocks=(3, 3)), 1), (Filter(blocks=(4, 7)), 2)],
            ),
            (
                "{filter: q_proj, role: attention, block: '3 - 7', value: [1, 2]}",
                [(Filter("q_proj", "attention", (3, 7)), (1, 2))],
            ),
            ("[{filter: 12, value: 3}]", [(Filter("12"), 3)]),
        ],
    )
    def test_filters(self, text: str, expected: list[tuple[Filter | None, object]]) -> None:
        """An entry has any of name, role and block."""
        setting = one(linear(f"parameters: {{weight: {text}}}")).parameters["weight"]
        assert [(entry.filter, entry.value) for entry in setting.entries] == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("role: atention", "did you mean 'attention'?"),
            ("block: 7-3", "the block range 7-3 ends before it starts\n  write 3-7"),
            ("block: [3, 7]", "'block' must be a number or a range, not a list"),
            ("block: -1", "'block' must be a number or a range, not '-1'"),
            ("filter: /(a+)+/", "can take forever"),
            ("filter: /(/", "is not a regular expression"),
        ],
    )
    def test_bad_filters(self, text: str, message: str) -> None:
        """A filter that cannot be meant is refused on its line."""
        error = refused(linear(f"parameters:\n  weight:\n  - value: 1\n    {text}"))
        assert message in error
        assert error.startswith(("r.yml:7: ", "r.yml:6: "))

    def test_every_scope(self) -> None:
        """Parameters stand in sources, slices, modules and the recipe."""
        recipe = one("""\
            merge_method: ties
            base_model: c
            parameters: {lambda: 4}
            modules:
              m:
                parameters: {density: 3}
                slices:
                  - parameters: {weight: 2}
                    sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}]
            """)
        found = [{name: values(s) for name, s in scope.items()} for scope in recipe.scopes()]
        assert found == [{"weight": [1]}, {"weight": [2]}, {"density": [3]}, {"lambda": [4]}]

    @pytest.mark.parametrize("key", ["wieght", "lamdba"])
    def test_unknown_names_are_refused_in_every_scope(self, key: str) -> None:
        """A misspelt parameter is refused wherever it stands, with the name that was meant."""
        meant = {"wieght": "weight", "lamdba": "lambda"}[key]
        for text in (
            f"merge_method: ties\nparameters:\n  {key}: 1\nmodels: [{{model: a}}]",
            f"merge_method: ties\nmodels:\n- parameters: {{{key}: 1}}\n  model: a",
            f"merge_method: ties\nmodules:\n  m: {{parameters: {{{key}: 1}}, models: [{{model: a}}]}}",
            f"merge_method: ties\nslices:\n- parameters: {{{key}: 1}}\n  sources: [{{model: a, layer_range: [0, 1]}}]",
        ):
            message = refused(text)
            assert message.startswith(f"r.yml:3: ties has no parameter {key!r}\n")
            assert f"did you mean {meant!r}?" in message

    def test_unknown_method(self) -> None:
        """A misspelt method is refused with its line and the name that was meant."""
        message = refused("models: [{model: a}]\nmerge_method: slrep")
        assert message.startswith("r.yml:2: ")
        assert "'slerp'" in message

    def test_aliases_of_methods_are_kept_as_written(self) -> None:
        """An alias is a method's name, too."""
        assert one(linear().replace("linear", "soup")).method == "soup"

    def test_shared_parameter_beside_a_model(self) -> None:
        """mergekit accepts a parameter that all models share beside one of them, where it does nothing: a note, or refused."""
        text = "merge_method: slerp\nbase_model: a\nmodels:\n- model: b\n  parameters: {t: 0.3}"
        said = "r.yml:5: 't' is one value for all models and has no effect beside one of them"
        assert one(f"{text}\ncompat: mergekit").notes == (said,)
        assert refused(text) == f"{said}\n  move it to the recipe's own `parameters`"

    def test_all_mistakes_at_once(self) -> None:
        """Keys, parameters, values and models: the first in the file's order, and where the others are."""
        text = """\
            merge_method: ties
            base_modl: a
            models:
            - {model: b, parameters: {weigth: 1}}
            - {modl: c}
            - model: d
              parameters: {density: [0.5, .nan]}
            parameters: {normalise: true, weight: 1}
            dtype: bfloat61
            """
        first, *more = refused(text).splitlines()
        assert first == "r.yml:2: the recipe has no key 'base_modl'"
        assert more[0] == "  did you mean 'base_model'?"
        also = [line.strip() for line in more if line.startswith("  also ")]
        assert [line.partition(": ")[0] for line in also] == [f"also r.yml:{n}" for n in (4, 5, 5, 7, 8, 9)]
        assert also[0].endswith("ties has no parameter 'weigth' (did you mean 'weight'?)")
        assert "needs 'model'" in also[2]
        assert "'bfloat61'" in also[-1]

    def test_very_many_mistakes(self) -> None:
        message = refused("merge_method: tise\nmodels: [{model: a}]\n" + "".join(f"x{k}: 1\n" for k in range(30)))
        assert message.startswith("r.yml:1: there is no method 'tise'")
        assert message.count("also r.yml:") == 9
        assert message.endswith("\n  and 21 more")

    def test_a_model_given_twice_is_noted(self) -> None:
        recipe = one("merge_method: karcher\nmodels:\n- model: a\n- model: b\n- model: a")
        assert recipe.notes == ("r.yml:5: a is given twice, and counts twice",)

    def test_inert_parameters_are_noted_and_left_out(self) -> None:
        """What never changes a result in mergekit is accepted with a note."""
        recipe = one("""\
            merge_method: task_arithmetic
            base_model: b
            models: [{model: a, parameters: {weight: 1, density: 0.5}}]
            parameters: {int8_mask: true, rescale: true, normalize: false}
            """)
        assert list(recipe.parameters) == ["normalize"]
        assert list(next(recipe.slices()).sources[0].parameters) == ["weight"]
        assert recipe.notes == (
            "r.yml:3: the parameter 'density' has no effect",
            "r.yml:4: the parameter 'int8_mask' has no effect",
            "r.yml:4: the parameter 'rescale' has no effect",
        )
        assert "slerp has no parameter 'rescale'" in refused(GRADIENT_SLERP.replace("  t:", "  rescale: 1\n  t:"))


class TestKeys:
    """Top-level keys and unknown ones."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (linear("dtpye: float16"), "r.yml:4: the recipe has no key 'dtpye'\n  did you mean 'dtype'"),
            (linear(beside="wieght: 1"), "r.yml:4: a model of 'models' has no key 'wieght'"),
            (linear("embed_slerp: true"), "mergekit ignores it"),
            (linear(beside="input_model_parameters: {}"), "no key 'input_model_parameters'"),
            (linear("input_model_parameters: {}"), "beside each model"),
        ],
    )
    def test_unknown(self, text: str, message: str) -> None:
        """Unknown keys are refused anywhere; the message says what was meant and how to be lenient."""
        error = refused(text)
        assert message in error
        assert "compat: mergekit" in error

    def test_unknown_under_compat(self) -> None:
        """In mergekit's profile unknown keys are notes, in the file's profile as in the caller's."""
        text = linear("dtpye: float16\nparameters: {wieght: 1, weight: 2}\n", beside="wheels: 4")
        expected = (
            "r.yml:4: a model of 'models' has no key 'wheels'; it is ignored (known: model, parameters)",
            "r.yml:5: the recipe has no key 'dtpye'; it is ignored (did you mean 'dtype'?)",
            "r.yml:6: linear has no parameter 'wieght'; it is ignored (did you mean 'weight'?)",
        )
        for recipe in (one(text + "compat: mergekit"), one(text, compat="mergekit")):
            assert recipe.notes == expected
            assert recipe.compat == "mergekit"
            assert list(recipe.parameters) == ["weight"]
        assert one(linear()).compat is None

    def test_compat_does_not_forgive_wrong_values(self) -> None:
        """Only unknown keys become notes."""
        assert "unknown dtype" in refused(linear("dtype: floot16"), compat="mergekit")
        assert "there is no method" in refused(linear().replace("linear", "lineer"), compat="mergekit")

    def test_compat_argument(self) -> None:
        """A profile that does not exist is a wrong call."""
        with pytest.raises(UsageError, match="mergkit"):
            loads(linear(), compat="mergkit")

    @pytest.mark.parametrize(
        ("text", "name"),
        [("bfloat16", "bfloat16"), ("torch.float16", "float16"), ("bf16", "bfloat16"), ("float64", "float64")],
    )
    def test_dtypes(self, text: str, name: str) -> None:
        """dtypes are kept by the name that torch has for them."""
        recipe = one(linear(f"dtype: {text}\nout_dtype: {text}"))
        assert (recipe.dtype, recipe.out_dtype) == (name, name)

    @pytest.mark.parametrize("text", ["bfloat61", "int8", "[float16]", "16"])
    def test_bad_dtypes(self, text: str) -> None:
        """Other dtypes are refused on their line."""
        assert refused(linear(f"out_dtype: {text}")).startswith("r.yml:4: ")

    def test_defaults(self) -> None:
        """What the recipe does not say."""
        recipe = one(linear("dtype:\nparameters:\nbase_model: ~\ntokenizer: null\n"))
        assert (recipe.seed, recipe.rounding, recipe.extrapolate, recipe.unmatched) == (0, "nearest", False, "refuse")
        absent = (recipe.guardrails, recipe.tokenizer, recipe.schedule, recipe.chat_template, recipe.base_model)
        assert absent == (None,) * 5
        assert (recipe.dtype, recipe.steps, recipe.name) == (None, (), None)

    def test_additions(self) -> None:
        """geomerge's own keys."""
        recipe = one(
            linear("""\
                schedule: {attention: [0, 0.5, 1], t: 0.5}
                seed: 42
                guardrails: off
                rounding: stochastic
                extrapolate: true
                unmatched: copy
                chat_template: "{{ messages }}"
                """)
        )
        assert recipe.schedule == {"attention": [0, 0.5, 1], "t": 0.5}
        assert (recipe.seed, recipe.guardrails, recipe.rounding) == (42, "off", "stochastic")
        assert (recipe.extrapolate, recipe.unmatched, recipe.chat_template) == (True, "copy", "{{ messages }}")
        assert (recipe.at("seed").line, recipe.at("dtype").line) == (5, 1)
        assert one(linear("schedule: H")).schedule == "H"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seed: -1", "'seed' must be a whole number of at least 0, not '-1'"),
            ("seed: 99999999999999999999", "a whole number of at most 9223372036854775807, not '99999999999999999999'"),
            ("seed: 1.5", "whole number"),
            ("seed: true", "whole number"),
            ("guardrails: warm", "did you mean 'warn'?"),
            ("rounding: nearst", "did you mean 'nearest'?"),
            ("extrapolate: 1", "'extrapolate' must be true or false, not '1'"),
            ("unmatched: drop", "known: copy, refuse"),
            ("compat: mergkit", "did you mean 'mergekit'?"),
            ("schedule: [1, 2]", "a preset's name or a mapping, not a list"),
            ("chat_template: [1]", "'chat_template' must be text"),
            ("base_model: ''", "has no path"),
            ("parameters: [1]", "'parameters' must be a mapping, not a list"),
        ],
    )
    def test_bad_values(self, text: str, message: str) -> None:
        """Wrong values are refused on their line."""
        error = refused(linear(text))
        assert error.startswith("r.yml:4: ")
        assert message in error


class TestSteps:
    """Steps after the method."""

    def test_steps(self) -> None:
        """A single parameter needs no name; several do; values may be gradients with filters."""
        recipe = one(
            linear("""\
                steps:
                  - scale: 0.7
                  - lines: {alpha: 0.2, beta: [{filter: mlp, value: 1}]}
                  - scale: {value: [0, 1], filter: mlp}
                  - lines: {beta: 0.5}
                """)
        )
        assert [(step.name, step.where.line) for step in recipe.steps] == [
            ("scale", 5),
            ("lines", 6),
            ("scale", 7),
            ("lines", 8),
        ]
        assert [{name: values(s) for name, s in step.parameters.items()} for step in recipe.steps] == [
            {"value": [0.7]},
            {"alpha": [0.2], "beta": [1]},
            {"value": [(0, 1)]},
            {"beta": [0.5]},
        ]
        assert sum(len(scope) for scope in recipe.scopes()) == 5

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("steps: {scale: 1}", "'steps' must be a list"),
            ("steps: [{scle: 1}]", "there is no step 'scle'\n  did you mean 'scale'?"),
            ("steps: [{scale: 1, lines: 2}]", "a step is a mapping with one key"),
            ("steps: [{lines: 1}]", "the step 'lines' takes alpha, beta and post_block_scale, not '1'"),
            ("steps: [{lines: {alpah: 1}}]", "the step 'lines' has no parameter 'alpah'"),
        ],
    )
    def test_refused(self, text: str, message: str) -> None:
        """Steps that do not exist are refused."""
        assert message in refused(linear(text))


class TestTokenizer:
    """`tokenizer_source` and `tokenizer`."""

    def test_source(self) -> None:
        """union, base, or a model."""
        found = []
        for text in ("union", "base", "org/model@main"):
            tokenizer = one(linear(f"tokenizer_source: {text}")).tokenizer
            assert tokenizer is not None
            found.append((tokenizer.source, tokenizer.tokens, tokenizer.pad_to_multiple_of, tokenizer.where.line))
        assert found == [
            ("union", (), None, 4),
            ("base", (), None, 4),
            (ModelRef("org/model", "main"), (), None, 4),
        ]

    def test_rules(self) -> None:
        """All kinds of rules for single tokens; tokens are text, whatever YAML makes of them elsewhere."""
        recipe = one(
            linear("""\
                tokenizer:
                  pad_to_multiple_of: 64
                  tokens:
                    <|im_start|>: {source: org/chat, force: true}
                    "yes": {source: {kind: model_token, model: b, token: "<s>"}}
                    7: {source: {kind: model_token, model: b, token_id: 3}}
                    z: {source: {kind: zero}}
                    m: {source: {model: {path: b, revision: x}}}
                """)
        )
        assert recipe.tokenizer is not None
        assert (recipe.tokenizer.source, recipe.tokenizer.pad_to_multiple_of) == ("union", 64)
        assert recipe.tokenizer.tokens == (
            TokenRule("<|im_start|>", "model", ModelRef("org/chat"), force=True),
            TokenRule("yes", "model_token", ModelRef("b"), source_token="<s>"),
            TokenRule("7", "model_token", ModelRef("b"), source_token_id=3),
            TokenRule("z", "zero"),
            TokenRule("m", "model", ModelRef("b", "x")),
        )
        assert [rule.where.line for rule in recipe.tokenizer.tokens] == [7, 8, 9, 10, 11]

    def test_rule_without_source_is_noted(self) -> None:
        """A rule that names no source does nothing, which a note says."""
        recipe = one(linear("tokenizer:\n  tokens:\n    x: {force: true}"))
        assert recipe.tokenizer is not None
        assert recipe.tokenizer.tokens == ()
        assert recipe.notes == ("r.yml:6: the rule for the token 'x' names no source and has no effect",)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("tokenizer_source: union\ntokenizer: {source: union}", "exclude each other"),
            ("tokenizer: union", "the tokenizer must be a mapping, not 'union'"),
            ("tokenizer: {sauce: union}", "did you mean 'source'"),
            ("tokenizer: {pad_to_multiple_of: 0}", "at least 1"),
            ("tokenizer: {tokens: {x: {source: {kind: zeros}}}}", "did you mean 'zero'?"),
            ("tokenizer: {tokens: {x: {source: {kind: zero, model: a}}}}", "takes nothing else"),
            ("tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}", "either 'token' or 'token_id'"),
            (
                "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: b, token_id: 1}}}}",
                "either 'token' or 'token_id'",
            ),
            ("tokenizer: {tokens: {x: {source: {kind: model_token, token: b}}}}", "needs 'model'"),
            ("tokenizer: {tokens: [x]}", "'tokens' must be a mapping"),
            ("tokenizer: {tokens: {x: {source: a, force: maybe}}}", "'force' must be true or false"),
        ],
    )
    def test_refused(self, text: str, message: str) -> None:
        """Rules that cannot be meant are refused."""
        assert message in refused(linear(text))


def test_text_and_places_are_kept() -> None:
    """The file's text is kept to the byte, and equal entries on other lines are other entries."""
    text = "# soup\n" + linear("parameters: {weight: 1}  # why\n")
    recipe = one(text)
    assert recipe.text == text
    assert recipe.parameters["weight"].entries == (Entry(None, 1, recipe.at("parameters")),)


def test_load_names_the_file(tmp_path: Path) -> None:
    """`load` reads a file and its errors carry the path as given."""
    path = tmp_path / "soup.yml"
    path.write_text(linear("dtpye: float16"))
    with pytest.raises(RecipeError, match=r"no key 'dtpye'") as caught:
        load(path)
    assert caught.value.where == f"{path}:4"
    path.write_text("\ufeff" + linear().replace("\n", "\r\n"), encoding="utf-8")
    assert load(str(path)).output.method == "linear"
