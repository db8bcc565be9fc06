"""The output's config: what a merge changes is changed everywhere, everything else survives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AutoConfig

from geomerge.checkpoint import edit_config
from geomerge.errors import IncompatibleModels, RecipeError

STACKED = [0, 1, 2, 1, 2, 3]
"""Blocks 0-2 followed by blocks 1-3 of a model with four."""


def test_unknown_fields_survive_and_the_input_is_not_changed() -> None:
    """JSON in, JSON out; only the parent's own name goes."""
    config = {"model_type": "new", "deep": {"er": [1, None]}, "_name_or_path": "owner/parent", "num_hidden_layers": 4}
    before = copy.deepcopy(config)
    new = edit_config(config, dtype="bfloat16", block_maps={"": STACKED}, vocab_size=7, tie=False)
    assert config == before
    assert new == {
        "model_type": "new",
        "deep": {"er": [1, None]},
        "num_hidden_layers": 6,
        "dtype": "bfloat16",
        "vocab_size": 7,
        "tie_word_embeddings": False,
    }
    new["deep"]["er"].append(2)
    assert config == before


def test_dtype() -> None:
    """Written as dtype; the older key and nested statements follow where they are, nested silence stays silent."""
    config = {
        "torch_dtype": "float16",
        "text_config": {"torch_dtype": "float16"},
        "vision_config": {"dtype": None},
        "audio_config": {},
    }
    assert edit_config(config, dtype="BF16") == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16"},
        "vision_config": {"dtype": None},
        "audio_config": {},
    }
    assert edit_config({}, dtype="float32") == {"dtype": "float32"}
    with pytest.raises(RecipeError, match="unknown dtype"):
        edit_config({}, dtype="float23")


def test_per_layer_lists() -> None:
    """Lists with an entry for each layer are re-indexed; lists of indices become the places where those layers went."""
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["full", "sliding", "chunked", "linear"],
        "kv_heads": [1, 2, 3, 4],
        "no_rope_layers": [1, 1, 1, 0],
        "mlp_only_layers": [1],
        "cross_attention_layers": [0, 3],
        "global_attn_indexes": [2],
        "unrelated": [1, 2, 3],
    }
    new = edit_config(config, block_maps={"": STACKED})
    assert new == {
        "num_hidden_layers": 6,
        "layer_types": ["full", "sliding", "chunked", "sliding", "chunked", "linear"],
        "kv_heads": [1, 2, 3, 2, 3, 4],
        "no_rope_layers": [1, 1, 1, 1, 1, 0],
        "mlp_only_layers": [1, 3],
        "cross_attention_layers": [0, 5],
        "global_attn_indexes": [2, 4],
        "unrelated": [1, 2, 3],
    }


def test_lists_that_are_not_about_layers() -> None:
    """A two-layer model with two end tokens, two architectures and an image of two sides."""
    config = {
        "num_hidden_layers": 2,
        "architectures": ["A", "B"],
        "eos_token_id": [1, 2],
        "image_size": [3, 4],
        "image_mean": [0.5, 0.6],
        "begin_suppress_tokens": [5, 6],
        "sliding_window_pattern": 6,
    }
    assert edit_config(config, block_maps={"": [0, 1, 1]}) == {**config, "num_hidden_layers": 3}


def test_indices_of_all_layers_are_indices() -> None:
    """`moe_layers` naming every layer has the length of a per-layer list and is none."""
    config = {"num_hidden_layers": 3, "moe_layers": [0, 1, 2]}
    assert edit_config(config, block_maps={"": [0, 1, 2, 2]})["moe_layers"] == [0, 1, 2, 3]


def test_same_depth_in_another_order() -> None:
    """A permutation changes lists though the number stays; the identity changes nothing."""
    config = {"num_hidden_layers": 2, "layer_types": ["a", "b"], "max_window_layers": 1}
    assert edit_config(config, block_maps={"": [0, 1]}) == config
    assert edit_config(config, block_maps={"": [1, 0]})["layer_types"] == ["b", "a"]


def test_every_name_of_the_layer_count() -> None:
    """All keys that the anatomy names are set, lists are carried over once."""
    config = {"n_layer": 2, "num_hidden_layers": 2, "kinds": ["a", "b"]}
    new = edit_config(config, block_maps={"": [0, 1, 0, 1]}, layer_keys={"": ("num_hidden_layers", "n_layer")})
    assert new == {"n_layer": 4, "num_hidden_layers": 4, "kinds": ["a", "b", "a", "b"]}


def test_counts_alone() -> None:
    """A count can be set by its key, nested or not yet there."""
    new = edit_config({"a": 1}, layer_counts={"num_hidden_layers": 3, "vision_config.num_hidden_layers": 2})
    assert new == {"a": 1, "num_hidden_layers": 3, "vision_config": {"num_hidden_layers": 2}}


def test_nested_text_config() -> None:
    """The language model's layers, vocabulary and tie are its own config's; the vision tower's are untouched."""
    config = {
        "model_type": "vlm",
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]},
        "vision_config": {"num_hidden_layers": 2, "layer_types": ["c", "d"]},
        "tie_word_embeddings": True,
    }
    new = edit_config(
        config,
        block_maps={"text": [0, 0, 1], "vision": [0, 1]},
        layer_keys={"text": ("text_config.num_hidden_layers",), "vision": ("vision_config.num_hidden_layers",)},
        vocab_size=9,
        tie=False,
    )
    assert new["text_config"] == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "a", "b"],
        "vocab_size": 9,
        "tie_word_embeddings": False,
    }
    assert new["vision_config"] == config["vision_config"]
    assert new["tie_word_embeddings"] is False
    assert "vocab_size" not in new
    assert edit_config(config, block_maps={"": [0, 0, 1]})["text_config"]["num_hidden_layers"] == 3


def test_encoder_and_decoder() -> None:
    """Each stack owns its count and its lists; a decoder that was as deep as the encoder by default stays so deep."""
    keys = {"encoder": ("num_layers",), "decoder": ("num_decoder_layers",)}
    t5 = {"is_encoder_decoder": True, "num_layers": 2}
    new = edit_config(t5, block_maps={"encoder": [0, 1, 1], "decoder": [0, 1]}, layer_keys=keys)
    assert (new["num_layers"], new["num_decoder_layers"]) == (3, 2)
    new = edit_config(t5, block_maps={"encoder": [0, 1], "decoder": [0]}, layer_keys=keys)
    assert (new["num_layers"], new["num_decoder_layers"]) == (2, 1)
    bart = {"encoder_layers": 2, "decoder_layers": 2, "encoder_kinds": ["a", "b"], "decoder_kinds": ["c", "d"]}
    keys = {"encoder": ("encoder_layers",), "decoder": ("decoder_layers",)}
    new = edit_config(bart, block_maps={"encoder": [0, 0, 1], "decoder": [1]}, layer_keys=keys)
    assert new == {"encoder_layers": 3, "decoder_layers": 1, "encoder_kinds": ["a", "a", "b"], "decoder_kinds": ["d"]}
    with pytest.raises(IncompatibleModels, match="'kinds' could speak of encoder or of decoder"):
        edit_config({**bart, "kinds": [1, 2]}, block_maps={"encoder": [0], "decoder": [1]}, layer_keys=keys)
    one = edit_config({**bart, "kinds": [1, 2]}, block_maps={"encoder": [0, 1], "decoder": [1]}, layer_keys=keys)
    assert one["kinds"] == [2]


def test_window_layers() -> None:
    """Blocks from below the old bound come first: their number is the new bound, exactly; none sliding stays none."""
    config = {"num_hidden_layers": 4, "max_window_layers": 2}
    assert edit_config(config, block_maps={"": [0, 1, 1, 2, 3]})["max_window_layers"] == 3
    config["max_window_layers"] = 28
    assert edit_config(config, block_maps={"": STACKED})["max_window_layers"] == 6


def test_rules_by_position_are_spelled_out() -> None:
    """Which blocks are experts, which have no rotary embedding: told of the source, so it is told of its copies."""
    qwen = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    new = edit_config(qwen, block_maps={"": STACKED})  # only block 1 is a mixture: at places 1 and 3
    assert (new["decoder_sparse_step"], new["mlp_only_layers"]) == (1, [0, 2, 4, 5])
    llama = {"num_hidden_layers": 4, "no_rope_layer_interval": 4, "interleave_moe_layer_step": 2}
    new = edit_config(llama, block_maps={"": STACKED})
    assert (new["no_rope_layers"], new["moe_layers"]) == ([1, 1, 1, 1, 1, 0], [1, 3, 5])
    neo = {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2}
    new = edit_config(neo, block_maps={"": STACKED})
    assert new["attention_types"] == [[["global", "local", "global", "local", "global", "local"], 1]]
    assert new["attention_layers"] == new["attention_types"][0][0]


def test_rules_that_no_config_can_spell_out() -> None:
    """Dense blocks of DeepSeek must come first and Jamba's periods must hold; otherwise the merge is refused."""
    deepseek = {"num_hidden_layers": 4, "first_k_dense_replace": 1}
    assert edit_config(deepseek, block_maps={"": [0, 1, 2, 1, 2, 3]})["first_k_dense_replace"] == 1
    assert edit_config(deepseek, block_maps={"": [0, 0, 1, 2]})["first_k_dense_replace"] == 2
    with pytest.raises(IncompatibleModels, match="first_k_dense_replace = 1"):
        edit_config(deepseek, block_maps={"": [0, 1, 0, 1]})
    jamba = {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    assert edit_config(jamba, block_maps={"": [0, 1, 0, 1, 2, 3]})["num_hidden_layers"] == 6
    with pytest.raises(IncompatibleModels, match="attn_layer_period = 2"):
        edit_config(jamba, block_maps={"": [0, 1, 1, 2]})


@pytest.mark.parametrize("family", ["glm_moe_dsa", "deepseek_v32"])
@pytest.mark.parametrize("written_out", [True, False], ids=["with mlp_layer_types", "without"])
def test_dense_blocks_anywhere_where_the_config_can_list_them(family: str, written_out: bool) -> None:
    """`mlp_layer_types` says which blocks are dense, so they need not come first."""
    parent = AutoConfig.for_model(family, num_hidden_layers=4, first_k_dense_replace=1)
    types = parent.mlp_layer_types
    assert types == ["dense", "sparse", "sparse", "sparse"]
    config = parent.to_dict()
    if not written_out:
        del config["mlp_layer_types"]
    new = edit_config(config, block_maps={"": [0, 1, 0, 2, 3]})
    assert AutoConfig.for_model(**new).mlp_layer_types == ["dense", "sparse", "dense", "sparse", "sparse"]


def test_block_beyond_the_config() -> None:
    """A deeper model's block cannot be described by a shallower one's config."""
    with pytest.raises(IncompatibleModels, match="block 5, but the config describes 4"):
        edit_config({"num_hidden_layers": 4}, block_maps={"": [0, 5]})


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    "num_hidden_layers": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 3},
    "cohere2": {"sliding_window_pattern": 2},
    "olmo3": {},
    "qwen3_next": {"full_attention_interval": 2},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 0},
    "afmoe": {"global_attn_every_n_layers": 2},
    "cwm": {"pad_token_id": 0},
    "exaone4": {"sliding_window_pattern": 3, "sliding_window": 8},
    "gpt_oss": {},
    "minimax": {},
    "modernbert": {"global_attn_every_n_layers": 2, "pad_token_id": 0},
    "qwen3_5_text": {"full_attention_interval": 2},
    "vaultgemma": {},
    "llama": {},
}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("written_out", [True, False], ids=["with layer_types", "without"])
def test_deeper_model_keeps_every_blocks_attention_in_transformers(family: str, written_out: bool) -> None:
    """The new config loads, and each block attends as its source does, whether or not the config listed the types."""
    parent = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    types, rope = getattr(parent, "layer_types", None), getattr(parent, "no_rope_layers", None)
    config = {**SMALL, **FAMILIES[family], "model_type": family}
    if written_out and types is not None:
        config["layer_types"] = types
    new = edit_config(config, dtype="bfloat16", block_maps={"": STACKED}, vocab_size=80)
    loaded = AutoConfig.for_model(**new)
    assert (loaded.num_hidden_layers, loaded.vocab_size, str(loaded.dtype)) == (6, 80, "torch.bfloat16")
    assert getattr(loaded, "layer_types", None) == (None if types is None else [types[s] for s in STACKED])
    assert getattr(loaded, "no_rope_layers", None) == (None if rope is None else [rope[s] for s in STACKED])


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "t5", "bert", "gpt2", "mixtral"])
def test_full_config_of_transformers_loads_after_a_change_of_depth(family: str) -> None:
    """What save_pretrained writes, edited, is what from_dict reads."""
    parent = AutoConfig.for_model(family).to_dict()
    key = next(k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in parent)
    blocks = [0, *range(parent[key])]
    new = edit_config(parent, dtype="float16", block_maps={"": blocks}, vocab_size=99)
    loaded = AutoConfig.for_model(**new)
    assert (loaded.num_hidden_layers, loaded.vocab_size) == (len(blocks), 99)
    if family == "t5":
        assert loaded.num_decoder_layers == parent[key]


def test_multimodal_config_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 with a text config that leaves out its type and its layer types."""
    config = {"model_type": "gemma3", "text_config": {**SMALL, "sliding_window_pattern": 3}, "vision_config": {}}
    new = edit_config(config, block_maps={"text": STACKED}, layer_keys={"text": ("text_config.num_hidden_layers",)})
    text = AutoConfig.for_model(**new).text_config
    sliding, full = "sliding_attention", "full_attention"
    assert text.layer_types == [sliding, sliding, full, sliding, full, sliding]


@pytest.mark.parametrize("depth", [1 << 31, 1 << 63])
def test_a_depth_beyond_all_memory(depth: int) -> None:
    """A config may claim any number of blocks: nothing of that size is made."""
    from geomerge.checkpoint.per_layer import carry_over

    with pytest.raises(IncompatibleModels, match="layers"):
        carry_over({"num_hidden_layers": depth}, "llama", depth, [0, 1])
