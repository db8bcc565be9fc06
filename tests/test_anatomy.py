"""The anatomy of real architectures: names and shapes of tiny models that transformers builds on the meta device."""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import pytest

from geomerge.anatomy import ROLES, Anatomy, read, rename

DECODER = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS_OF_8 = DECODER | {"head_dim": 8}
ENCODER = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
GPT = {"vocab_size": 96, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SPEECH = {
    "vocab_size": 96,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "embed_dim": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": 16,
}
T5 = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
SAM = {
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "output_channels": 16,
        "mlp_dim": 24,
        "global_attn_indexes": [1],
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 24, "iou_head_hidden_dim": 16},
}

CAUSAL, MASKED, SEQ2SEQ, IMAGE_TEXT = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
)
SIGLIP = VISION | {"model_type": "siglip_vision_model"}


def vlm(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision}


@functools.cache
def _built(model_type: str, head: str, settings: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(model_type, **json.loads(settings))
        made = getattr(transformers, head)
        model = made.from_config(config) if head.startswith("Auto") else made(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # What `save_pretrained` writes: the values that differ from the library's defaults.
    return shapes, json.loads(config.to_json_string(use_diff=True))


def built(model_type: str, head: str, settings: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Names and shapes of a tiny model, and its configuration as saved."""
    return _built(model_type, head, json.dumps(settings))


# model type, head, settings, family, blocks a module, roles of typical tensors, tied pairs among the stored names
LM = {"lm_head.weight": "model.embed_tokens.weight"}
LLAMA_ROLES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.1.self_attn.q_proj.weight": "attention",
    "model.layers.1.mlp.down_proj.weight": "mlp",
    "model.layers.2.input_layernorm.weight": "norm",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}
MOE_ROLES = {
    "model.layers.2.mlp.gate.weight": "router",
    "model.layers.2.mlp.experts.gate_up_proj": "expert",
    "model.layers.2.self_attn.o_proj.weight": "attention",
    "model.layers.2.post_attention_layernorm.weight": "norm",
}
VL_BLOCKS = {"multi_modal_projector": 0, "vision_tower": 2, "text_decoder": 3}
VL_LM = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
VL_ROLES = {
    "model.language_model.layers.0.self_attn.q_proj.weight": "attention",
    "model.language_model.layers.0.mlp.up_proj.weight": "mlp",
    "model.language_model.norm.weight": "norm",
    "lm_head.weight": "head",
}
BERT_TIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
CASES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, int], dict[str, str], dict[str, str]]] = {
    "llama": ("llama", CAUSAL, DECODER, "llama", {"": 3}, LLAMA_ROLES, {}),
    "llama-tied": ("llama", CAUSAL, DECODER | {"tie_word_embeddings": True}, "llama", {"": 3}, LLAMA_ROLES, LM),
    "llama-base": (
        "llama",
        "AutoModel",
        DECODER,
        "llama",
        {"": 3},
        {"embed_tokens.weight": "embedding", "layers.0.mlp.up_proj.weight": "mlp", "norm.weight": "norm"},
        {},
    ),
    "llama-classifier": (
        "llama",
        "AutoModelForSequenceClassification",
        DECODER,
        "llama",
        {"": 3},
        {"score.weight": "head", "model.layers.0.mlp.up_proj.weight": "mlp"},
        {},
    ),
    "mistral": ("mistral", CAUSAL, DECODER, "mistral", {"": 3}, LLAMA_ROLES, {}),
    "mixtral": ("mixtral", CAUSAL, DECODER | EXPERTS, "mixtral", {"": 3}, MOE_ROLES, {}),
    "qwen2": ("qwen2", CAUSAL, DECODER, "qwen2", {"": 3}, LLAMA_ROLES, {}),
    "qwen2_moe": (
        "qwen2_moe",
        CAUSAL,
        DECODER | EXPERTS | {"shared_expert_intermediate_size": 8},
        "qwen2_moe",
        {"": 3},
        MOE_ROLES
        | {
            "model.layers.0.mlp.shared_expert.up_proj.weight": "expert",
            "model.layers.0.mlp.shared_expert_gate.weight": "router",
        },
        {},
    ),
    "qwen3": (
        "qwen3",
        CAUSAL,
        HEADS_OF_8,
        "qwen3",
        {"": 3},
        LLAMA_ROLES | {"model.layers.0.self_attn.q_norm.weight": "norm"},
        {},
    ),
    "qwen3_moe": ("qwen3_moe", CAUSAL, HEADS_OF_8 | EXPERTS, "qwen3_moe", {"": 3}, MOE_ROLES, {}),
    "gemma": ("gemma", CAUSAL, HEADS_OF_8, "gemma", {"": 3}, LLAMA_ROLES, LM),
    "gemma2": (
        "gemma2",
        CAUSAL,
        HEADS_OF_8,
        "gemma2",
        {"": 3},
        LLAMA_ROLES | {"model.layers.0.pre_feedforward_layernorm.weight": "norm"},
        LM,
    ),
    "gemma3_text": ("gemma3_text", CAUSAL, HEADS_OF_8, "gemma3", {"": 3}, LLAMA_ROLES, LM),
    "phi": (
        "phi",
        CAUSAL,
        DECODER,
        "phi",
        {"": 3},
        {
            "model.layers.0.self_attn.dense.weight": "attention",
            "model.layers.0.mlp.fc1.bias": "mlp",
            "model.final_layernorm.bias": "norm",
            "lm_head.bias": "head",
        },
        {},
    ),
    "phi3": (
        "phi3",
        CAUSAL,
        DECODER,
        "phi3",
        {"": 3},
        {"model.layers.0.self_attn.qkv_proj.weight": "attention", "model.layers.0.mlp.gate_up_proj.weight": "mlp"},
        {},
    ),
    "glm4": (
        "glm4",
        CAUSAL,
        HEADS_OF_8,
        "glm",
        {"": 3},
        {
            "model.layers.0.mlp.gate_up_proj.weight": "mlp",
            "model.layers.0.post_mlp_layernorm.weight": "norm",
            "model.layers.0.self_attn.q_proj.bias": "attention",
        },
        {},
    ),
    "granite": ("granite", CAUSAL, DECODER, "granite", {"": 3}, LLAMA_ROLES, {}),
    "cohere": ("cohere", CAUSAL, DECODER, "cohere", {"": 3}, LLAMA_ROLES, LM),
    "olmo2": (
        "olmo2",
        CAUSAL,
        DECODER,
        "olmo2",
        {"": 3},
        {"model.layers.0.self_attn.k_norm.weight": "norm", "model.layers.0.post_feedforward_layernorm.weight": "norm"},
        {},
    ),
    "stablelm": ("stablelm", CAUSAL, DECODER, "stablelm", {"": 3}, LLAMA_ROLES, {}),
    "starcoder2": (
        "starcoder2",
        CAUSAL,
        DECODER,
        "starcoder2",
        {"": 3},
        {"model.layers.0.mlp.c_proj.weight": "mlp", "model.layers.0.self_attn.o_proj.bias": "attention"},
        LM,
    ),
    "deepseek_v3": (
        "deepseek_v3",
        CAUSAL,
        DECODER | EXPERTS | LATENT | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        "deepseek",
        {"": 3},
        {
            "model.layers.0.mlp.gate_proj.weight": "mlp",
            "model.layers.1.mlp.gate.weight": "router",
            "model.layers.1.mlp.gate.e_score_correction_bias": "router",
            "model.layers.1.mlp.shared_experts.up_proj.weight": "expert",
            "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": "attention",
            "model.layers.1.self_attn.kv_a_layernorm.weight": "norm",
        },
        {},
    ),
    "falcon": (
        "falcon",
        CAUSAL,
        {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
        "falcon",
        {"": 3},
        {
            "transformer.word_embeddings.weight": "embedding",
            "transformer.h.0.self_attention.query_key_value.weight": "attention",
            "transformer.h.0.mlp.dense_4h_to_h.weight": "mlp",
            "transformer.ln_f.weight": "norm",
        },
        {"lm_head.weight": "transformer.word_embeddings.weight"},
    ),
    "gpt2": (
        "gpt2",
        CAUSAL,
        GPT,
        "gpt2",
        {"": 3},
        {
            "transformer.wpe.weight": "embedding",
            "transformer.h.2.attn.c_proj.weight": "attention",
            "transformer.h.2.mlp.c_proj.weight": "mlp",
            "transformer.h.2.ln_1.weight": "norm",
            "transformer.ln_f.bias": "norm",
        },
        {"lm_head.weight": "transformer.wte.weight"},
    ),
    "gptj": (
        "gptj",
        CAUSAL,
        GPT | {"rotary_dim": 4},
        "gptj",
        {"": 3},
        {"transformer.h.0.mlp.fc_in.weight": "mlp", "transformer.h.0.attn.out_proj.weight": "attention"},
        {},
    ),
    "gpt_bigcode": (
        "gpt_bigcode",
        CAUSAL,
        GPT,
        "gpt_bigcode",
        {"": 3},
        {"transformer.h.0.attn.c_attn.weight": "attention", "transformer.h.0.mlp.c_fc.weight": "mlp"},
        {"lm_head.weight": "transformer.wte.weight"},
    ),
    "gpt_neox": (
        "gpt_neox",
        CAUSAL,
        DECODER,
        "gpt_neox",
        {"": 3},
        {
            "gpt_neox.embed_in.weight": "embedding",
            "gpt_neox.layers.0.attention.dense.weight": "attention",
            "gpt_neox.layers.0.mlp.dense_h_to_4h.bias": "mlp",
            "gpt_neox.final_layer_norm.weight": "norm",
        },
        {},
    ),
    "mamba": (
        "mamba",
        CAUSAL,
        {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4},
        "mamba",
        {"": 3},
        {
            "backbone.embeddings.weight": "embedding",
            "backbone.layers.0.mixer.A_log": "ssm",
            "backbone.layers.0.mixer.conv1d.weight": "ssm",
            "backbone.layers.0.norm.weight": "norm",
            "backbone.norm_f.weight": "norm",
        },
        {"lm_head.weight": "backbone.embeddings.weight"},
    ),
    "bert": (
        "bert",
        MASKED,
        ENCODER,
        "bert",
        {"": 3},
        {
            "bert.embeddings.position_embeddings.weight": "embedding",
            "bert.embeddings.LayerNorm.weight": "norm",
            "bert.encoder.layer.0.attention.output.dense.weight": "attention",
            "bert.encoder.layer.0.attention.output.LayerNorm.bias": "norm",
            "bert.encoder.layer.0.output.dense.weight": "mlp",
            "cls.predictions.transform.dense.weight": "head",
        },
        BERT_TIES,
    ),
    "bert-base": (
        "bert",
        "AutoModel",
        ENCODER,
        "bert",
        {"": 3},
        {"encoder.layer.2.output.dense.weight": "mlp", "pooler.dense.weight": "head"},
        {},
    ),
    "roberta": (
        "roberta",
        MASKED,
        ENCODER,
        "roberta",
        {"": 3},
        {"lm_head.dense.weight": "head", "roberta.encoder.layer.0.intermediate.dense.weight": "mlp"},
        {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"},
    ),
    "distilbert": (
        "distilbert",
        MASKED,
        {"vocab_size": 96, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24},
        "distilbert",
        {"": 3},
        {
            "distilbert.transformer.layer.0.ffn.lin1.weight": "mlp",
            "distilbert.transformer.layer.0.sa_layer_norm.weight": "norm",
            "distilbert.transformer.layer.0.attention.q_lin.weight": "attention",
            "vocab_transform.weight": "head",
        },
        {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ),
    "t5": (
        "t5",
        SEQ2SEQ,
        T5,
        "t5",
        {"encoder": 2, "decoder": 3, "shared": 0},
        {
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "attention",
            "decoder.block.2.layer.1.EncDecAttention.q.weight": "attention",
            "decoder.block.2.layer.2.DenseReluDense.wo.weight": "mlp",
            "decoder.block.2.layer.2.layer_norm.weight": "norm",
            "shared.weight": "embedding",
        },
        {
            "lm_head.weight": "shared.weight",
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        },
    ),
    "whisper": (
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        SPEECH,
        "whisper",
        {"encoder": 2, "decoder": 3},
        {
            "model.encoder.conv1.weight": "conv",
            "model.encoder.embed_positions.weight": "embedding",
            "model.decoder.layers.0.encoder_attn.q_proj.weight": "attention",
            "model.decoder.layers.0.fc1.weight": "mlp",
            "model.decoder.layer_norm.weight": "norm",
        },
        {"proj_out.weight": "model.decoder.embed_tokens.weight"},
    ),
    "vit": (
        "vit",
        "AutoModelForImageClassification",
        VISION,
        "vit",
        {"": 2},
        {
            "vit.embeddings.cls_token": "embedding",
            "vit.embeddings.patch_embeddings.projection.weight": "embedding",
            "vit.layernorm.weight": "norm",
            "classifier.weight": "head",
        },
        {},
    ),
    "dinov2": (
        "dinov2",
        "AutoModel",
        VISION,
        "dinov2",
        {"": 2},
        {"embeddings.mask_token": "embedding", "encoder.layer.0.layer_scale1.lambda1": "norm"},
        {},
    ),
    "clip": (
        "clip",
        "AutoModel",
        vlm(ENCODER, VISION) | {"projection_dim": 16},
        "clip",
        {"vision_model": 2, "text_model": 3},
        {
            "logit_scale": "head",
            "visual_projection.weight": "projector",
            "vision_model.pre_layrnorm.weight": "norm",
            "text_model.encoder.layers.2.mlp.fc2.weight": "mlp",
        },
        {},
    ),
    "siglip": (
        "siglip",
        "AutoModel",
        vlm(ENCODER, VISION),
        "siglip",
        {"vision_model": 2, "text_model": 3},
        {"vision_model.head.attention.in_proj_weight": "head", "text_model.head.weight": "head"},
        {},
    ),
    "sam": (
        "sam",
        "SamModel",
        SAM,
        "sam",
        {"vision_encoder": 3, "mask_decoder": 2, "prompt_encoder": 0},
        {
            "vision_encoder.layers.0.attn.rel_pos_h": "attention",
            "vision_encoder.neck.conv1.weight": "conv",
            "mask_decoder.transformer.layers.1.cross_attn_token_to_image.q_proj.weight": "attention",
            "mask_decoder.iou_prediction_head.layers.0.weight": "head",
            "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight": "head",
            "prompt_encoder.point_embed.0.weight": "embedding",
        },
        {"prompt_encoder.shared_embedding.positional_embedding": "shared_image_embedding.positional_embedding"},
    ),
    "qwen2_vl": (
        "qwen2_vl",
        IMAGE_TEXT,
        vlm(DECODER, QWEN_VISION | {"mlp_ratio": 2}),
        "qwen2_vl",
        VL_BLOCKS,
        VL_ROLES
        | {
            "model.visual.patch_embed.proj.weight": "embedding",
            "model.visual.blocks.1.attn.qkv.weight": "attention",
            "model.visual.merger.mlp.0.weight": "projector",
        },
        {},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        IMAGE_TEXT,
        vlm(HEADS_OF_8, QWEN_VISION | {"deepstack_visual_indexes": [0, 1]}),
        "qwen3_vl",
        VL_BLOCKS,
        VL_ROLES | {"model.visual.deepstack_merger_list.1.linear_fc1.weight": "projector"},
        {},
    ),
    "gemma3": (
        "gemma3",
        IMAGE_TEXT,
        vlm(HEADS_OF_8, SIGLIP),
        "gemma3-vl",
        VL_BLOCKS,
        VL_ROLES | {"model.multi_modal_projector.mm_input_projection_weight": "projector"},
        VL_LM,
    ),
    "llava": (
        "llava",
        IMAGE_TEXT,
        vlm(DECODER | {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}),
        "llava",
        VL_BLOCKS,
        VL_ROLES | {"model.multi_modal_projector.linear_1.weight": "projector"},
        {},
    ),
}


def anatomy(case: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any], Anatomy]:
    shapes, config = built(*CASES[case][:3])
    return shapes, config, read(shapes, config)


@pytest.mark.parametrize("case", CASES)
def test_family_and_blocks(case: str) -> None:
    """The family is recognised, not guessed; every module has its configured number of blocks, each of them filled."""
    _, _, found = anatomy(case)
    assert (found.family, found.guessed, dict(found.depth)) == (CASES[case][3], False, CASES[case][4])
    for module, blocks in found.depth.items():
        assert {p.block for p in found.parts.values() if p.module == module} - {None} == set(range(blocks))


@pytest.mark.parametrize("case", CASES)
def test_roles(case: str) -> None:
    """Typical tensors have the role that their name means, every role is a known one, and none is left without."""
    shapes, _, found = anatomy(case)
    assert {name: found.parts[name].role for name in CASES[case][5]} == CASES[case][5]
    assert list(found.parts) == list(shapes)
    assert {part.role for part in found.parts.values()} <= set(ROLES)
    assert [name for name, part in found.parts.items() if part.role == "other"] == []


@pytest.mark.parametrize("case", CASES)
def test_tied_pairs(case: str) -> None:
    """What transformers ties is tied, in files that hold both names, only the stored one, or only the alias."""
    shapes, config, found = anatomy(case)
    pairs = CASES[case][6]
    assert {alias: stored for alias, stored in found.tied.items() if alias in shapes} == pairs
    without_alias = {name: shape for name, shape in shapes.items() if name not in pairs}
    assert pairs.items() <= read(without_alias, config).tied.items()
    if set(pairs) == {"lm_head.weight"}:
        only_alias = {name: shape for name, shape in shapes.items() if name not in pairs.values()}
        assert read(only_alias, config).tied == found.tied


@pytest.mark.parametrize("case", CASES)
def test_depth_and_position(case: str) -> None:
    """Embeddings stand before the blocks at depth 0, heads behind them at 1, blocks at block / (blocks - 1)."""
    _, _, found = anatomy(case)
    for part in found.parts.values():
        blocks = found.depth[part.module]
        if part.block is None:
            assert part.depth == {"pre": 0.0, "post": 1.0}[part.position]
            assert part.position == {"embedding": "pre", "head": "post"}.get(part.role, part.position)
        else:
            assert part.position == "block"
            assert part.depth == (part.block / (blocks - 1) if blocks > 1 else 0.0)


@pytest.mark.parametrize("case", CASES)
def test_layer_keys_hold_the_layer_counts(case: str) -> None:
    """The keys that count blocks exist in the configuration and hold the number, or are the key that would."""
    _, config, found = anatomy(case)
    assert set(found.layer_keys) == {module for module, blocks in found.depth.items() if blocks}
    for module, keys in found.layer_keys.items():
        assert keys
        for key in keys:
            value: Any = config
            for word in key.split("."):
                value = value.get(word) if isinstance(value, dict) else None
            # SAM's decoder depth is a default and not written.
            assert value == found.depth[module] or (case, value) == ("sam", None)


@pytest.mark.parametrize("case", CASES)
def test_rename_reaches_every_block_and_back(case: str) -> None:
    """Renaming to its own block changes nothing; to another one gives that block's tensor, found again as such."""
    _, config, found = anatomy(case)
    for name, part in found.parts.items():
        assert rename(name, part.block or 0, part) == name
    moved = {rename(name, part.block + 10, part): name for name, part in found.parts.items() if part.block is not None}
    assert len(moved) == sum(part.block is not None for part in found.parts.values())
    again = read(dict.fromkeys(moved, (2, 2)), config)
    for new, old in moved.items():
        before, after = found.parts[old], again.parts[new]
        assert (after.block, after.role, after.module) == (before.block + 10, before.role, before.module)  # type: ignore[operator]


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][2].get("vocab_size") or "text_config" in CASES[c][2]])
def test_vocabulary_axes(case: str) -> None:
    """Every vocabulary tensor has the vocabulary's 96 rows on its axis, and no other tensor of a text model has."""
    shapes, _, found = anatomy(case)
    assert found.vocabulary
    assert {shapes[name][axis] for name, axis in found.vocabulary.items()} == {96}
    assert {name for name, shape in shapes.items() if 96 in shape and found.parts[name].block is None} == set(
        found.vocabulary
    )


def test_only_sam_has_buffers_here() -> None:
    """SAM's random Fourier features are buffers; nothing that is trained passes for one."""
    buffers = {case: sorted(anatomy(case)[2].buffers) for case in CASES}
    names = ["prompt_encoder.shared_embedding.positional_embedding", "shared_image_embedding.positional_embedding"]
    assert {case: found for case, found in buffers.items() if found} == {"sam": names}
