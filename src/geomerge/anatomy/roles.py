"""The table of roles: what a tensor does, where it stands, read off its name.

Names are compared in lower case as *templates*: every component that is a number is written ``#``
(``model.layers.7.mlp.experts.3.w1.weight`` → ``model.layers.#.mlp.experts.#.w1.weight``). A rule is a regular
expression over whole components; the first that matches wins. Two tables, because the same word means different things
inside a block (``output.dense`` is BERT's second MLP matrix) and outside (``output`` is InternLM2's head).

| role | what it holds |
|---|---|
| attention | query, key, value and output projections, relative position tables, attention sinks |
| mlp | the dense feed-forward matrices |
| expert, router | a mixture's experts (shared ones too) and what chooses among them (correction biases too) |
| norm | gains and biases of normalisations, layer-scale vectors, batch-norm statistics |
| embedding | token, position, patch, class and time embeddings |
| head | what turns the last hidden state into an answer: language-model heads, classifiers, poolers, logit scales |
| projector | between two widths or two towers: multimodal projectors, mergers, CLIP's projections |
| conv, ssm | convolutions; state-space and linear-recurrent mixers, their inner convolutions included |
| other | everything else; in diffusion models the modulation (adaLN) and time projections of a block |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Position = Literal["pre", "block", "post"]
Rules = tuple[tuple[str, str], ...]

ROLES = (
    "attention",
    "mlp",
    "norm",
    "embedding",
    "head",
    "expert",
    "router",
    "conv",
    "ssm",
    "projector",
    "other",
)

# The last module's name decides, whatever encloses it: BERT's `attention.output.LayerNorm` is a norm.
# `norm1.linear` (adaLN) is none: its last module is a matrix.
_NORM = (
    r"(?:^|\.)(?:[a-z0-9_]*(?:norm|layrnorm|normalization)[a-z0-9_]*|ln\d*|ln_[a-z0-9_]+|[a-z0-9_]+_ln"
    r"|layer_?scale[a-z0-9_]*|ls\d|lambda_\d|gamma_\d)"
    r"(?:\.(?:#|weight|bias|gamma|beta|scale|lambda\d|running_mean|running_var|num_batches_tracked))*$"
)

BLOCK_RULES: Rules = (
    (_NORM, "norm"),
    (r"(?:^|\.)(?:mlp|[a-z_]*moe[a-z_]*|feed_forward|ffn)\.(?:gate|wg)(?:\.|$)", "router"),
    (r"(?:^|\.)(?:router|shared_expert_gate|moe_statics)(?:\.|$)|(?:e_score_correction|expert)_bias$", "router"),
    (r"(?:^|\.)(?:shared_)?experts?(?:_\d+)?(?:\.|$)", "expert"),
    (r"(?:^|\.)[a-z_]*moe[a-z_]*\.(?:input|output)_linear\.", "expert"),
    # Hybrids that call every token mixer `mixer`.
    (r"(?:^|\.)mixer\.(?:wqkv|[qkvo]_proj)\.", "attention"),
    (r"(?:^|\.)mixer\.(?:up|down)_proj\.", "mlp"),
    (r"(?:^|\.)(?:mixer|mamba\d?|ssm|linear_attn|linear_attention)(?:\.|$)|(?:^|\.)(?:a_log|dt_bias)$", "ssm"),
    (r"(?:^|\.)(?:mlp|ffn|ff|ff_context|feed_?forward|densereludense|shared_mlp|mlp_[a-z]+)\.", "mlp"),
    (r"(?:^|\.)[a-z0-9_]*(?:attn|attention)[a-z0-9_]*(?:\.|$)", "attention"),
    (r"(?:^|\.)(?:w_?qkv|w_pack|[qkv]_proj|o_proj|to_[qkv]|to_out|query_key_value)(?:\.|$)", "attention"),
    (
        (
            r"(?:^|\.)(?:fc_?\d|fc_in|fc_out|c_fc|c_proj|lin\d|linear_?\d|w\d|wi|wo|gate_proj|up_proj|down_proj|gate_up_proj"
            r"|ffn|ffn_output|intermediate|proj_mlp|pwconv\d|dense_h_to_4h|dense_4h_to_h)(?:\.|$)"
        ),
        "mlp",
    ),
    (r"conv", "conv"),
)

LOOSE_RULES: Rules = (
    (_NORM, "norm"),
    (r"(?:^|\.)vocab_(?:projector|transform)\.", "head"),
    (
        (
            r"(?:^|\.)(?:[a-z_]*projector|(?:[a-z_]*_)?merger(?:_list)?|connector|aligner|resampler|[a-z]+_adapter"
            r"|(?:visual|text|feature|img|image)_projection|embeddings_project|embedding_hidden_mapping_in|project_(?:in|out)"
            r"|mm_[a-z_]*projection_weight|embed_(?:vision|audio)\.embedding_projection)(?:\.|$)"
        ),
        "projector",
    ),
    (
        (
            r"(?:^|\.)(?:[a-z_]*heads?|score|(?:pre_)?classifier|cls|[a-z_]*predictions"
            r"|qa_outputs|pooler|embed_out|output_layer|proj_out(?:_\d)?|[a-z_]*lm_head|seq_relationship|final_logits_bias"
            r"|logit_(?:scale|bias)|output_hypernetworks_mlps|final_layer|conv_out|iou_prediction_head|summary)(?:\.|$)"
        ),
        "head",
    ),
    (
        r"(?:^|\.)(?:[a-z0-9_]*(?:embed|embd)[a-z0-9_]*|wte|wpe|shared|patch_conv|probe|[a-z_]*_tokens?|image_newline)(?:\.|$)",
        "embedding",
    ),
)

# Names that mean a classifier (torchvision) or a language model's head (Llama as its authors store it) at the root alone.
_ROOT_RULES: Rules = ((r"^(?:fc|output)\.(?:weight|bias)$", "head"),)

# Outside the blocks: what stands before them. Everything else but embeddings and first convolutions stands after.
_PRE = re.compile(
    r"embed|embd|\bw[tp]e\b|(?:^|\.)(?:ln_pre|pre_layrnorm|layernorm_pre|conv_in|conv\d?|patch_conv|project_in"
    r"|relative_attention_bias|prompt_encoder|feature_extractor|feature_projection|altup_projections"
    r"|per_layer_[a-z_]+|caption_projection)(?:\.|$)"
)

# Never merged: they are computed from the configuration, count steps, or mask. A four-dimensional `attn.bias` is a
# causal mask (GPT-2, GPT-Neo, GPT-NeoX, GPT-J); a one-dimensional one is a bias.
_BUFFER = re.compile(
    r"(?:^|\.)(?:[a-z_]*inv_freq|position_ids|token_type_ids|masked_bias|num_batches_tracked|relative_position_index"
    r"|relative_coords_table|(?:cos|sin)_cached|causal_mask|attn_mask|shared_image_embedding\.positional_embedding"
    r"|prompt_encoder\.shared_embedding\.positional_embedding|pe_layer\.positional_encoding_gaussian_matrix)$"
)
_MASK = re.compile(r"(?:^|\.)(?:attn|attention)\.bias$")

_VOCABULARY = re.compile(
    r"(?:^|\.)(?:(?:embed_tokens(?:_per_layer)?|word_embeddings|tok_embeddings|token_embeddings?|wte|embed_in|shared|lm_head"
    r"|embed_out|output_layer|vocab_projector|generator_lm_head|predictions\.decoder|lm_head\.decoder)\.(?:weight|bias)"
    r"|(?:cls\.)?predictions\.bias)$"
)


def _first(rules: Iterable[tuple[str, str]], name: str) -> str | None:
    return next((role for pattern, role in rules if re.search(pattern, name)), None)


def role_in_block(name: str, extra: Rules = ()) -> str:
    """The role of a tensor inside a block.

    Args:
        name: The rest of the template after the block's number, in lower case.
        extra: The family's own rules, tried first.
    """
    return _first(extra, name) or _first(BLOCK_RULES, name) or _first(LOOSE_RULES, name) or "other"


def role_outside(name: str, extra: Rules = ()) -> str:
    """The role of a tensor that is in no block; `name` is the whole template in lower case."""
    return _first((*extra, *_ROOT_RULES, *LOOSE_RULES, *BLOCK_RULES), name) or "other"


def position_outside(name: str, role: str, pre: str = "", post: str = "") -> Position:
    """Whether a tensor that is in no block stands before or after the blocks.

    Args:
        name: The whole template in lower case.
        role: Its role.
        pre, post: The family's own patterns, tried first; an empty one matches nothing.
    """
    if post and re.search(post, name):
        return "post"
    if (pre and re.search(pre, name)) or role == "embedding":
        return "pre"
    return "pre" if role != "head" and "unembed" not in name and _PRE.search(name) else "post"


def buffer_rank(name: str) -> int | None:
    """Whether a template names a buffer: None no, 0 always, 4 when it has four dimensions."""
    if _BUFFER.search(name):
        return 0
    return 4 if _MASK.search(name) else None


def vocabulary_axis(name: str, extra: str = "") -> int | None:
    """The axis of a tensor that runs over the vocabulary, None when none does; `extra` is the family's own pattern."""
    if name.endswith("final_logits_bias"):
        return 1
    return 0 if _VOCABULARY.search(name) or (extra and re.search(extra, name)) else None
