"""What becomes of a model's tensors in a GGUF file: names, order of rows, stacks of experts, types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from geomerge.errors import DamagedCheckpoint, ModelError
from geomerge.export.families import Described, experts, key_value_heads

Shape = tuple[int, ...]

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_LANGUAGE = re.compile(r"^(model\.)?language_model\.(model\.)?")
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|vision_model)\.")
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")
_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: In the file.
        shape: Rows first.
        kind: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        parts: The model's tensors that lie one after the other in it: one, or one for each expert.
        heads: How many heads' rows are to be reordered: row (h, s, j) of h heads and 2 halves becomes (h, j, s); 0 for none.
        added: Added to every element.
        values: The elements themselves, where they follow from the config.
    """

    name: str
    shape: Shape
    kind: str
    parts: tuple[str, ...] = ()
    heads: int = 0
    added: float = 0.0
    values: Tensor | None = None

    @property
    def columns(self) -> int:
        """Elements of a row; a vector is one row, or, where its elements are reordered, rows of one element."""
        return 1 if self.heads and len(self.shape) == 1 else self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of one part."""
        return prod(self.shape) // self.columns // max(len(self.parts), 1)


def entries(shapes: Mapping[str, Shape], described: Described, kind: str, where: str) -> tuple[list[Entry], list[str]]:
    """The tensors of the file, in the model's order, and what is to be said of them.

    Args:
        shapes: Of the model's tensors.
        described: The model.
        kind: The type of its matrices.
        where: The model, for messages.

    Raises:
        ModelError: A tensor has no place in the architecture.
        DamagedCheckpoint: One is missing.
    """
    import gguf

    family, config = described.family, described.config
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    table = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    tied = bool(config.get("tie_word_embeddings")) or family.norms_plus_one
    found: dict[str, Entry] = {}
    stacks: dict[str, dict[int, tuple[str, Shape]]] = {}
    left, whole = 0, []
    for name, shape in shapes.items():
        if _VISION.match(name):
            left += 1
            continue
        plain = _LANGUAGE.sub("model.", name) if _LANGUAGE.match(name) and "lm_head" not in name else name
        if _DERIVED.fullmatch(plain) or (tied and plain.endswith("lm_head.weight")):
            continue
        if expert := _EXPERT.fullmatch(plain):
            theirs = table.get_name(f"{expert[1]}.{expert[3]}")
            if theirs is not None:
                stacks.setdefault(f"{theirs}.weight", {})[int(expert[2])] = (name, shape)
                found.setdefault(f"{theirs}.weight", Entry(f"{theirs}.weight", (), kind))
                continue
        theirs = table.get_name(plain, try_suffixes=(".weight", ".bias"))
        if theirs is None or not theirs.endswith((".weight", ".bias")):
            raise ModelError(
                f"tensor {name!r} has no place in llama.cpp's {family.architecture}",
                where=where,
                hint="is it a plain model?",
            )
        entry = Entry(theirs, shape, _kind(theirs, shape, kind), (name,), _heads(plain, described))
        if entry.heads and shape[0] % (2 * entry.heads):
            raise DamagedCheckpoint(
                f"tensor {name!r} of the shape {list(shape)} is not one of {entry.heads} heads of an even size",
                where=where,
            )
        if family.norms_plus_one and theirs.endswith("norm.weight"):
            entry = replace(entry, added=1.0)
        if theirs.endswith("ffn_gate_inp_shexp.weight"):
            entry = replace(entry, shape=(prod(shape),))
        found[theirs] = entry
    for theirs, stack in stacks.items():
        found[theirs] = _stacked(theirs, stack, experts(config), kind, where)
    _complete(found, int(config["num_hidden_layers"]), tied, where)
    derived = [Entry(n, tuple(v.shape), "f32", values=v) for n, v in described.derived.items()]
    notes = []
    if left:
        notes.append(f"{left} tensors of the vision part are left out: llama.cpp has them in a file of their own")
    for theirs, entry in found.items():
        if entry.kind == "q8_0" and entry.shape[-1] % 32:
            found[theirs] = replace(entry, kind="f16")
            whole.append(theirs)
    if whole:
        notes.append(f"{len(whole)} tensors are f16, because their rows are no whole blocks of 32 ({whole[0]})")
    return derived + list(found.values()), notes


def _kind(theirs: str, shape: Shape, kind: str) -> str:
    """As llama.cpp's converter has it: vectors, norms, biases and routers are float32."""
    vector = len(shape) < 2 or theirs.endswith("_norm.weight") or not theirs.endswith(".weight")
    return "f32" if vector or theirs.endswith(_ROUTERS) else kind


def _heads(plain: str, described: Described) -> int:
    if not described.family.permuted:
        return 0
    module = plain.rpartition(".")[0]
    if module.endswith("self_attn.q_proj"):
        return int(described.config["num_attention_heads"])
    return key_value_heads(described.config) if module.endswith("self_attn.k_proj") else 0


def _stacked(theirs: str, stack: Mapping[int, tuple[str, Shape]], count: int, kind: str, where: str) -> Entry:
    if sorted(stack) != list(range(count)) or len({shape for _, shape in stack.values()}) != 1:
        raise DamagedCheckpoint(f"the experts of {theirs} are not {count} of one shape, but {len(stack)}", where=where)
    shape = (count, *stack[0][1])
    return Entry(theirs, shape, kind, tuple(stack[i][0] for i in range(count)))


def _complete(found: Mapping[str, Entry], blocks: int, tied: bool, where: str) -> None:
    """Every block must have what the others have: blocks are alike in these architectures."""
    outer = ("token_embd.weight", "output_norm.weight", *(() if tied else ("output.weight",)))
    missing = [name for name in outer if name not in found]
    held: dict[int, set[str]] = {i: set() for i in range(blocks)}
    for name in found:
        if block := _BLOCK.fullmatch(name):
            held.setdefault(int(block[1]), set()).add(block[2])
    everything = set().union(*held.values())
    missing += [f"blk.{i}.{name}" for i, names in held.items() for name in sorted(everything - names)]
    if missing or not everything:
        raise DamagedCheckpoint(
            f"what would be {missing[0] if missing else 'blk.0'} in the file is not there",
            where=where,
            hint="is the model complete, and are all of its blocks alike?",
        )
