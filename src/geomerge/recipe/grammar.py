"""The recipe's grammar as data: which keys stand where, how each is read, what it means.

`geomerge.recipe.parse` reads recipes by these tables and `geomerge.recipe.schema` writes the JSON schema from them, so
an editor accepts what the parser accepts. The grammar is mergekit's, plus geomerge's own keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from geomerge.anatomy.roles import ROLES


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a mapping.

    Attributes:
        name: As written.
        kind: How the value is read: a method ``read_<kind>`` of the parser and a definition in the schema.
        doc: One sentence.
        required: The mapping needs it.
        choices: The allowed words.
        hint: What a message about the missing key adds.
    """

    name: str
    kind: str
    doc: str
    required: bool = False
    choices: tuple[str, ...] = ()
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """A mapping: its keys, and how messages call it."""

    title: str
    keys: tuple[Key, ...]

    def names(self) -> tuple[str, ...]:
        """The keys' names, in order."""
        return tuple(key.name for key in self.keys)


_THIN = ("density", "rescale", "rescale_norm")

BEFORE: Mapping[str, tuple[str, ...]] = {
    "trim": (*_THIN, "top_k"),
    "magnitude": (*_THIN, "top_k"),
    "dare": _THIN,
    "della": (*_THIN, "epsilon"),
    "magprune": (*_THIN, "epsilon"),
    "breadcrumbs": (*_THIN, "gamma", "scope"),
    "svd_compress": ("rank", "ratio", "energy", "rest", "matrix"),
    "tsv_compress": ("rank", "ratio", "energy", "rest", "matrix"),
}
"""The steps that thin each expert's task vector before the method, and their parameters: see `geomerge.methods.chain`."""

AFTER: Mapping[str, tuple[str, ...]] = {
    "scale": ("value",),
    "lines": ("alpha", "beta", "post_block_scale"),
    "aim": ("statistics", "omega"),
}
"""The steps that scale the merged task vector after the method, and their parameters."""

STEPS: Mapping[str, tuple[str, ...]] = {**BEFORE, **AFTER}
"""All steps. A step's only parameter, and the density of one that has it, may be given without its name."""

STEP_ALIASES: Mapping[str, str] = {"magnitude": "trim", "magprune": "della", "tsv_compress": "svd_compress"}

BESIDE: tuple[str, ...] = ("density", "epsilon", "gamma")
"""The parameters of steps that may have another value for each model: ``dare.density`` among the model's parameters."""

INERT: Mapping[str, tuple[str, ...]] = {"*": ("int8_mask",), "task_arithmetic": ("density", "rescale")}
"""Parameters that mergekit accepts and that never change a result, by method (``*``: all)."""

_PARAMETERS = "Parameters of the method for {}; the innermost scope that has a value for a tensor counts."

RECIPE = Shape(
    "the recipe",
    (
        Key("merge_method", "word", "The merge method.", required=True, hint="such as 'merge_method: slerp'"),
        Key("name", "name", "What later documents of the same file call the result."),
        Key("models", "models", "The models to merge, all blocks of each."),
        Key("slices", "slices", "The output's blocks, slice by slice, each with the models it is merged from."),
        Key("modules", "modules", "For models with several stacks (text and vision, encoder and decoder): each stack."),
        Key(
            "base_model", "model", "The model that task vectors start from, or the first endpoint of an interpolation."
        ),
        Key("parameters", "parameters", _PARAMETERS.format("the whole merge")),
        Key(
            "components",
            "components",
            "For models of several components (language, vision, projector, …): merge, or {copy: model}, for each.",
        ),
        Key(
            "dtype",
            "dtype",
            "The number format of the output, unless out_dtype is given. Arithmetic never depends on it.",
        ),
        Key("out_dtype", "dtype", "The number format of the output."),
        Key("tokenizer_source", "tokenizer_source", "The output's vocabulary: union, base, or a model."),
        Key(
            "tokenizer", "tokenizer", "The output's vocabulary with rules for single tokens; excludes tokenizer_source."
        ),
        Key(
            "tokens", "tokens_policy", "The output's vocabulary in geomerge's words; excludes the two keys of mergekit."
        ),
        Key("align", "align", "Rotate the other models' hidden basis into one model's before they are merged."),
        Key("chat_template", "template", "auto, a bundled template's name, or Jinja text."),
        Key("schedule", "schedule", "A schedule over depth: a preset's name or a mapping."),
        Key(
            "statistics",
            "references",
            "Files of weight-wise statistics (Fisher diagonals) in the tensors' names: their sum weights angles and norms.",
        ),
        Key(
            "steps",
            "steps",
            "What thins each model's task vector before the method, then what scales the merged one after it.",
        ),
        Key("compat", "choice", "Whose numeric choices to reproduce.", choices=("mergekit",)),
        Key("seed", "seed", "The seed of every random draw."),
        Key("guardrails", "choice", "What the checks for a doomed merge do.", choices=("warn", "enforce", "off")),
        Key("rounding", "choice", "How the output is rounded to its dtype.", choices=("nearest", "stochastic")),
        Key("extrapolate", "flag", "Allow interpolation coefficients outside [0, 1]."),
        Key(
            "requantize",
            "choice",
            "Store linear layers as 8-bit codes; `same`: what the base (or first) model stores so, in its scheme.",
            choices=("same", "int8", "fp8"),
        ),
        Key("unmatched", "choice", "What happens to tensors that only some models have.", choices=("refuse", "copy")),
    ),
)

MODEL = Shape(
    "a model of 'models'",
    (
        Key("model", "model", "The model.", required=True),
        Key("parameters", "parameters", _PARAMETERS.format("this model")),
    ),
)

SLICE = Shape(
    "a slice",
    (
        Key("sources", "sources", "What the slice is merged from; all ranges have the same length.", required=True),
        Key("base_model", "model", "The base for this slice, in place of the recipe's."),
        Key("parameters", "parameters", _PARAMETERS.format("this slice")),
        Key("residual_weight", "number", "Accepted because mergekit accepts it; has no effect."),
    ),
)

SOURCE = Shape(
    "a source",
    (
        Key("model", "model", "The model.", required=True),
        Key(
            "layer_range",
            "layer_range",
            "First block and the block after the last.",
            required=True,
            hint="as in [0, 16]",
        ),
        Key("parameters", "parameters", _PARAMETERS.format("this model in this slice")),
    ),
)

MODULE = Shape(
    "a module",
    (
        Key("models", "models", "The models to merge, all blocks of each."),
        Key("slices", "slices", "The module's blocks, slice by slice."),
        Key("parameters", "parameters", _PARAMETERS.format("this module")),
    ),
)

REFERENCE = Shape(
    "a model given as a mapping",
    (
        Key("model", "place", "Path or hub id, with an optional revision.", required=True),
        Key("lora", "place", "An adapter that is added to the model."),
        Key("override_architecture", "word", "Accepted because mergekit accepts it; has no effect."),
    ),
)

PLACE = Shape(
    "a model's place",
    (
        Key("path", "word", "A local path or a hub id.", required=True),
        Key("revision", "word", "Branch, tag or commit of a hub id."),
        Key("subfolder", "word", "The folder in it where the model lies."),
    ),
)

ENTRY = Shape(
    "an entry of a parameter",
    (
        Key("value", "value", "A value, or a list of values over the depth.", required=True),
        Key("filter", "filter", "A piece of the tensor's name, '*', a glob over the name, or /a regular expression/."),
        Key("role", "role", "Tensors with this role only.", choices=ROLES),
        Key("component", "word", "Tensors of this component only, such as vision; `geomerge inspect` lists them."),
        Key("block", "block", "This block only, or first-last, both included."),
    ),
)

TOKENIZER = Shape(
    "the tokenizer",
    (
        Key("source", "tokenizer_source", "union (the default), base, or a model."),
        Key("tokens", "tokens", "For single tokens: where their embedding comes from."),
        Key("pad_to_multiple_of", "positive", "Pad the vocabulary to a multiple of this number."),
    ),
)

TOKENS = Shape(
    "the vocabulary",
    (
        Key("policy", "vocabulary", "base, union, intersection, or a model (also as model:<model>).", required=True),
        Key(
            "missing",
            "missing",
            "What a model gets for a token that it lacks: mean (of its own rows), zero, average (of the models that have "
            "it), copy:<model>, or omp (a sparse sum of its own rows). Without it: the base's row, else the average.",
        ),
        Key("sparsity", "positive", "For omp: the most rows in a sum (64)."),
        Key("pad_to", "positive", "Pad the vocabulary to a multiple of this number."),
        Key("chat_template", "template", "As chat_template beside tokens."),
        Key("rules", "tokens", "For single tokens: where their embedding comes from."),
    ),
)

ALIGN = Shape(
    "the alignment",
    (
        Key(
            "scope",
            "choice",
            "What is rotated: the token embedding alone (changes what the model computes), or all of the residual stream.",
            required=True,
            choices=("embedding", "residual"),
        ),
        Key(
            "to", "model", "The model whose basis the others are rotated into; by default the base, or else the first."
        ),
        Key("using", "choice", "What the rotation is found from.", choices=("tokens", "weights")),
        Key("centre", "flag", "Subtract the mean embedding before the rotation is found."),
        Key("normalise", "flag", "Scale the embeddings to length 1 before the rotation is found."),
        Key("weight", "choice", "How much each token counts.", choices=("none", "log_frequency")),
    ),
)

COMPONENT = Shape(
    "a component's rule",
    (Key("copy", "model", "The model from which the component is taken whole.", required=True),),
)

TOKEN = Shape(
    "a token's rule",
    (
        Key("source", "token_source", "A model, another token of a model, or zeros."),
        Key("force", "flag", "Also for models that have the token themselves."),
    ),
)

TOKEN_SOURCE = Shape(
    "a token's source",
    (
        Key("kind", "choice", "What the source is.", required=True, choices=("model_token", "zero")),
        Key("model", "model", "The model whose token it is."),
        Key("token", "word", "The token's text."),
        Key("token_id", "id", "The token's id."),
    ),
)

UNIMPLEMENTED: Mapping[str, str] = {
    "embed_slerp": "mergekit ignores it; remove it",
    "input_model_parameters": "no tool implements it; write the parameters beside each model",
    **dict.fromkeys(
        ("experts", "shared_experts", "gate_mode", "experts_per_token"),
        "this is a mixture of experts: `geomerge moe CONFIG OUT` builds it",
    ),
    "out_path": "the output's place is given on the command line; remove it",
}
"""Keys found in recipes on the web that no version of mergekit in use obeys, and what to say about them."""
