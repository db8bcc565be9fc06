"""Make tests/data/tokens: what mergekit does with different vocabularies, for tests/test_tokens_peer.py.

Four tiny Llama models with trained tokenizers are merged by mergekit (run as a program) under several tokenizer
policies. Stored are the inputs' tokenizers and embeddings, and per case the output's embedding, head and token ids.

    python tests/peer/make_token_cases.py --peer path/to/mergekit-yaml

Made with mergekit 0.1.5. The order in which it appends tokens for `union` differs from run to run; the tests compare
token by token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

DATA = Path(__file__).parent.parent / "data" / "tokens"
HIDDEN = 8
ENGLISH = ["the cat sat on the mat and the hat", "a cold morning in the old town", "the other things that matter most"]
GERMAN = ["die katze sitzt auf der matte", "ein kalter morgen in der alten stadt", "und die anderen dinge zählen nicht"]

# A case: the recipe's inputs, its base, its tokenizer policy.
CASES: dict[str, dict[str, Any]] = {
    "union": {"models": ["a", "b", "c"], "base": "a", "source": "union"},
    "union_without_base": {"models": ["a", "b", "c"], "base": None, "source": "union"},
    "union_base_last": {"models": ["a", "c", "b"], "base": "b", "source": "union"},
    "base": {"models": ["a", "b", "c"], "base": "a", "source": "base"},
    "model": {"models": ["a", "b", "c"], "base": "a", "source": "c"},
    "model_without_base": {"models": ["a", "b", "c"], "base": None, "source": "b"},
    "padded": {"models": ["b", "a", "c"], "base": "b", "source": "base", "pad_to_multiple_of": 32},
    "padded_union": {"models": ["a", "b"], "base": "a", "source": "union", "pad_to_multiple_of": 64},
    "cut": {"models": ["a", "wide", "c"], "base": "wide", "source": "base"},
    "short": {"models": ["short", "b", "c"], "base": "short", "source": "union"},
    "rules": {
        "models": ["a", "b", "c"],
        "base": "a",
        "source": "union",
        "tokens": {
            "<|chat|>": {"source": "b"},
            "the": {"source": "a", "force": True},
            "z": {"source": {"kind": "zero"}},
            "<|end|>": {"source": {"kind": "zero"}, "force": True},
            "ä": {"source": {"kind": "model_token", "model": "a", "token": "a"}},
            "<|tool|>": {"source": {"kind": "model_token", "model": "a", "token_id": 7}},
            "d": {"source": {"kind": "model_token", "model": "b", "token": "e"}, "force": True},
            "<|new|>": {"source": {"kind": "model_token", "model": "c", "token": "the"}},
        },
    },
}


def trained(texts: list[str], size: int, added: list[AddedToken]) -> Tokenizer:
    """A small BPE tokenizer; `added` follow its own tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def save_model(folder: Path, tokenizer: Tokenizer, rows: int, seed: int) -> dict[str, np.ndarray]:
    """A Llama of one block; only its embedding and head matter."""
    folder.mkdir()
    draw = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": weight(rows, HIDDEN), "lm_head.weight": weight(rows, HIDDEN)}
    block = {f"self_attn.{name}_proj": weight(HIDDEN, HIDDEN) for name in "qkvo"}
    block |= {f"mlp.{name}_proj": weight(HIDDEN, HIDDEN) for name in ("gate", "up", "down")}
    block |= {name: weight(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(
        tensors
        | {f"model.layers.0.{name}.weight": value for name, value in block.items()}
        | {"model.norm.weight": weight(HIDDEN)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": rows,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    return tensors


def recipe(case: dict[str, Any]) -> dict[str, Any]:
    policy = {key: case[key] for key in ("source", "tokens", "pad_to_multiple_of") if key in case}
    document: dict[str, Any] = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in case["models"]],
        "dtype": "float32",
        "tokenizer": policy,
    }
    if case["base"]:
        document["base_model"] = case["base"]
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", default=shutil.which("mergekit-yaml"), help="the program mergekit-yaml")
    peer = parser.parse_args().peer
    english = trained(ENGLISH, 60, [special("<|end|>"), AddedToken("<|note|>")])
    german = trained(GERMAN, 56, [special("<|end|>"), special("<|chat|>"), AddedToken("<|extra|>")])
    tool = trained(ENGLISH, 60, [special("<|tool|>"), special("<|end|>"), special("<|chat|>")])
    tokenizers = {"a": english, "b": german, "c": tool, "wide": english, "short": english}
    rows = {name: tokenizer.get_vocab_size() for name, tokenizer in tokenizers.items()}
    rows["wide"] += 10
    rows["short"] -= 1
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir(parents=True)
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for seed, (name, tokenizer) in enumerate(tokenizers.items()):
            tensors = save_model(folder / name, tokenizer, rows[name], seed)
            arrays[f"{name}/embedding"] = tensors["model.embed_tokens.weight"]
            arrays[f"{name}/head"] = tensors["lm_head.weight"]
            (DATA / name).mkdir()
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(folder / name / file, DATA / name / file)
        outputs: dict[str, dict[str, int]] = {}
        for name, case in CASES.items():
            (folder / "recipe.yml").write_text(json.dumps(recipe(case)))
            command = [peer, "recipe.yml", f"out-{name}", "--no-write-model-card", "--quiet"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            tensors = load_file(folder / f"out-{name}" / "model.safetensors")
            arrays[f"case/{name}/embedding"] = tensors["model.embed_tokens.weight"]
            arrays[f"case/{name}/head"] = tensors["lm_head.weight"]
            outputs[name] = Tokenizer.from_file(str(folder / f"out-{name}" / "tokenizer.json")).get_vocab()
    np.savez_compressed(DATA / "embeddings.npz", **arrays)
    stored = {name: {**case, "ids": outputs[name]} for name, case in CASES.items()}
    (DATA / "cases.json").write_text(json.dumps(stored, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
