"""Anatomy of names as they stand on disk, which no library builds in memory any more, and of what no row knows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from geomerge.anatomy import read, rename, summary
from geomerge.anatomy.families import FAMILIES
from geomerge.errors import UsageError

Shapes = dict[str, tuple[int, ...]]


def roles(names: list[str], config: dict[str, Any] | None) -> dict[str, str]:
    return {name: part.role for name, part in read(dict.fromkeys(names, (4, 4)), config).parts.items()}


def test_no_type_names_two_families() -> None:
    """A configuration means one row."""
    keys = [key for family in FAMILIES for key in (*family.types, *family.classes)]
    assert len(keys) == len(set(keys))
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


MIXTURES = {
    "mixtral": (
        "mixtral",
        {
            "model.layers.3.block_sparse_moe.gate.weight": "router",
            "model.layers.3.block_sparse_moe.experts.5.w1.weight": "expert",
            "model.layers.3.block_sparse_moe.experts.5.w2.weight": "expert",
            "model.layers.3.self_attn.q_proj.weight": "attention",
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "model.layers.3.mlp.gate.weight": "router",
            "model.layers.3.mlp.experts.17.gate_proj.weight": "expert",
            "model.layers.3.mlp.shared_expert.gate_proj.weight": "expert",
            "model.layers.3.mlp.shared_expert_gate.weight": "router",
        },
    ),
    "deepseek_v3": (
        "deepseek",
        {
            "model.layers.0.mlp.gate_proj.weight": "mlp",
            "model.layers.3.mlp.gate.weight": "router",
            "model.layers.3.mlp.experts.255.down_proj.weight": "expert",
            "model.layers.3.mlp.shared_experts.down_proj.weight": "expert",
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "model.layers.3.block_sparse_moe.router.layer.weight": "router",
            "model.layers.3.block_sparse_moe.input_linear.weight": "expert",
            "model.layers.3.block_sparse_moe.output_linear.weight": "expert",
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "model.layers.3.mlp.router.bias": "router",
            "model.layers.3.mlp.experts.gate_up_proj_blocks": "expert",
            "model.layers.3.mlp.experts.down_proj_bias": "expert",
            "model.layers.3.self_attn.sinks": "attention",
        },
    ),
    "phimoe": ("phimoe", {"model.layers.3.block_sparse_moe.experts.0.w3.weight": "expert"}),
}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_on_disk(model_type: str) -> None:
    """Published mixtures keep one tensor an expert; those names have the roles, and the blocks, of the fused ones."""
    family, expected = MIXTURES[model_type]
    assert roles(list(expected), {"model_type": model_type}) == expected
    found = read(dict.fromkeys(expected, (4, 4)), {"model_type": model_type})
    assert (found.family, found.depth) == (family, {"": 4})


def test_rename_leaves_the_experts_number() -> None:
    """Only the block's number changes, even when the expert's is the same."""
    name = "model.layers.3.mlp.experts.3.down_proj.weight"
    part = read({name: (2, 2)}, {"model_type": "qwen3_moe"}).parts[name]
    assert rename(name, 41, part) == "model.layers.41.mlp.experts.3.down_proj.weight"


OLD_NAMES = [
    ("qwen", "transformer.h.1.attn.c_attn.bias", "attention"),
    ("qwen", "transformer.h.1.mlp.w2.weight", "mlp"),
    ("qwen", "transformer.h.1.ln_2.weight", "norm"),
    ("baichuan", "model.layers.1.self_attn.W_pack.weight", "attention"),
    ("internlm2", "model.layers.1.attention.wqkv.weight", "attention"),
    ("internlm2", "model.layers.1.feed_forward.w1.weight", "mlp"),
    ("chatglm", "transformer.encoder.layers.1.self_attention.query_key_value.weight", "attention"),
    ("chatglm", "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight", "mlp"),
    ("phi-msft", "transformer.h.1.mixer.Wqkv.weight", "attention"),
    ("vit", "vit.encoder.layer.1.attention.attention.query.weight", "attention"),
    ("vit", "vit.encoder.layer.1.attention.output.dense.weight", "attention"),
    ("vit", "vit.encoder.layer.1.intermediate.dense.weight", "mlp"),
    ("vit", "vit.encoder.layer.1.output.dense.weight", "mlp"),
    ("vit", "vit.encoder.layer.1.layernorm_before.weight", "norm"),
    ("falcon", "transformer.h.1.self_attention.dense.weight", "attention"),
    ("gpt2", "h.1.attn.c_attn.weight", "attention"),
    ("mpt", "transformer.blocks.1.attn.Wqkv.weight", "attention"),
    ("mpt", "transformer.blocks.1.ffn.up_proj.weight", "mlp"),
    ("dbrx", "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight", "attention"),
    ("dbrx", "transformer.blocks.1.norm_attn_norm.norm_2.weight", "norm"),
    ("dbrx", "transformer.blocks.1.ffn.router.layer.weight", "router"),
    ("dbrx", "transformer.blocks.1.ffn.experts.mlp.w1", "expert"),
    ("t5", "encoder.block.1.layer.1.DenseReluDense.wi_0.weight", "mlp"),
    ("clip", "visual.transformer.resblocks.1.attn.in_proj_weight", "attention"),
    ("sam", "image_encoder.blocks.1.mlp.lin1.weight", "mlp"),
]


@pytest.mark.parametrize(("model_type", "name", "role"), OLD_NAMES)
def test_published_spellings(model_type: str, name: str, role: str) -> None:
    """Names of published checkpoints that current libraries spell otherwise: block 1, and the right role."""
    found = read({name: (2, 2)}, {"model_type": model_type})
    assert not found.guessed
    assert (found.parts[name].block, found.parts[name].role) == (1, role)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.", "lm_head.weight"),
        ("", "lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
    ],
)
def test_prefixes(prefix: str, head: str) -> None:
    """The same text model under any prefix has the same parts, and its head the name that goes with the prefix."""
    names = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "layers.7.input_layernorm.weight", "norm.weight"]
    found = read({prefix + name: (8, 8) for name in names}, {"model_type": "gemma3"})
    assert found.depth == {"text_decoder": 8}
    assert [found.parts[prefix + name].role for name in names] == ["embedding", "mlp", "norm", "norm"]
    assert [found.parts[prefix + name].depth for name in names] == [0.0, 0.0, 1.0, 1.0]
    assert found.tied == {head: prefix + "embed_tokens.weight"}
    assert found.vocabulary == {prefix + "embed_tokens.weight": 0}


def test_vision_language_modules_on_disk() -> None:
    """Qwen2-VL's flat published names fall into the same three modules as today's nested ones."""
    names = {
        "visual.patch_embed.proj.weight": "vision_tower",
        "visual.blocks.31.attn.qkv.weight": "vision_tower",
        "visual.merger.ln_q.weight": "multi_modal_projector",
        "visual.merger.mlp.0.weight": "multi_modal_projector",
        "model.embed_tokens.weight": "text_decoder",
        "model.layers.27.mlp.up_proj.weight": "text_decoder",
        "lm_head.weight": "text_decoder",
    }
    config = {"model_type": "qwen2_vl", "num_hidden_layers": 28, "vision_config": {"depth": 32}}
    found = read(dict.fromkeys(names, (2, 2)), config)
    assert {name: part.module for name, part in found.parts.items()} == names
    assert found.depth == {"multi_modal_projector": 0, "vision_tower": 32, "text_decoder": 28}
    assert found.layer_keys == {"vision_tower": ("vision_config.depth",), "text_decoder": ("num_hidden_layers",)}


LLAMA = {"model.embed_tokens.weight": (9, 2), "model.layers.0.mlp.up_proj.weight": (2, 2), "lm_head.weight": (9, 2)}
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, {}),
        ({"model_type": "llama", "tie_word_embeddings": True}, TIED),
        ({"model_type": "llama", "tie_word_embeddings": False}, {}),
        ({"model_type": "gemma2"}, TIED),
        ({"model_type": "gemma2", "tie_word_embeddings": False}, {}),
        ({"model_type": "qwen3_vl", "text_config": {"tie_word_embeddings": True}}, TIED),
        ({"model_type": "qwen3_vl", "tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, {}),
        ({"model_type": "new_model", "tie_word_embeddings": True}, TIED),
        ({"model_type": "new_model"}, {}),
        (None, {}),
    ],
)
def test_tie_flag(config: dict[str, Any] | None, expected: dict[str, str]) -> None:
    """The configuration's flag rules, the outer one first; else the family's default; unknown models tie on request."""
    assert read(LLAMA, config).tied == expected


def test_t5_v1_1_keeps_its_head_but_shares_embeddings() -> None:
    """`tie_word_embeddings: false` unties T5's head only: both stacks embed with the shared matrix by construction."""
    names = ["shared.weight", "encoder.block.0.layer.0.layer_norm.weight", "lm_head.weight"]
    found = read(dict.fromkeys(names, (2, 2)), {"model_type": "t5", "tie_word_embeddings": False})
    assert found.tied == {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


def test_buffers() -> None:
    """Masks, rotary frequencies and position ids are buffers; a bias of the same name as a mask is none."""
    shapes: Shapes = {
        "h.0.attn.bias": (1, 1, 8, 8),
        "h.0.attn.masked_bias": (),
        "h.1.attn.bias": (8,),
        "h.0.attn.c_attn.bias": (24,),
        "h.0.attn.rotary_emb.inv_freq": (4,),
        "embeddings.position_ids": (1, 8),
    }
    assert read(shapes, {"model_type": "gpt2"}).buffers == {
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "h.0.attn.rotary_emb.inv_freq",
        "embeddings.position_ids",
    }


def test_multi_token_prediction_layers_stand_behind_the_blocks() -> None:
    """DeepSeek-V3 numbers its extra layer after the last block: it counts as no block, yet can be renumbered."""
    shapes: Shapes = {f"model.layers.{i}.mlp.gate.weight": (2, 2) for i in range(5)}
    shapes |= {"model.layers.4.eh_proj.weight": (2, 4), "model.layers.4.embed_tokens.weight": (9, 2)}
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    found = read(shapes, config)
    assert found.depth == {"": 4}
    extra = found.parts["model.layers.4.mlp.gate.weight"]
    assert (extra.block, extra.depth, extra.position, extra.role) == (None, 1.0, "post", "router")
    assert rename(extra.name, 8, extra) == "model.layers.8.mlp.gate.weight"
    assert found.parts["model.layers.3.mlp.gate.weight"].depth == 1.0
    assert found.tied == {}


def test_layers_beside_the_model_are_no_blocks() -> None:
    """Qwen3-Next's `mtp.layers.0` does not pass for block 0."""
    shapes: Shapes = {f"model.layers.{i}.self_attn.q_proj.weight": (2, 2) for i in range(3)}
    shapes["mtp.layers.0.self_attn.q_proj.weight"] = (2, 2)
    part = read(shapes, {"model_type": "qwen3_next"}).parts["mtp.layers.0.self_attn.q_proj.weight"]
    assert (part.block, part.position, part.role) == (None, "post", "attention")


def unet_names(up: int = 3) -> list[str]:
    """Stable Diffusion 1.x, one tensor for each place."""
    names = ["conv_in.weight", "time_embedding.linear_1.weight"]
    for stage in range(4):
        names += [f"down_blocks.{stage}.resnets.{unit}.conv1.weight" for unit in range(2)]
        if stage < 3:
            names += [
                f"down_blocks.{stage}.attentions.{unit}.transformer_blocks.0.ff.net.0.proj.weight" for unit in range(2)
            ]
            names.append(f"down_blocks.{stage}.downsamplers.0.conv.weight")
    names += ["mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    for stage in range(4):
        names += [f"up_blocks.{stage}.resnets.{unit}.norm1.weight" for unit in range(up)]
        if stage < 3:
            names.append(f"up_blocks.{stage}.upsamplers.0.conv.weight")
    return [*names, "conv_norm_out.weight", "conv_out.weight"]


@pytest.mark.parametrize("config", [{"_class_name": "UNet2DConditionModel"}, None])
def test_unet_blocks_are_numbered_as_people_merge_them(config: dict[str, Any] | None) -> None:
    """IN01…IN11, M00, OUT00…OUT11 are blocks 0 to 23; resamplers fall where the original numbering has them."""
    found = read(dict.fromkeys(unet_names(), (2, 2)), config)
    assert (found.family, found.guessed, found.depth) == ("unet", config is None, {"": 24})
    expected = {
        "down_blocks.0.resnets.0.conv1.weight": (0, "conv"),  # IN01
        "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight": (1, "mlp"),  # IN02
        "down_blocks.0.downsamplers.0.conv.weight": (2, "conv"),  # IN03
        "down_blocks.3.resnets.1.conv1.weight": (10, "conv"),  # IN11
        "mid_block.resnets.0.conv1.weight": (11, "conv"),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (11, "attention"),
        "up_blocks.0.resnets.0.norm1.weight": (12, "norm"),  # OUT00
        "up_blocks.0.upsamplers.0.conv.weight": (14, "conv"),  # OUT02
        "up_blocks.3.resnets.2.norm1.weight": (23, "norm"),  # OUT11
    }
    assert {name: (found.parts[name].block, found.parts[name].role) for name in expected} == expected
    assert found.parts["conv_in.weight"].position == "pre"
    assert [found.parts[name].position for name in ("conv_norm_out.weight", "conv_out.weight")] == ["post", "post"]


def test_unet_blocks_cannot_be_renumbered() -> None:
    """A U-shaped network's block is not in the name: renaming is refused with the tensor's name, not done wrongly."""
    found = read(dict.fromkeys(unet_names(), (2, 2)), None)
    name = "up_blocks.0.resnets.0.norm1.weight"
    with pytest.raises(UsageError, match=r"up_blocks\.0\.resnets\.0.*block 12"):
        rename(name, 3, found.parts[name])


def test_flux_and_dit() -> None:
    """Flux numbers its double and single blocks apart; a DiT has one stack; modulation is no norm."""
    names = {
        "x_embedder.weight": ("double", None, "embedding"),
        "transformer_blocks.18.attn.to_q.weight": ("double", 18, "attention"),
        "transformer_blocks.18.ff_context.net.2.weight": ("double", 18, "mlp"),
        "transformer_blocks.18.norm1.linear.weight": ("double", 18, "other"),
        "single_transformer_blocks.37.attn.norm_q.weight": ("single", 37, "norm"),
        "single_transformer_blocks.37.proj_mlp.weight": ("single", 37, "mlp"),
        "single_transformer_blocks.37.proj_out.weight": ("single", 37, "mlp"),
        "proj_out.weight": ("double", None, "head"),
    }
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 19, "num_single_layers": 38}
    found = read(dict.fromkeys(names, (2, 2)), config)
    assert {n: (p.module, p.block, p.role) for n, p in found.parts.items()} == names
    assert found.depth == {"single": 38, "double": 19}
    assert found.layer_keys == {"single": ("num_single_layers",), "double": ("num_layers",)}
    assert found.vocabulary == {}

    dit = ["pos_embed.proj.weight", "transformer_blocks.27.attn1.to_out.0.bias", "proj_out_2.weight"]
    found = read(dict.fromkeys(dit, (2, 2)), {"_class_name": "DiTTransformer2DModel"})
    assert [part.role for part in found.parts.values()] == ["embedding", "attention", "head"]
    assert (found.family, found.depth) == ("dit", {"": 28})


def test_unknown_architecture_is_guessed() -> None:
    """Names alone give stacks, roles, the tied pair and the layer count's key; the anatomy says it guessed."""
    shapes: Shapes = {"net.tok_embeddings.weight": (50, 4), "net.final_norm.weight": (4,), "lm_head.weight": (50, 4)}
    for i in range(6):
        shapes |= {f"net.trunk.{i}.attn.q_proj.weight": (4, 4), f"net.trunk.{i}.ffn.up.weight": (8, 4)}
        shapes[f"net.trunk.{i}.attn_norm.weight"] = (4,)
    config = {"model_type": "unheard_of", "n_layer": 6, "tie_word_embeddings": True}
    found = read(shapes, config)
    assert (found.family, found.guessed, found.depth) == ("generic", True, {"": 6})
    assert found.layer_keys == {"": ("n_layer",)}
    assert found.tied == {"lm_head.weight": "net.tok_embeddings.weight"}
    assert found.vocabulary == {"net.tok_embeddings.weight": 0, "lm_head.weight": 0}
    part = found.parts["net.trunk.3.ffn.up.weight"]
    assert (part.block, part.depth, part.role) == (3, 0.6, "mlp")
    assert rename(part.name, 9, part) == "net.trunk.9.ffn.up.weight"


def test_unknown_towers_become_modules() -> None:
    """Two stacks are two modules, each with its own numbering; loose tensors go with the path that they share."""
    shapes: Shapes = {"vision.norm.weight": (4,), "text.norm.weight": (4,), "text.embed_tokens.weight": (9, 4)}
    for i in range(3):
        shapes |= {f"vision.layers.{i}.{n}.weight": (4, 4) for n in ("attn.qkv", "mlp.fc1")}
    for i in range(5):
        shapes |= {f"text.layers.{i}.{n}.weight": (4, 4) for n in ("attn.qkv", "mlp.fc1")}
    config = {"text_config": {"num_hidden_layers": 5}, "vision_config": {"depth": 3}}
    found = read(shapes, config)
    assert found.depth == {"vision": 3, "text": 5}
    assert found.layer_keys == {"vision": ("vision_config.depth",), "text": ("text_config.num_hidden_layers",)}
    assert found.parts["vision.norm.weight"].module == "vision"
    assert (
        found.parts["vision.layers.2.attn.qkv.weight"].depth == found.parts["text.layers.4.mlp.fc1.weight"].depth == 1
    )


def test_sequential_network() -> None:
    """A plain list of layers is a stack; with gaps in its numbers its blocks cannot be renumbered."""
    found = read({f"{i}.{leaf}": (2, 2) for i in (0, 2, 4) for leaf in ("weight", "bias")}, None)
    assert (found.guessed, found.depth) == (True, {"": 3})
    assert [found.parts[f"{i}.weight"].block for i in (0, 2, 4)] == [0, 1, 2]
    with pytest.raises(UsageError, match=r"4\.weight"):
        rename("4.weight", 0, found.parts["4.weight"])


@pytest.mark.parametrize("head", ["fc", "output"])
def test_heads_by_names_that_mean_one_at_the_root_alone(head: str) -> None:
    """torchvision's classifier, and the head of Llama as its authors store it; in a block the names are a layer's."""
    found = read({f"{head}.weight": (9, 4)} | {f"layers.{i}.{head}.weight": (4, 4) for i in range(3)}, None)
    assert found.parts[f"{head}.weight"].role == "head"
    assert found.parts[f"layers.1.{head}.weight"].role != "head"


def test_no_blocks_at_all() -> None:
    """A model without numbered names is read all the same, and so is an empty one."""
    found = read({"weight": (2, 2), "bias": (2,)}, None)
    assert (found.depth, found.guessed) == ({"": 0}, True)
    assert [part.block for part in found.parts.values()] == [None, None]
    assert read({}, {"model_type": "llama"}).parts == {}


def test_family_whose_blocks_are_missing_is_guessed() -> None:
    """A configuration that does not fit the names (another tool's spelling) does not hide the blocks."""
    shapes: Shapes = {f"trunk.unit.{i}.attn.wq.weight": (2, 2) for i in range(4)}
    found = read(shapes, {"model_type": "llama"})
    assert (found.family, found.guessed, found.depth) == ("generic", True, {"": 4})


def test_two_towers_of_one_kind_do_not_share_blocks() -> None:
    """When one row's pattern fits two stacks, the larger is the module and the other is named by its path."""
    shapes: Shapes = {f"model.layers.{i}.mlp.up_proj.weight": (2, 2) for i in range(4)}
    shapes |= {f"draft.layers.{i}.mlp.up_proj.weight": (2, 2) for i in range(2)}
    found = read(shapes, {"model_type": "llama"})
    assert found.depth == {"": 4, "draft.layers": 2}
    assert found.parts["draft.layers.1.mlp.up_proj.weight"].depth == 1.0


def test_summary_counts_everything_once() -> None:
    """Parameters leave out buffers and the second copy of a tied tensor; the whole thing is JSON."""
    shapes: Shapes = {
        "transformer.wte.weight": (10, 4),
        "lm_head.weight": (10, 4),
        "transformer.h.0.attn.c_attn.weight": (4, 12),
        "transformer.h.0.attn.bias": (1, 1, 8, 8),
        "transformer.h.1.mlp.c_fc.weight": (4, 16),
        "transformer.ln_f.weight": (4,),
    }
    dtypes = dict.fromkeys(shapes, "BF16") | {"transformer.ln_f.weight": "F32"}
    found = summary(read(shapes, {"model_type": "gpt2", "n_layer": 2}), shapes, dtypes)
    assert json.loads(json.dumps(found)) == {
        "family": "gpt2",
        "guessed": False,
        "tensors": 6,
        "parameters": 40 + 48 + 64 + 4,
        "modules": {
            "": {
                "blocks": 2,
                "layer_keys": ["n_layer"],
                "roles": {
                    "embedding": {"tensors": 1, "parameters": 40},
                    "head": {"tensors": 1, "parameters": 0},
                    "attention": {"tensors": 2, "parameters": 48},
                    "mlp": {"tensors": 1, "parameters": 64},
                    "norm": {"tensors": 1, "parameters": 4},
                },
            }
        },
        "components": {},
        "dtypes": {"BF16": {"tensors": 5, "parameters": 152}, "F32": {"tensors": 1, "parameters": 4}},
        "tied": {"lm_head.weight": "transformer.wte.weight"},
        "stored_twice": ["lm_head.weight"],
        "vocabulary": {"rows": 10, "tensors": {"transformer.wte.weight": 0, "lm_head.weight": 0}},
        "buffers": ["transformer.h.0.attn.bias"],
    }
