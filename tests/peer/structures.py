"""Recipes about the grammar: the peer's six examples, filters, gradients, slices, modules, precedence, pipelines.

The examples have the structure of the peer's published ones, with tiny models in place of hub ids (and layer counts
to match). `FAILURES` are recipes that the peer refuses or gets wrong: kept as notes, never with an output.
"""

from __future__ import annotations

from textwrap import dedent

from recipes import Case

CASES: list[Case] = []
FAILURES: list[Case] = []


def case(name: str, yaml: str, notes: str = "", *, to: list[Case] = CASES) -> None:
    """Record one recipe, model names written ``@m_a`` for brevity."""
    to.append(Case(name, dedent(yaml).lstrip().replace("@", "models/"), notes))


def fails(name: str, yaml: str, notes: str) -> None:
    """Record a recipe whose result is not to be matched."""
    case(f"failure/{name}", yaml, notes, to=FAILURES)


# --- the six examples --------------------------------------------------------------------------------------------

case("example/bio-merge", """
    models:
      - model: "@m_a"
        parameters: {density: 0.5, weight: 0.5}
      - model: "@m_b"
        parameters: {density: 0.5, weight: 0.5}
    merge_method: ties
    base_model: "@m_base"
    parameters: {normalize: false, int8_mask: true}
    dtype: float16
""")  # fmt: skip
case("example/bio-merge-float32", CASES[-1].yaml.replace("float16", "float32"), "the same without half precision")
case("example/gradient-slerp", """
    slices:
      - sources:
          - model: "@m_a"
            layer_range: [0, 4]
          - model: "@m_b"
            layer_range: [0, 4]
    merge_method: slerp
    base_model: "@m_a"
    parameters:
      t:
        - filter: self_attn
          value: [0, 0.5, 0.3, 0.7, 1]
        - filter: mlp
          value: [1, 0.5, 0.7, 0.3, 0]
        - value: 0.5
    dtype: float16
""")  # fmt: skip
case("example/gradient-slerp-float32", CASES[-1].yaml.replace("float16", "float32"), "the same without half precision")
case("example/linear", """
    models:
      - model: "@m_a"
        parameters: {weight: 1.0}
      - model: "@m_b"
        parameters: {weight: 0.3}
      - model: "@m_c"
        parameters: {weight: 0.5}
    merge_method: linear
    dtype: float16
""")  # fmt: skip
case("example/linear-float32", CASES[-1].yaml.replace("float16", "float32"), "the same without half precision")
case("example/mega", """
    name: gradient-slerp
    slices:
      - sources:
          - model: "@m_a"
            layer_range: [0, 4]
          - model: "@m_b"
            layer_range: [0, 4]
    merge_method: slerp
    base_model: "@m_a"
    parameters:
      t:
        - filter: self_attn
          value: [0, 0.5, 0.3, 0.7, 1]
        - filter: mlp
          value: [1, 0.5, 0.7, 0.3, 0]
        - value: 0.5
    dtype: float16
    ---
    models:
      - model: gradient-slerp
        parameters:
          density: [1, 0.7, 0.1]
          weight: 1.0
      - model: "@m_c"
        parameters:
          density: 0.33
          weight:
            - filter: mlp
              value: 0.5
            - value: 0
    merge_method: ties
    base_model: "@m_base"
    parameters: {normalize: true, int8_mask: true}
    dtype: float16
""", "the first document's out_path is written as a name, as the pipeline runner of today wants it")  # fmt: skip
case("example/mega-float32", CASES[-1].yaml.replace("float16", "float32"), "the same without half precision")
case("example/orcamini-platy-44layer", """
    slices:
      - sources:
          - model: "@m_a"
            layer_range: [0, 3]
      - sources:
          - model: "@m_b"
            layer_range: [2, 4]
    merge_method: passthrough
    dtype: float16
""", "embedding from the first slice's model, final norm and head from the last's")  # fmt: skip
case("example/ties", """
    models:
      - model: "@m_a"
        parameters: {density: [0.8, 0.3, 0.1], weight: [1.0, 0.8, 0.5]}
      - model: "@m_b"
        parameters: {density: [0.1, 0.4, 0.1], weight: [0.2, 0.8, 0.1]}
      - model: "@m_c"
        parameters: {density: [0.1, 0.2, 0.6], weight: [0.5, 0.8, 1.0]}
    merge_method: ties
    base_model: "@m_base"
    dtype: bfloat16
""")  # fmt: skip
case("example/ties-float32", CASES[-1].yaml.replace("bfloat16", "float32"), "the same without half precision")

# --- filters -----------------------------------------------------------------------------------------------------

WEIGHTED = """
    models:
      - model: "@m_a"
        parameters: {{weight: {first}}}
      - model: "@m_b"
        parameters: {{weight: {second}}}
    merge_method: {method}
    base_model: "@m_base"
    parameters: {shared}
"""


def weighted(name: str, notes: str = "", *, method: str = "task_arithmetic", **parts: str) -> None:
    """A two-expert recipe with the given weights and shared parameters, written as YAML flow values."""
    filled = {"first": "1.0", "second": "0.5", "shared": "{lambda: 1.0}"} | parts
    case(name, WEIGHTED.format(method=method, **filled), notes)


weighted("filter/first_match_wins", first="[{filter: proj, value: 0.9}, {filter: q_proj, value: 0.1}, {value: 0.5}]")
weighted("filter/star", first='[{filter: q_proj, value: 0.1}, {filter: "*", value: 0.7}]')
weighted(
    "filter/star_first", "a star hides what follows", first='[{filter: "*", value: 0.7}, {filter: mlp, value: 0.1}]'
)
weighted("filter/no_filter_first", first="[{value: 0.7}, {filter: mlp, value: 0.1}]")
weighted("filter/mapping", "one mapping instead of a list; others fall to the global weight",
         first="{filter: mlp, value: 0.2}", shared="{weight: 0.6}")  # fmt: skip
weighted("filter/mapping_unfiltered", first="{value: 0.2}")
weighted(
    "filter/substring_of_block",
    "layers.1 is only a substring",
    first='[{filter: "layers.1.", value: 0.2}, {value: 0.8}]',
)
weighted("filter/not_a_regex", "a pattern that would match as a regex or glob, but not as a substring",
         first='[{filter: "layers.*.mlp", value: 0.2}, {filter: "layers.[01]", value: 0.3}, {value: 0.8}]')  # fmt: skip
weighted(
    "filter/embedding_and_head",
    first="[{filter: embed_tokens, value: 0.1}, {filter: lm_head, value: 2.0}, {value: 1.0}]",
)
weighted(
    "filter/shared_parameter",
    shared="{lambda: [{filter: self_attn, value: 0.3}, {filter: norm, value: 0.0}, {value: 1.5}]}",
)
weighted(
    "filter/shared_falls_to_default", "lambda 1 outside attention", shared="{lambda: [{filter: self_attn, value: 0.3}]}"
)
weighted("filter/density_falls_to_default", "density 1 outside the MLP", method="ties",
         shared="{density: [{filter: mlp, value: 0.3}]}")  # fmt: skip
weighted(
    "filter/booleans", method="ties", shared="{normalize: [{filter: mlp, value: false}, {value: true}], density: 0.5}"
)
weighted(
    "filter/gradient_inside",
    first="[{filter: self_attn, value: [0.0, 1.0]}, {filter: mlp, value: [1.0, 0.0]}, {value: 0.3}]",
)
weighted("filter/source_falls_to_global", "the source knows only attention, the global scope the rest",
         first="[{filter: self_attn, value: 0.1}]", second="[{filter: mlp, value: 0.2}]",
         shared="{weight: [{filter: norm, value: 0.4}, {value: 0.9}]}")  # fmt: skip

# --- gradients ---------------------------------------------------------------------------------------------------

weighted("gradient/one_anchor", first="[0.4]")
weighted("gradient/two_anchors", "embedding, final norm and head take the first", first="[0.0, 1.0]")
weighted("gradient/three_anchors", first="[0.2, 1.0, 0.6]", second="[1.0, 0.0, 0.5]")
weighted("gradient/more_anchors_than_layers", first="[0.0, 0.1, 0.9, 0.4, 0.5, 1.0, 0.2]")
weighted("gradient/shared", shared="{lambda: [0.0, 2.0]}")
weighted("gradient/density", method="ties", shared="{density: [1.0, 0.2]}")
weighted("gradient/density_to_zero", method="ties", shared="{density: [0.6, 0.0]}")
weighted("gradient/booleans_step", method="ties", shared="{normalize: [true, false], density: 0.5}")
weighted("gradient/integers", first="[0, 1]", second="[1, 0]")
weighted("gradient/exponent_strings", "1e-1 is text in YAML 1.1", first="1e-1", second="[1e-1, 1e0]")

# --- slices ------------------------------------------------------------------------------------------------------

case("slices/equal_to_models", """
    slices:
      - sources:
          - model: "@m_a"
            layer_range: [0, 4]
            parameters: {weight: [0.0, 1.0]}
          - model: "@m_b"
            layer_range: [0, 4]
            parameters: {weight: 0.5}
    merge_method: linear
""")  # fmt: skip
case("slices/gradient_restarts", """
    slices:
      - sources:
          - model: "@m_a"
            layer_range: [0, 3]
            parameters: {weight: [0.0, 1.0]}
          - model: "@m_b"
            layer_range: [0, 3]
            parameters: {weight: 0.5}
      - sources:
          - model: "@m_a"
            layer_range: [2, 4]
            parameters: {weight: [0.2, 2.0]}
          - model: "@m_c"
            layer_range: [2, 4]
            parameters: {weight: 0.5}
    merge_method: linear
""", "embedding by the first slice's sources, norm and head by the last's; each with the first anchor")  # fmt: skip
case("slices/different_ranges", """
    slices:
      - sources:
          - model: "@m_a"
            layer_range: [0, 2]
            parameters: {weight: [{filter: layers.1., value: 3.0}, {value: 1.0}]}
          - model: "@m_b"
            layer_range: [2, 4]
            parameters: {weight: [{filter: layers.3., value: 5.0}, {value: 1.0}]}
    merge_method: linear
    parameters: {normalize: [{filter: layers.1., value: false}, {value: true}]}
""", "per-model filters read the input's name, shared ones the output's")  # fmt: skip
case("slices/renumbered_filters", """
    slices:
      - sources:
          - model: "@m_a"
            layer_range: [2, 4]
            parameters: {scale: [{filter: layers.2., value: 2.0}, {filter: layers.0., value: 7.0}, {value: 1.0}]}
      - sources:
          - model: "@m_b"
            layer_range: [0, 3]
    merge_method: passthrough
""", "layer 2 of the source becomes layer 0: the filter reads the source's number")  # fmt: skip
case("slices/repeated_and_reversed", """
    slices:
      - sources: [{model: "@m_a", layer_range: [1, 2]}]
      - sources: [{model: "@m_a", layer_range: [0, 1]}]
      - sources: [{model: "@m_a", layer_range: [1, 2]}]
      - sources: [{model: "@m_c", layer_range: [3, 4]}]
    merge_method: passthrough
""", "one layer twice")  # fmt: skip
case("slices/one_layer_gradient", """
    slices:
      - sources: [{model: "@m_a", layer_range: [0, 1], parameters: {scale: [0.5, 3.0]}}]
      - sources: [{model: "@m_b", layer_range: [1, 4], parameters: {scale: [0.5, 3.0]}}]
    merge_method: passthrough
""", "a slice of one layer takes the last anchor")  # fmt: skip
case("slices/shorter", """
    slices:
      - sources: [{model: "@m_a", layer_range: [0, 1]}]
      - sources: [{model: "@m_a", layer_range: [3, 4]}]
    merge_method: passthrough
""", "two layers left out")  # fmt: skip
case("slices/two_sources_then_one", """
    slices:
      - sources:
          - {model: "@m_a", layer_range: [0, 2], parameters: {weight: 1.0}}
          - {model: "@m_b", layer_range: [0, 2], parameters: {weight: 0.5}}
      - sources:
          - {model: "@m_c", layer_range: [2, 4], parameters: {weight: 2.0}}
    merge_method: linear
""", "the head has one source although the embedding has two")  # fmt: skip
case("slices/scopes", """
    slices:
      - sources:
          - {model: "@m_base", layer_range: [0, 2]}
          - {model: "@m_a", layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 0.1}]}}
          - {model: "@m_b", layer_range: [0, 2], parameters: {weight: 0.5}}
        parameters: {weight: [{filter: self_attn, value: 0.2}], lambda: 0.7}
      - sources:
          - {model: "@m_base", layer_range: [2, 4]}
          - {model: "@m_a", layer_range: [2, 4]}
          - {model: "@m_b", layer_range: [2, 4]}
    merge_method: task_arithmetic
    base_model: "@m_base"
    parameters: {weight: [{filter: mlp, value: 0.3}, {value: 0.4}], lambda: 1.3}
""", "source, then slice, then global")  # fmt: skip
case("slices/scope_gradients", """
    slices:
      - sources:
          - {model: "@m_a", layer_range: [0, 2]}
          - {model: "@m_b", layer_range: [0, 2]}
        parameters: {t: [0.0, 1.0]}
      - sources:
          - {model: "@m_a", layer_range: [2, 4]}
          - {model: "@m_b", layer_range: [2, 4]}
    merge_method: slerp
    base_model: "@m_a"
    parameters: {t: [0.25, 0.75]}
""", "a slice's gradient and a global one, both restarting")  # fmt: skip
case("slices/base_of_a_slice", """
    slices:
      - sources:
          - {model: "@m_base", layer_range: [0, 2]}
          - {model: "@m_a", layer_range: [0, 2], parameters: {weight: 1.0}}
          - {model: "@m_b", layer_range: [0, 2], parameters: {weight: 0.5}}
      - sources:
          - {model: "@m_a", layer_range: [2, 4], parameters: {weight: 1.0}}
          - {model: "@m_c", layer_range: [2, 4], parameters: {weight: 0.5}}
        base_model: "@m_c"
    merge_method: task_arithmetic
    base_model: "@m_base"
""", "the second slice's own base, which is also one of its sources: layers, final norm and head")  # fmt: skip
case("slices/slerp_swapped_by_slice_base", """
    slices:
      - sources:
          - {model: "@m_a", layer_range: [0, 2]}
          - {model: "@m_b", layer_range: [0, 2]}
      - sources:
          - {model: "@m_a", layer_range: [2, 4]}
          - {model: "@m_b", layer_range: [2, 4]}
        base_model: "@m_b"
    merge_method: slerp
    base_model: "@m_a"
    parameters: {t: 0.2}
""")  # fmt: skip
case("slices/base_listed_with_its_own_range", """
    slices:
      - sources:
          - {model: "@m_base", layer_range: [1, 3]}
          - {model: "@m_a", layer_range: [2, 4], parameters: {weight: 1.0}}
          - {model: "@m_b", layer_range: [0, 2], parameters: {weight: 0.5}}
    merge_method: task_arithmetic
    base_model: "@m_base"
""")  # fmt: skip

case("slices/zero_length", """
    slices:
      - sources: [{model: "@m_a", layer_range: [0, 4]}]
      - sources: [{model: "@m_b", layer_range: [4, 4]}]
    merge_method: passthrough
""", "a trailing slice without layers, which chooses final norm and head")  # fmt: skip

# --- modules, scopes, references ---------------------------------------------------------------------------------

case("modules/default_name", """
    modules:
      default:
        slices:
          - sources:
              - {model: "@m_a", layer_range: [0, 4]}
              - {model: "@m_b", layer_range: [0, 4], parameters: {weight: 0.5}}
            parameters: {weight: [{filter: q_proj, value: 0.1}]}
        parameters: {weight: [{filter: self_attn, value: 0.2}, {filter: norm, value: 0.7}]}
    merge_method: linear
    parameters: {weight: 0.9}
""", "source, slice, module, global: one of each")  # fmt: skip
case("modules/t5_models", """
    models:
      - model: "@t5_a"
        parameters: {weight: [0.0, 1.0]}
      - model: "@t5_b"
        parameters: {weight: 0.5}
    merge_method: linear
""", "one list of models for both stacks")  # fmt: skip
case("modules/t5", """
    modules:
      encoder:
        models:
          - {model: "@t5_a", parameters: {weight: 1.0}}
          - {model: "@t5_b", parameters: {weight: [0.0, 0.8]}}
          - {model: "@t5_base"}
        parameters: {lambda: 0.5}
      decoder:
        slices:
          - sources:
              - {model: "@t5_a", layer_range: [0, 2], parameters: {weight: [{filter: EncDec, value: 0.2}, {value: 1}]}}
              - {model: "@t5_b", layer_range: [0, 2]}
              - {model: "@t5_base", layer_range: [0, 2]}
      shared:
        models:
          - {model: "@t5_a", parameters: {weight: 0.7}}
          - {model: "@t5_b"}
          - {model: "@t5_base"}
    merge_method: task_arithmetic
    base_model: "@t5_base"
    parameters: {weight: 0.3, lambda: 1.5}
""")  # fmt: skip
case("modules/t5_passthrough", """
    modules:
      encoder:
        slices:
          - sources: [{model: "@t5_a", layer_range: [0, 1]}]
      decoder:
        slices:
          - sources: [{model: "@t5_b", layer_range: [0, 2]}]
      shared:
        models: [{model: "@t5_a"}]
    merge_method: passthrough
    base_model: "@t5_a"
""", "stacks from different models; the encoder loses a layer")  # fmt: skip
case("reference/mapping", """
    models:
      - model: {model: {path: "@m_a"}}
        parameters: {weight: 1.0}
      - model: {model: {path: "@m_b", revision: null}}
        parameters: {weight: 0.5}
    merge_method: linear
""")  # fmt: skip
case("reference/torch_prefix", """
    models:
      - {model: "@m_a", parameters: {weight: 1.0}}
      - {model: "@m_b", parameters: {weight: 0.5}}
    merge_method: linear
    dtype: torch.float32
    out_dtype: torch.bfloat16
""")  # fmt: skip
case("precision/ties_in_bfloat16", """
    models:
      - {model: "@m_a", parameters: {weight: 1.0, density: 0.5}}
      - {model: "@m_b", parameters: {weight: 0.5, density: 0.5}}
    merge_method: ties
    base_model: "@m_base"
    dtype: bfloat16
    out_dtype: float32
""", "cast to bfloat16 on reading: the task vectors are differences of rounded weights")  # fmt: skip
case("precision/slerp_in_float16", """
    models:
      - model: "@m_a"
      - model: "@m_b"
    merge_method: slerp
    base_model: "@m_a"
    parameters: {t: 0.4}
    dtype: float16
""")  # fmt: skip
for method in ("linear", "ties", "task_arithmetic"):
    case(f"tied/{method}", f"""
        models:
          - {{model: "@q_a", parameters: {{weight: 1.0}}}}
          - {{model: "@q_b", parameters: {{weight: 0.4}}}}
        merge_method: {method}
        base_model: "@q_base"
        parameters: {{weight: 0.2}}
    """, "Qwen2 with biases and a head tied to the embedding")  # fmt: skip
case("tied/slerp", """
    models:
      - model: "@q_a"
      - model: "@q_b"
    merge_method: slerp
    base_model: "@q_a"
    parameters: {t: [{filter: lm_head, value: 1}, {filter: embed, value: 0}, {filter: bias, value: 1}, {value: 0.5}]}
""")  # fmt: skip
case("tied/passthrough_same_depth", """
    slices:
      - sources: [{model: "@q_a", layer_range: [0, 1]}]
      - sources: [{model: "@q_b", layer_range: [1, 2]}]
    merge_method: passthrough
""")  # fmt: skip

# --- pipelines ---------------------------------------------------------------------------------------------------

case("pipeline/diamond", """
    models:
      - model: left
        parameters: {weight: 0.5}
      - model: right
        parameters: {weight: 1.0}
    merge_method: linear
    ---
    name: left
    models:
      - {model: "@m_a", parameters: {weight: 1.0, density: 0.5}}
      - {model: start, parameters: {weight: 0.5, density: 0.7}}
    merge_method: ties
    base_model: "@m_base"
    ---
    name: right
    models:
      - model: start
      - model: "@m_c"
    merge_method: slerp
    base_model: start
    parameters: {t: [0.2, 0.8]}
    ---
    name: start
    models:
      - {model: "@m_a", parameters: {weight: 1.0}}
      - {model: "@m_b", parameters: {weight: 1.0}}
    merge_method: linear
""", "documents in any order; the unnamed one is the result")  # fmt: skip
case("pipeline/rounded_between", """
    name: start
    models:
      - {model: "@m_a", parameters: {weight: 1.0}}
      - {model: "@m_b", parameters: {weight: 1.0}}
    merge_method: linear
    dtype: bfloat16
    ---
    models:
      - {model: start, parameters: {weight: 1.0}}
      - {model: "@m_c", parameters: {weight: 0.5}}
    merge_method: linear
    dtype: float32
""", "the intermediate result is rounded to bfloat16")  # fmt: skip

# --- what is not to be matched -----------------------------------------------------------------------------------

fails("zero_weight_sum", """
    models:
      - {model: "@s_a", parameters: {weight: 1.0}}
      - {model: "@s_b", parameters: {weight: -1.0}}
    merge_method: linear
""", "weights that sum to zero are divided by zero")  # fmt: skip
fails("depth_change_with_layer_types", """
    slices:
      - sources: [{model: "@q_a", layer_range: [0, 2]}]
      - sources: [{model: "@q_b", layer_range: [0, 2]}]
    merge_method: passthrough
""", "config.json's layer_types is not rebuilt")  # fmt: skip
fails("one_source_then_two", """
    slices:
      - sources:
          - {model: "@m_c", layer_range: [0, 2], parameters: {weight: 2.0}}
      - sources:
          - {model: "@m_a", layer_range: [2, 4], parameters: {weight: 1.0}}
          - {model: "@m_b", layer_range: [2, 4], parameters: {weight: 0.5}}
    merge_method: linear
""", "norm and head are zipped with the first slice's source count: the last's second source is lost")  # fmt: skip
fails("unequal_slice_lengths", """
    slices:
      - sources:
          - {model: "@m_a", layer_range: [0, 2], parameters: {weight: 1.0}}
          - {model: "@m_b", layer_range: [0, 3], parameters: {weight: 1.0}}
    merge_method: linear
""", "sources of one slice with different lengths")  # fmt: skip
fails("missing_weight", """
    models:
      - {model: "@s_a", parameters: {weight: 1.0}}
      - {model: "@s_b"}
    merge_method: linear
""", "a required parameter that no scope gives")  # fmt: skip
fails("missing_weight_outside_filter", """
    models:
      - {model: "@s_a", parameters: {weight: 1.0}}
      - {model: "@s_b", parameters: {weight: [{filter: mlp, value: 1.0}]}}
    merge_method: linear
""", "a required parameter that no filter gives to some tensors")  # fmt: skip
fails("slerp_three_models", """
    models: [{model: "@s_base"}, {model: "@s_a"}, {model: "@s_b"}]
    merge_method: slerp
    base_model: "@s_base"
    parameters: {t: 0.5}
""", "slerp takes two")  # fmt: skip
fails("no_base", """
    models:
      - {model: "@s_a", parameters: {weight: 1.0}}
    merge_method: ties
""", "a method on task vectors without a base")  # fmt: skip
fails("della_density_out_of_reach", """
    models:
      - {model: "@s_a", parameters: {weight: 1.0, density: 0.1, epsilon: 0.15}}
    merge_method: della
    base_model: "@s_base"
""", "density - epsilon below zero")  # fmt: skip
fails("multislerp_opposite_three", """
    models:
      - {model: "@s_base", parameters: {weight: 1.0}}
      - {model: "@s_turned", parameters: {weight: 1.0}}
      - {model: "@s_b", parameters: {weight: 0.0}}
    merge_method: multislerp
""", "three inputs whose weighted directions cancel")  # fmt: skip
fails("karcher_antipodal", """
    models: [{model: "@s_base"}, {model: "@s_turned"}]
    merge_method: karcher
""", "opposite inputs: no mean is defined")  # fmt: skip
fails("unknown_keys", """
    models:
      - {model: "@s_a", parameters: {weight: 1.0, wieght: 3.0}}
      - {model: "@s_b", parameters: {weight: 0.5}}
    merge_method: linear
    dtpye: bfloat16
    parameters: {lamdba: 3}
""", "misspelt keys are ignored without a word")  # fmt: skip
fails("old_filter_key", """
    models: [{model: "@s_a"}, {model: "@s_b"}]
    merge_method: slerp
    base_model: "@s_a"
    parameters: {t: [{pattern: self_attn, value: 0.1}, {value: 0.9}]}
""", "an early example wrote pattern for filter: ignored as an unknown key, so the first entry wins")  # fmt: skip
fails("top_level_slices_of_two_stacks", """
    slices:
      - sources:
          - {model: "@t5_a", layer_range: [0, 2], parameters: {weight: 1.0}}
          - {model: "@t5_b", layer_range: [0, 2], parameters: {weight: 1.0}}
    merge_method: linear
""", "an architecture of two stacks needs modules")  # fmt: skip
fails("module_left_out", """
    modules:
      encoder:
        models:
          - {model: "@t5_a", parameters: {weight: 1.0}}
          - {model: "@t5_b", parameters: {weight: 0.5}}
    merge_method: linear
""", "the tensors of modules that are not listed (decoder, and shared: the embedding) are not written")  # fmt: skip
fails("slices_without_range", """
    slices:
      - sources:
          - {model: "@m_a", parameters: {weight: 1.0}}
          - {model: "@m_b", parameters: {weight: 1.0}}
    merge_method: linear
""", "a slice's source without layer_range")  # fmt: skip
fails("base_unlisted", """
    slices:
      - sources:
          - {model: "@m_a", layer_range: [2, 4], parameters: {weight: 1.0}}
          - {model: "@m_b", layer_range: [2, 4], parameters: {weight: 0.5}}
    merge_method: ties
    base_model: "@m_base"
    parameters: {density: 0.5}
""", "in slices the base of a method on task vectors must be listed as a source")  # fmt: skip
fails("same_model_twice", """
    slices:
      - sources:
          - {model: "@m_a", layer_range: [0, 2], parameters: {weight: 1.0}}
          - {model: "@m_a", layer_range: [2, 4], parameters: {weight: 0.5}}
    merge_method: linear
""", "one model may not be two sources of a slice")  # fmt: skip
fails("multislerp_small_mean", """
    models:
      - {model: "@s_a", parameters: {weight: 0.5}}
      - {model: "@s_b", parameters: {weight: 1.0}}
      - {model: "@s_c", parameters: {weight: 0.3}}
    merge_method: multislerp
    base_model: "@s_base"
    parameters: {eps: 0.001}
""", "eps also bounds the norm of a mean direction; unchanged tensors have zero task vectors")  # fmt: skip
fails("ramplus_tl_epsilon_zero", """
    models: [{model: "@s_a"}, {model: "@s_b"}]
    merge_method: ramplus_tl
    base_model: "@s_base"
    parameters: {epsilon: 0.0}
""", "0/0 where no element is unique to a model")  # fmt: skip
