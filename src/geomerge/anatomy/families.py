"""The table of known families: one row a family, nothing but data. A new family is a new row.

A row says how the blocks are called, which part of the model each belongs to, which tensors share storage and which
configuration keys count the layers. Roles come from `roles.py` and need a row's `roles` only where a name misleads.

Names are matched on their ending after an optional prefix, so ``model.layers.0``, ``model.language_model.layers.0``,
``language_model.model.layers.0`` and a base model's bare ``layers.0`` are all Llama blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geomerge.anatomy.roles import Rules


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model with a block numbering of its own.

    Attributes:
        name: As recipes name it; "" when the model has one part.
        within: Components (alternatives, ``a|b``) one of which a tensor's name holds to belong here; "" takes the rest.
        blocks: What stands before a block's number (alternatives, dotted); "" when nothing does, None when the module
            has no blocks.
        counts: Configuration keys that hold the number of blocks, dotted where nested. Every one that is present
            counts; when none is, the first is the one to write.
        numbering: "index": the number in the name; "rank": its rank among those seen; "unet": see `unet.py`.
        component: The component that it belongs to, as recipes name it; `None`: the module's own name.
    """

    name: str
    within: str = ""
    blocks: str | None = None
    counts: tuple[str, ...] = ()
    numbering: str = "index"
    component: str | None = None


@dataclass(frozen=True, slots=True)
class Tie:
    """Two names for one tensor.

    Attributes:
        alias, stored: Endings; the stored name is the one that a tied checkpoint keeps.
        alias_inside, stored_inside: Whether the name carries the base model's prefix (``model.``, ``bert.``).
        always: Tied whatever the configuration says.
    """

    alias: str
    stored: str
    alias_inside: bool = False
    stored_inside: bool = True
    always: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One row.

    Attributes:
        name: What `Anatomy.family` says.
        types, classes: Values of ``model_type``, and of diffusers' ``_class_name``, that mean this family.
        modules: Tried in order; one with an empty `within` comes last and takes what the others leave.
        ties: Pairs that hold when the configuration ties them.
        tied: What a configuration without ``tie_word_embeddings`` means.
        roles: Rules for tensors in blocks (what follows the block's number), before the common ones of `roles.py`.
        loose_roles: The same for the whole names of tensors in no block.
        pre, post, vocabulary: Patterns for tensors in no block, before the common ones.
    """

    name: str
    types: tuple[str, ...]
    modules: tuple[Module, ...]
    ties: tuple[Tie, ...] = ()
    tied: bool = False
    roles: Rules = ()
    loose_roles: Rules = ()
    pre: str = ""
    post: str = ""
    vocabulary: str = ""
    classes: tuple[str, ...] = ()


def _stack(blocks: str, *counts: str) -> tuple[Module, ...]:
    return (Module("", blocks=blocks, counts=counts),)


_LAYERS = _stack("layers", "num_hidden_layers")
_H = _stack("h", "n_layer", "num_hidden_layers", "num_layers", "n_layers")
_BERT = _stack("encoder.layer", "num_hidden_layers")
_VIT = _stack("encoder.layer|encoder.layers|model.layer|layers|blocks", "num_hidden_layers")

_HEAD = (Tie("lm_head.weight", "embed_tokens.weight"),)
_WTE = (Tie("lm_head.weight", "wte.weight"),)
_WORDS = (Tie("lm_head.weight", "word_embeddings.weight"),)
_CLS = (
    Tie("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
    Tie("cls.predictions.decoder.bias", "cls.predictions.bias", stored_inside=False),
)
_LM_HEAD_DECODER = (
    Tie("lm_head.decoder.weight", "embeddings.word_embeddings.weight"),
    Tie("lm_head.decoder.bias", "lm_head.bias", stored_inside=False),
)
_SHARED = (
    Tie("encoder.embed_tokens.weight", "shared.weight", alias_inside=True, always=True),
    Tie("decoder.embed_tokens.weight", "shared.weight", alias_inside=True, always=True),
    Tie("lm_head.weight", "shared.weight"),
)
# BERT's second MLP matrix is called `output.dense`, like the attention's.
_BERT_MLP: Rules = ((r"^(?:intermediate|output)\.dense\.", "mlp"),)
# Gemma 3n widens the residual stream with projections that embed nothing.
_ALTUP: Rules = ((r"altup_(?:unembed_)?projections", "other"),)

_TEXT_COUNTS = (
    "text_config.num_hidden_layers",
    "language_config.num_hidden_layers",
    "llm_config.num_hidden_layers",
    "num_hidden_layers",
)
_PROJECTOR = Module(
    "multi_modal_projector",
    r"multi_modal_projector|mm_projector|projector|merger|merger_list|deepstack_merger_list|connector|aligner|vision_adapter"
    r"|embed_vision|embed_audio|mlp1|img_projection",
    component="projector",
)
_VISION = Module(
    "vision_tower",
    r"vision_tower|visual|vision_model|vision_encoder|vision",
    "blocks|encoder.layers|encoder.layer|transformer.layers|model.layers|layers",
    ("vision_config.num_hidden_layers", "vision_config.depth"),
    component="vision",
)
_AUDIO = Module(
    "audio_tower",
    "audio_tower",
    "layers|conformer",
    ("audio_config.num_hidden_layers", "audio_config.encoder_layers", "audio_config.conf_num_hidden_layers"),
    component="audio",
)
_TEXT = Module("text_decoder", blocks="layers|h", counts=_TEXT_COUNTS, component="language")
_VLM = (_PROJECTOR, _VISION, _TEXT)


def _encoder_decoder(blocks: str, encoder: tuple[str, ...], decoder: tuple[str, ...]) -> tuple[Module, ...]:
    return (
        Module("encoder", "encoder", f"encoder.{blocks}", encoder),
        Module("decoder", "decoder", f"decoder.{blocks}", decoder),
        Module("shared"),
    )


FAMILIES: tuple[Family, ...] = (
    # Decoders with Llama's names
    Family(
        "llama", ("llama", "arcee", "apertus", "smollm3", "solar", "seed_oss", "helium", "nemotron"), _LAYERS, _HEAD
    ),
    Family("mistral", ("mistral", "ministral", "ministral3"), _LAYERS, _HEAD),
    Family("mixtral", ("mixtral", "minimax", "minimax_m2"), _LAYERS, _HEAD),
    Family("yi", ("yi", "Yi"), _LAYERS, _HEAD),
    Family("qwen", ("qwen",), _H, _WTE),
    Family("qwen2", ("qwen2",), _LAYERS, _HEAD),
    Family("qwen2_moe", ("qwen2_moe",), _LAYERS, _HEAD),
    Family("qwen3", ("qwen3", "qwen3_5_text"), _LAYERS, _HEAD),
    Family("qwen3_moe", ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text"), _LAYERS, _HEAD),
    Family("gemma", ("gemma",), _LAYERS, _HEAD, tied=True),
    Family("gemma2", ("gemma2", "vaultgemma"), _LAYERS, _HEAD, tied=True),
    Family("gemma3", ("gemma3_text", "embedding_gemma2_text"), _LAYERS, _HEAD, tied=True),
    Family(
        "gemma3n", ("gemma3n_text", "gemma4_text"), _LAYERS, _HEAD, tied=True, loose_roles=_ALTUP, post="altup_unembed"
    ),
    Family("phi", ("phi",), _LAYERS, _HEAD),
    # microsoft/phi-1 and -2 as first published
    Family(
        "phi-msft",
        ("phi-msft", "mixformer-sequential"),
        _stack("h|layers", "n_layer"),
        vocabulary=r"lm_head\.linear\.(?:weight|bias)$",
    ),
    Family("phi3", ("phi3", "phi4", "phi4flash"), _LAYERS, _HEAD),
    Family("phimoe", ("phimoe",), _LAYERS, _HEAD),
    Family("glm", ("glm", "glm4"), _LAYERS, _HEAD),
    Family("glm4_moe", ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), _LAYERS, _HEAD),
    Family("granite", ("granite",), _LAYERS, _HEAD),
    Family("granitemoe", ("granitemoe", "granitemoeshared", "granitemoehybrid"), _LAYERS, _HEAD),
    Family("cohere", ("cohere", "cohere2"), _LAYERS, _HEAD, tied=True),
    Family("olmo", ("olmo",), _LAYERS, _HEAD),
    Family("olmo2", ("olmo2", "olmo3"), _LAYERS, _HEAD),
    Family("olmoe", ("olmoe", "flex_olmo"), _LAYERS, _HEAD),
    Family("stablelm", ("stablelm", "stablelm_epoch"), _LAYERS, _HEAD),
    Family("starcoder2", ("starcoder2",), _LAYERS, _HEAD, tied=True),
    Family("baichuan", ("baichuan",), _LAYERS, _HEAD),
    Family("internlm", ("internlm", "internlm3"), _LAYERS, _HEAD),
    Family(
        "internlm2",
        ("internlm2",),
        _LAYERS,
        (Tie("output.weight", "tok_embeddings.weight"),),
        loose_roles=((r"(?:^|\.)output\.weight$", "head"),),
        vocabulary=r"(?:^|\.)output\.weight$",
    ),
    Family("deepseek", ("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), _LAYERS, _HEAD),
    Family("exaone4", ("exaone4", "exaone_moe"), _LAYERS, _HEAD),
    Family(
        "exaone",
        ("exaone",),
        _stack("h", "num_layers", "num_hidden_layers"),
        _WTE,
    ),
    Family("gpt_oss", ("gpt_oss",), _LAYERS, _HEAD),
    Family("llama4_text", ("llama4_text",), _LAYERS, _HEAD),
    # `embedding_norm` is LFM2's final norm, and tied models keep it.
    Family("lfm2", ("lfm2", "lfm2_moe"), _LAYERS, _HEAD, tied=True, post=r"(?:^|\.)embedding_norm\."),
    Family("hybrid", ("jamba", "falcon_h1", "bamba", "zamba2"), _LAYERS, _HEAD),
    # Decoders with names of their own
    Family(
        "chatglm",
        ("chatglm",),
        _stack("encoder.layers|layers", "num_layers", "num_hidden_layers"),
        (Tie("output_layer.weight", "embedding.word_embeddings.weight", alias_inside=True),),
    ),
    Family("falcon", ("falcon", "RefinedWeb", "RefinedWebModel"), _H, _WORDS, tied=True),
    Family("bloom", ("bloom",), _H, _WORDS, tied=True),
    Family("gpt2", ("gpt2", "gpt_neo", "jais", "openai-gpt", "imagegpt"), _H, _WTE, tied=True),
    Family("gptj", ("gptj", "codegen"), _H, _WTE),
    Family("gpt_bigcode", ("gpt_bigcode",), _H, _WTE, tied=True),
    Family(
        "gpt_neox",
        ("gpt_neox", "gpt_neox_japanese"),
        _LAYERS,
        (Tie("lm_head.weight", "embed_in.weight"), Tie("embed_out.weight", "embed_in.weight")),
    ),
    Family("mpt", ("mpt",), _stack("blocks", "n_layers"), _WTE, tied=True),
    Family("dbrx", ("dbrx",), _stack("blocks", "n_layers"), _WTE),
    Family(
        "opt",
        ("opt",),
        _stack("decoder.layers", "num_hidden_layers"),
        (Tie("lm_head.weight", "decoder.embed_tokens.weight"),),
        tied=True,
    ),
    Family(
        "mamba",
        ("mamba", "falcon_mamba"),
        _stack("layers", "num_hidden_layers", "n_layer"),
        (Tie("lm_head.weight", "embeddings.weight"),),
        tied=True,
        vocabulary=r"(?:^|\.)embeddings?\.weight$",
    ),
    Family(
        "mamba2",
        ("mamba2",),
        _stack("layers", "num_hidden_layers", "n_layer"),
        (Tie("lm_head.weight", "embeddings.weight"),),
        vocabulary=r"(?:^|\.)embeddings?\.weight$",
    ),
    # Encoders
    Family(
        "bert",
        ("bert", "ernie", "nezha", "megatron-bert", "roc_bert", "layoutlm", "deberta", "deberta-v2"),
        _BERT,
        _CLS,
        tied=True,
        roles=_BERT_MLP,
    ),
    Family(
        "roberta",
        ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "mpnet", "xmod"),
        _BERT,
        _LM_HEAD_DECODER,
        tied=True,
        roles=_BERT_MLP,
    ),
    Family(
        "electra",
        ("electra",),
        _BERT,
        (Tie("generator_lm_head.weight", "embeddings.word_embeddings.weight"),),
        tied=True,
        roles=_BERT_MLP,
    ),
    Family(
        "distilbert",
        ("distilbert",),
        _stack("transformer.layer", "n_layers", "num_hidden_layers"),
        (Tie("vocab_projector.weight", "embeddings.word_embeddings.weight"),),
        tied=True,
    ),
    Family(
        "albert",
        ("albert",),
        _stack("encoder.albert_layer_groups", "num_hidden_groups"),
        (
            Tie("predictions.decoder.weight", "embeddings.word_embeddings.weight"),
            Tie("predictions.decoder.bias", "predictions.bias", stored_inside=False),
        ),
        tied=True,
    ),
    Family(
        "modernbert",
        ("modernbert",),
        _LAYERS,
        (Tie("decoder.weight", "embeddings.tok_embeddings.weight"),),
        tied=True,
        loose_roles=((r"^decoder\.(?:weight|bias)$", "head"),),
        post=r"^head\.",
        vocabulary=r"^decoder\.(?:weight|bias)$",
    ),
    # Encoder and decoder
    Family(
        "t5",
        ("t5", "mt5", "umt5", "longt5", "switch_transformers"),
        _encoder_decoder("block", ("num_layers", "num_hidden_layers"), ("num_decoder_layers",)),
        _SHARED,
        tied=True,
    ),
    Family(
        "bart",
        ("bart", "mbart", "m2m_100", "marian", "pegasus", "blenderbot", "plbart"),
        _encoder_decoder("layers", ("encoder_layers", "num_hidden_layers"), ("decoder_layers",)),
        _SHARED,
        tied=True,
        pre=r"layernorm_embedding",
    ),
    Family(
        "whisper",
        ("whisper",),
        (
            Module("encoder", "encoder", "encoder.layers", ("encoder_layers", "num_hidden_layers")),
            Module("decoder", "", "decoder.layers", ("decoder_layers",)),
        ),
        (Tie("proj_out.weight", "decoder.embed_tokens.weight"),),
        tied=True,
        vocabulary=r"(?:^|\.)proj_out\.weight$",
    ),
    # Vision
    Family("vit", ("vit", "deit", "vit_msn", "vit_mae", "beit", "data2vec-vision", "ijepa"), _VIT, roles=_BERT_MLP),
    Family("dinov2", ("dinov2", "dinov2_with_registers", "dino"), _VIT, roles=_BERT_MLP),
    Family("dinov3", ("dinov3_vit",), _VIT),
    Family(
        "clip",
        ("clip", "chinese_clip", "metaclip_2"),
        (
            Module(
                "vision_model",
                "vision_model|visual|visual_projection",
                "encoder.layers|resblocks",
                ("vision_config.num_hidden_layers",),
                component="vision",
            ),
            Module(
                "text_model",
                "",
                "encoder.layers|encoder.layer|resblocks",
                ("text_config.num_hidden_layers",),
                component="text",
            ),
        ),
    ),
    Family("clip-tower", ("clip_vision_model", "clip_text_model"), _stack("encoder.layers", "num_hidden_layers")),
    Family(
        "siglip",
        ("siglip", "siglip2"),
        (
            Module(
                "vision_model",
                "vision_model",
                "encoder.layers",
                ("vision_config.num_hidden_layers",),
                component="vision",
            ),
            Module("text_model", "", "encoder.layers", ("text_config.num_hidden_layers",), component="text"),
        ),
    ),
    Family(
        "siglip-tower",
        ("siglip_vision_model", "siglip_text_model", "siglip2_vision_model", "siglip2_text_model"),
        _stack("encoder.layers", "num_hidden_layers"),
    ),
    Family(
        "sam",
        ("sam", "sam_hq"),
        (
            Module(
                "vision_encoder",
                "vision_encoder|image_encoder",
                "layers|blocks",
                ("vision_config.num_hidden_layers",),
            ),
            Module(
                "mask_decoder",
                "mask_decoder",
                "transformer.layers",
                ("mask_decoder_config.num_hidden_layers",),
            ),
            Module("prompt_encoder"),
        ),
        # The positional embedding is one random Fourier matrix, registered twice.
        (
            Tie(
                "prompt_encoder.shared_embedding.positional_embedding",
                "shared_image_embedding.positional_embedding",
                stored_inside=False,
                always=True,
            ),
        ),
        post=r"(?:^|\.)neck\.",
    ),
    # Vision and language
    Family("qwen2_vl", ("qwen2_vl", "qwen2_5_vl"), _VLM, _HEAD),
    Family("qwen3_vl", ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), _VLM, _HEAD),
    Family("gemma3-vl", ("gemma3", "shieldgemma2", "paligemma"), _VLM, _HEAD, tied=True),
    Family(
        "gemma3n-vl",
        ("gemma3n", "gemma4"),
        (_PROJECTOR, _VISION, _AUDIO, _TEXT),
        _HEAD,
        tied=True,
        loose_roles=_ALTUP,
        post="altup_unembed",
    ),
    Family("mistral3-vl", ("mistral3", "pixtral"), _VLM, _HEAD),
    Family("llama4-vl", ("llama4",), _VLM, _HEAD),
    Family(
        "llava",
        ("llava", "llava_next", "llava_onevision", "vipllava", "internvl", "cohere2_vision", "aya_vision"),
        _VLM,
        _HEAD,
    ),
    Family("idefics", ("idefics2", "idefics3", "smolvlm"), _VLM, _HEAD),
    Family("mllama", ("mllama",), _VLM, _HEAD),
    Family("glm4v", ("glm4v", "glm4v_moe", "glm46v"), _VLM, _HEAD),
    Family("qwen2_audio", ("qwen2_audio", "voxtral"), (_PROJECTOR, _AUDIO, _TEXT), _HEAD),
    Family(
        "phi4-multimodal",
        ("phi4mm", "phi4_multimodal", "phi3_v"),
        (
            _PROJECTOR,
            Module("audio_tower", "audio_embed", "encoders", ("audio_config.num_blocks",), component="audio"),
            Module(
                "vision_tower",
                "image_embed|vision_embed_tokens",
                "encoder.layers",
                ("vision_config.num_hidden_layers",),
                component="vision",
            ),
            Module("text_decoder", blocks="layers", counts=("num_hidden_layers",), component="language"),
        ),
        _HEAD,
    ),
    # Diffusion (diffusers' names). A DiT block's attention and MLP carry the usual names; modulation is "other".
    Family(
        "unet",
        (),
        (Module("", blocks="down_blocks", numbering="unet"),),
        classes=("UNet2DConditionModel", "UNet2DModel", "ControlNetModel", "UNetMotionModel", "UNet3DConditionModel"),
    ),
    Family(
        "autoencoder-kl",
        (),
        (
            Module("encoder", "encoder|quant_conv", "down_blocks", numbering="unet"),
            Module("decoder", "", "up_blocks", numbering="unet"),
        ),
        classes=("AutoencoderKL",),
        pre=r"^post_quant_conv\.",
        post=r"^quant_conv\.",
    ),
    Family(
        "flux",
        (),
        (
            Module(
                "single", "single_transformer_blocks", "single_transformer_blocks", ("num_single_layers",), component=""
            ),
            Module(
                "double",
                "",
                "transformer_blocks|joint_transformer_blocks",
                ("num_layers", "num_mmdit_layers"),
                component="",
            ),
        ),
        # In a single block, `proj_out` closes attention and MLP at once; most of its columns are the MLP's.
        roles=((r"^proj_(?:mlp|out)\.", "mlp"),),
        classes=("FluxTransformer2DModel", "AuraFlowTransformer2DModel", "HunyuanVideoTransformer3DModel"),
    ),
    Family(
        "dit",
        (),
        _stack("transformer_blocks|blocks", "num_layers"),
        classes=(
            "DiTTransformer2DModel",
            "Transformer2DModel",
            "PixArtTransformer2DModel",
            "SD3Transformer2DModel",
            "HunyuanDiT2DModel",
            "SanaTransformer2DModel",
            "CogVideoXTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "WanTransformer3DModel",
            "QwenImageTransformer2DModel",
        ),
    ),
)

_BY_TYPE = {key: family for family in FAMILIES for key in family.types}
_BY_CLASS = {key: family for family in FAMILIES for key in family.classes}


def find(config: Mapping[str, Any] | None) -> Family | None:
    """The row for a configuration: by ``model_type``, else by diffusers' ``_class_name``; None when there is none."""
    if not config:
        return None
    model_type, class_name = config.get("model_type"), config.get("_class_name")
    if isinstance(model_type, str) and model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    return _BY_CLASS.get(class_name) if isinstance(class_name, str) else None
