"""Tiny models for the engine's tests, written without transformers: a few blocks with a Llama's names and real configs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with this config, in the usual order."""
    h, m, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        shapes |= {
            f"{block}.input_layernorm.weight": (h,),
            f"{block}.self_attn.q_proj.weight": (q, h),
            f"{block}.self_attn.k_proj.weight": (kv, h),
            f"{block}.self_attn.v_proj.weight": (kv, h),
            f"{block}.self_attn.o_proj.weight": (h, q),
            f"{block}.post_attention_layernorm.weight": (h,),
            f"{block}.mlp.gate_proj.weight": (m, h),
            f"{block}.mlp.up_proj.weight": (m, h),
            f"{block}.mlp.down_proj.weight": (h, m),
        }
    shapes["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    return shapes


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    *,
    like: Mapping[str, Tensor] | None = None,
    step: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Normal numbers; with `like`, those tensors moved by `step` times normal numbers (a fine-tune)."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if like is not None and name in like and like[name].shape == noise.shape:
            noise = like[name].float() + step * noise
        made[name] = noise.to(dtype)
    return made


def save(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, shards: int = 1
) -> Path:
    """Write a model directory, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    if shards == 1:
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = dict(list(contiguous.items())[i::shards])
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in contiguous.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama(
    folder: Path,
    seed: int,
    *,
    like: Mapping[str, Tensor] | None = None,
    step: float = 0.05,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **changes: Any,
) -> Tensors:
    """Write a Llama and return its tensors; `changes` go into the config (``num_hidden_layers=5``)."""
    config = LLAMA | {"dtype": str(dtype).removeprefix("torch.")} | changes
    tensors = random_tensors(llama_shapes(config), seed, like=like, step=step, dtype=dtype)
    save(folder, tensors, config, shards=shards)
    return tensors


def family(root: Path, names: str = "base a b c", **options: Any) -> dict[str, Tensors]:
    """Write a base and experts of it, each in a directory of its name."""
    first, *others = names.split()
    made = {first: llama(root / first, 1, **options)}
    for seed, name in enumerate(others, 2):
        made[name] = llama(root / name, seed, like=made[first], **options)
    return made


def read(folder: Path) -> Tensors:
    """All tensors of a model directory, read by the safetensors library."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bits(a[n]) == bits(b[n]) for n in a
    )


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a directory but the lock, by relative name."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def manifest(folder: Path) -> dict[str, Any]:
    """The output's ``geomerge.json``."""
    found: dict[str, Any] = json.loads((folder / "geomerge.json").read_text())
    return found


def config(folder: Path) -> dict[str, Any]:
    """A directory's ``config.json``."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def passthrough(root: Path, *pieces: str) -> str:
    """A frankenmerge: ``"a 0 2"`` takes blocks 0 and 1 of the model a."""
    text = "merge_method: passthrough\nslices:\n"
    for piece in pieces:
        model, first, stop = piece.split()
        text += f"- sources: [{{model: {root}/{model}, layer_range: [{first}, {stop}]}}]\n"
    return text


class Interrupt:
    """A progress that stops the run when a share of the bytes is written."""

    def __init__(self, share: float) -> None:
        self.share, self.total, self.seen = share, 0, 0

    def start(self, total: int, done: int) -> None:
        self.total, self.seen = total, done

    def advance(self, nbytes: int) -> None:
        self.seen += nbytes
        if self.seen > self.share * self.total:
            raise KeyboardInterrupt

    def finish(self) -> None:
        pass
