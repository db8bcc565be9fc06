"""What transformers makes of a merge: every key loads, the output is finite, and depth changes fit the config."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import geomerge as gm
import tiny

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu",
}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": False}),
    "llama tied": ("LlamaConfig", "LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SMALL | {"head_dim": 8}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", SMALL | {"num_local_experts": 3, "num_hidden_layers": 2}),
    "bert": ("BertConfig", "BertForMaskedLM", BERT),
    "bert classifier": ("BertConfig", "BertForSequenceClassification", BERT | {"num_labels": 3}),
    "vit": ("ViTConfig", "ViTForImageClassification", VIT),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "t5 untied": ("T5Config", "T5ForConditionalGeneration", T5 | {"tie_word_embeddings": False}),
}


def quiet(work: Callable[[], Any]) -> Any:
    """Call into transformers without its own deprecation warnings, which are not ours to fix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def make(folder: Path, family: str, seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save a model with random weights as transformers saves it."""
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**options, **changes})
    model = getattr(transformers, model_class)(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms differ too
            p.add_(0.02 * torch.randn_like(p))
    quiet(lambda: model.save_pretrained(folder))
    return model


def load(folder: Path, family: str) -> Any:
    """Load a model; every key must be there and used."""
    model_class = getattr(transformers, FAMILIES[family][1])
    model, info = quiet(lambda: model_class.from_pretrained(folder, output_loading_info=True))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def output(model: Any, family: str) -> torch.Tensor:
    """Logits of a fixed input; generating families must generate, too."""
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        if family.startswith("vit"):
            logits = model(torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)).logits
        elif family.startswith("bert"):
            logits = model(ids).logits
        elif family.startswith("t5"):
            logits = model(ids, decoder_input_ids=ids[:, :4]).logits
        else:
            logits = model(ids).logits
        if "bert" not in family and family != "vit":
            made = quiet(lambda: model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False))
            assert made.shape[1] >= 3
    assert torch.isfinite(logits).all()
    return logits


def linear(root: Path, more: str = "", weights: tuple[float, float] = (1, 3)) -> str:
    """A weighted mean of a and b."""
    models = "".join(
        f"- {{model: {root}/{n}, parameters: {{weight: {w}}}}}\n" for n, w in zip("ab", weights, strict=True)
    )
    return f"merge_method: linear\nmodels:\n{models}{more}"


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_loads_and_is_the_mean(family: str, tmp_path: Path) -> None:
    """No key missing or unexpected; each of the module's own parameters is the mean of the parents'; forward is finite."""
    a, b = make(tmp_path / "a", family, 1), make(tmp_path / "b", family, 2)
    gm.merge(linear(tmp_path), tmp_path / "out", shard_size=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    merged = load(tmp_path / "out", family)
    mine, theirs = a.state_dict(), b.state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, (mine[name] + 3 * theirs[name]) / 4, atol=1e-6), name
    output(merged, family)
    stored = tiny.read(tmp_path / "out")
    assert stored.keys() == tiny.read(tmp_path / "a").keys()
    assert tiny.same(stored, gm.merge_state_dicts(linear(tmp_path)))
    assert tiny.manifest(tmp_path / "out")["tensors"].keys() == stored.keys()


def test_mixtral_keeps_its_names_on_disk(tmp_path: Path) -> None:
    """Experts are merged one by one under the names that other loaders know, not in transformers' fused layout."""
    make(tmp_path / "a", "mixtral", 1)
    make(tmp_path / "b", "mixtral", 2)
    gm.merge(linear(tmp_path), tmp_path / "out")
    names = tiny.read(tmp_path / "out").keys()
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in names
    assert not any("gate_up_proj" in n for n in names)


@pytest.mark.parametrize("family", ["llama tied", "qwen2", "gemma2", "t5"])
def test_tied_weights_are_stored_once(family: str, tmp_path: Path) -> None:
    """Also when the parents' files hold the tied name a second time, the output holds it once and loads."""
    make(tmp_path / "a", family, 1)
    make(tmp_path / "b", family, 2)
    names = set(tiny.read(tmp_path / "a"))
    assert "lm_head.weight" not in names
    stored = "shared.weight" if family == "t5" else "model.embed_tokens.weight"
    for n in "ab":
        tensors = tiny.read(tmp_path / n)
        tiny.save(tmp_path / n, tensors | {"lm_head.weight": tensors[stored].clone()})
    gm.merge(linear(tmp_path), tmp_path / "out")
    assert tiny.read(tmp_path / "out").keys() == names
    assert f"{tmp_path}/b: lm_head.weight" in tiny.manifest(tmp_path / "out")["left_out"]
    output(load(tmp_path / "out", family), family)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_tied_and_untied_parents(order: str, tmp_path: Path) -> None:
    """The output stores both, its config says so, and the head is the mean of one's embedding and the other's head."""
    a = make(tmp_path / order[0], "llama tied", 1)
    b = make(tmp_path / order[1], "llama", 2)
    gm.merge(linear(tmp_path, weights=(1, 1)), tmp_path / "out")
    config = tiny.config(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    merged = load(tmp_path / "out", "llama")
    assert torch.allclose(merged.lm_head.weight, (a.lm_head.weight + b.lm_head.weight) / 2, atol=1e-6)
    expected = (a.model.embed_tokens.weight + b.model.embed_tokens.weight) / 2
    assert torch.allclose(merged.model.embed_tokens.weight, expected, atol=1e-6)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    output(merged, "llama")


@pytest.mark.parametrize(
    ("more", "parents", "expected"),
    [
        ("", torch.bfloat16, torch.bfloat16),
        ("dtype: float16\n", torch.bfloat16, torch.float16),
        ("dtype: float32\nout_dtype: bfloat16\n", torch.float32, torch.bfloat16),
        ("out_dtype: float32\n", torch.bfloat16, torch.float32),
    ],
)
def test_config_states_the_dtype(more: str, parents: torch.dtype, expected: torch.dtype, tmp_path: Path) -> None:
    """`dtype`, and `torch_dtype` where the parent has it, say what is stored; transformers loads in it."""
    make(tmp_path / "a", "llama", 1, parents)
    make(tmp_path / "b", "llama", 2, parents)
    config = tiny.config(tmp_path / "a")
    config["torch_dtype"] = config["dtype"]
    tiny.save(tmp_path / "a", tiny.read(tmp_path / "a"), config)
    gm.merge(linear(tmp_path, more), tmp_path / "out")
    said = str(expected).removeprefix("torch.")
    config = tiny.config(tmp_path / "out")
    assert (config["dtype"], config["torch_dtype"]) == (said, said)
    assert {t.dtype for t in tiny.read(tmp_path / "out").values()} == {expected}
    model = quiet(lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"))
    assert model.dtype == expected


def test_sharded_inputs_and_output(tmp_path: Path) -> None:
    """Parents in several files of several layouts; the output's index lists every tensor and the bytes in all."""
    model = make(tmp_path / "a", "llama", 1)
    make(tmp_path / "b", "llama", 2)
    quiet(lambda: model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB"))
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    text = linear(tmp_path)
    gm.merge(text, tmp_path / "one")
    gm.merge(text.replace(f"{tmp_path}/a", f"{tmp_path}/sharded"), tmp_path / "many", shard_size=25_000)
    one, many = tiny.read(tmp_path / "one"), tiny.read(tmp_path / "many")
    assert tiny.same(one, many)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "many" / file, "pt") as found:
            assert found.metadata()["format"] == "pt"
            assert {n for n, f in index["weight_map"].items() if f == file} == set(found.keys())
    output(load(tmp_path / "many", "llama"), "llama")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_depth_change_loads_and_generates(family: str, tmp_path: Path) -> None:
    """A passthrough that makes four blocks seven: `layer_types` and the count fit, and each block is where it belongs."""
    more = {"qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}}.get(family, {})
    model = make(tmp_path / "a", family, 1, **more)
    if family != "llama":
        assert len(set(tiny.config(tmp_path / "a")["layer_types"])) == 2
    text = "merge_method: passthrough\nslices:\n"
    ranges = [(0, 3), (1, 4), (3, 4)]
    for first, stop in ranges:
        text += f"- sources: [{{model: {tmp_path}/a, layer_range: [{first}, {stop}]}}]\n"
    gm.merge(text, tmp_path / "out")
    merged = load(tmp_path / "out", family)
    sources = [i for first, stop in ranges for i in range(first, stop)]
    assert merged.config.num_hidden_layers == len(merged.model.layers) == 7
    if family != "llama":
        assert merged.config.layer_types == [model.config.layer_types[i] for i in sources]
    mine, theirs = merged.state_dict(), model.state_dict()
    for out, source in enumerate(sources):
        for name in theirs:
            if f"layers.{source}." in name:
                assert torch.equal(mine[name.replace(f"layers.{source}.", f"layers.{out}.")], theirs[name])
    output(merged, family)


def test_scaled_copies_of_blocks(tmp_path: Path) -> None:
    """Blocks in any order, scaled tensor by tensor: copies that write nothing into the stream leave the model as it was."""
    model = make(tmp_path / "a", "llama", 1)
    silent = "parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0}, {value: 1}]}"
    text = f"""\
merge_method: passthrough
slices:
- sources: [{{model: {tmp_path}/a, layer_range: [0, 2]}}]
- sources: [{{model: {tmp_path}/a, layer_range: [2, 4], {silent}}}]
- sources: [{{model: {tmp_path}/a, layer_range: [0, 1], {silent}}}]
- sources: [{{model: {tmp_path}/a, layer_range: [2, 4]}}]
"""
    gm.merge(text, tmp_path / "out")
    merged = load(tmp_path / "out", "llama")
    assert len(merged.model.layers) == 7
    assert not merged.model.layers[3].self_attn.o_proj.weight.any()
    ids = torch.arange(12).unsqueeze(0)
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    output(merged, "llama")


def test_depth_change_down_to_one_block(tmp_path: Path) -> None:
    """Fewer blocks work like more."""
    make(tmp_path / "a", "gemma2", 1)
    text = f"merge_method: passthrough\nslices:\n- sources: [{{model: {tmp_path}/a, layer_range: [1, 2]}}]\n"
    gm.merge(text, tmp_path / "out")
    merged = load(tmp_path / "out", "gemma2")
    assert merged.config.layer_types == ["full_attention"]
    output(merged, "gemma2")


def test_t5_with_one_module_listed(tmp_path: Path) -> None:
    """Encoder blocks merged, the decoder copied from the first model by a stated rule: whole and loadable."""
    a, b = make(tmp_path / "a", "t5", 1), make(tmp_path / "b", "t5", 2)
    text = f"""\
merge_method: linear
modules:
  encoder:
    models:
    - {{model: {tmp_path}/a, parameters: {{weight: 1}}}}
    - {{model: {tmp_path}/b, parameters: {{weight: 1}}}}
"""
    gm.merge(text, tmp_path / "out")
    merged = load(tmp_path / "out", "t5")
    mine, first, second = merged.state_dict(), a.state_dict(), b.state_dict()
    for name in mine:
        both = name.startswith("encoder.") and "embed_tokens" not in name
        expected = (first[name] + second[name]) / 2 if both else first[name]
        assert torch.allclose(mine[name], expected, atol=1e-6), name
    rules = {n: t["rule"] for n, t in tiny.manifest(tmp_path / "out")["tensors"].items()}
    assert rules["encoder.block.0.layer.0.SelfAttention.q.weight"] == "merge"
    assert rules["decoder.block.0.layer.0.SelfAttention.q.weight"].startswith("copy: module 'decoder'")
    output(merged, "t5")


def test_t5_encoder_sliced_decoder_merged(tmp_path: Path) -> None:
    """A deeper encoder beside a merged decoder: both counts in the config are right."""
    make(tmp_path / "a", "t5", 1)
    make(tmp_path / "b", "t5", 2)
    text = f"""\
merge_method: passthrough
modules:
  encoder:
    slices:
    - sources: [{{model: {tmp_path}/a, layer_range: [0, 3]}}]
    - sources: [{{model: {tmp_path}/a, layer_range: [1, 3]}}]
  decoder: {{models: [{{model: {tmp_path}/b}}]}}
  shared: {{models: [{{model: {tmp_path}/a}}]}}
"""
    gm.merge(text, tmp_path / "out")
    config = tiny.config(tmp_path / "out")
    assert (config["num_layers"], config["num_decoder_layers"]) == (5, 2)
    output(load(tmp_path / "out", "t5"), "t5")
