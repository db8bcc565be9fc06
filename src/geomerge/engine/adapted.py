"""A base model with an adapter: `base+adapter`, or an adapter that names its base.

The result is a `Checkpoint` like any other, with the base's tensors and a `Change` for each that the adapter touches. All that
can be wrong is found here: modules that the base does not have, shapes that do not fit, weights that are tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from geomerge import anatomy
from geomerge.anatomy import Anatomy
from geomerge.checkpoint.change import Change
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.coded import Coded, Decoding
from geomerge.checkpoint.config import edit_config
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.checkpoint.folder import LoneAdapter
from geomerge.checkpoint.header import TensorInfo
from geomerge.checkpoint.hub import Located
from geomerge.checkpoint.reader import load, open_checkpoint
from geomerge.errors import IncompatibleModels, ModelError
from geomerge.recipe.values import ModelRef

if TYPE_CHECKING:
    from geomerge.checkpoint.lora import Adapter, LowRank

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Families whose linear layers are stored as (in, out)."""
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


def open_model(
    ref: ModelRef, *, given: Mapping[str, Checkpoint] | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Open a model as it is named: a whole one, one with an adapter, or an adapter whose config names its base.

    Args:
        ref: The name.
        given: Models in memory by the name of their path.
        allow_pickle: Read pickled weights (weights only).

    Raises:
        ModelError: One of them cannot be opened, or they do not fit.
    """
    known = (given or {}).get(ref.path)
    if ref.lora is not None:
        adapted = (given or {}).get(str(ref))
        if adapted is not None:
            return adapted
        lora = ref.lora
        adapter = _open_adapter(lora.path, lora.revision, lora.subfolder, allow_pickle=allow_pickle)
        base = known or open_checkpoint(ref.path, ref.revision, subfolder=ref.subfolder, allow_pickle=allow_pickle)
        return adapt(base, adapter, str(ref))
    if known is not None:
        return known
    try:
        return open_checkpoint(ref.path, ref.revision, subfolder=ref.subfolder, allow_pickle=allow_pickle)
    except LoneAdapter:
        adapter = _open_adapter(ref.path, ref.revision, ref.subfolder, allow_pickle=allow_pickle)
    if adapter.base is None:
        raise ModelError(
            "is a LoRA adapter that does not say what its base is", where=str(ref), hint=f"name it: BASE+{ref}"
        )
    try:
        base = open_checkpoint(adapter.base, adapter.base_revision, allow_pickle=allow_pickle)
    except ModelError as error:
        raise ModelError(
            f"is a LoRA adapter, and its base {adapter.base} cannot be opened: {error.what}",
            where=str(ref),
            hint=f"name the base yourself: BASE+{ref}",
        ) from None
    return adapt(base, adapter, str(ref))


def _open_adapter(path: str, revision: str | None, subfolder: str | None, *, allow_pickle: bool) -> Adapter:
    from geomerge.checkpoint.lora import open_adapter

    return open_adapter(path, revision, subfolder=subfolder, allow_pickle=allow_pickle)


def adapt(base: Checkpoint, adapter: Adapter, ref: str) -> Checkpoint:
    """A base with an adapter's changes. The base's descriptors are closed; it may be used again.

    Raises:
        IncompatibleModels: The adapter is not for this base: module, shapes and reason are named.
    """
    return _Fit(base, adapter, ref).made()


class _Fit:
    def __init__(self, base: Checkpoint, adapter: Adapter, ref: str) -> None:
        self.base, self.adapter, self.ref = base, adapter, ref
        self.anatomy: Anatomy = anatomy.read(base.shapes, base.config)
        self.tensors: dict[str, Coded | TensorInfo] = dict(base.logical)
        self.memory = dict(base.memory)
        self.changes: dict[str, Change] = {}
        self.config = base.config
        self.notes: list[str] = list(base.notes)
        if base.changes:
            raise IncompatibleModels("the base has an adapter already", where=ref, hint="merge that one first")

    def made(self) -> Checkpoint:
        adapter, base = self.adapter, self.base
        low = {f"{path}.weight": each for path, each in adapter.modules.items()}
        biases = {f"{path}.bias": each for path, each in adapter.modules.items() if each.bias}
        from geomerge.engine.adapter_names import base_names

        names, left = base_names(adapter, self._known(), [*low, *adapter.whole], self.ref)
        self.notes += left
        whole = {names[path]: stored for path, stored in adapter.whole.items()}
        low = {names[path]: each for path, each in low.items() if path in names}
        self._see_to_ties(whole, low)
        rows = self._replace(whole)
        for name, each in low.items():
            self._change(name, each)
        for path, each in biases.items():
            self._add_bias(names[path.removesuffix("bias") + "weight"].removesuffix("weight") + "bias", each)
        if rows is not None and self.config is not None:
            self.config = edit_config(self.config, vocab_size=rows)
        self._compare_base()
        wanted = {name: adapter.weights.tensors[name] for c in self.changes.values() for name in c.factors}
        if base.memory or adapter.weights.memory:
            self.memory |= {name: load(adapter.weights, info) for name, info in wanted.items()}
            wanted = {name: replace(info, file=None, offset=0) for name, info in wanted.items()}
        adapter.weights.close()
        tensors, decoding = self._stored()
        return Checkpoint(
            self.ref,
            None if base.path is None else Located(base.path, base.hub_id, base.revision),
            folder=base.folder,
            config=self.config,
            tensors=tensors,
            quantization=base.quantization,
            decoding=decoding,
            # A base that came from no file has all in memory, the adapter, too: then the files say nothing of what it is.
            files=(*base.files, *adapter.weights.files) if base.files else (),
            metadata=base.metadata,
            memory=self.memory,
            changes=self.changes,
            factors=wanted,
            adapter=adapter.folder or adapter.weights.path,
            tokenizer_folder=self._tokenizer(rows),
            notes=tuple(self.notes),
        )

    def _stored(self) -> tuple[dict[str, TensorInfo], Decoding]:
        """What lies in the files, and what of it is decoded: the base's, but for tensors that are replaced or untied."""
        tensors, coded = dict(self.base.tensors), dict(self.base.coded)
        for name, each in self.tensors.items():
            if each is self.base.logical.get(name):
                continue
            if name in coded:
                for part in coded.pop(name).stored:
                    tensors.pop(part, None)
            if isinstance(each, TensorInfo):
                tensors[name] = each
            else:
                coded[name] = each
        return tensors, replace(self.base.decoding, coded=coded)

    def _known(self) -> set[str]:
        """Names that an adapter may speak of: the base's tensors, and other names of its tied ones."""
        tied = {alias for alias, stored in self.anatomy.tied.items() if stored in self.tensors}
        return {*self.tensors, *tied}

    # -- tied weights --------------------------------------------------------------------------------------------------

    def _see_to_ties(self, whole: dict[str, str], low: dict[str, LowRank]) -> None:
        """Tied weights of which an adapter changes one, or each in its own way, are stored apart from then on."""
        untied = []
        for alias, stored in self.anatomy.tied.items():
            touched = [name for name in (alias, stored) if name in whole or name in low]
            if not touched or stored not in self.tensors:
                continue
            if len(touched) == 1 and touched[0] not in low and self._together(whole, touched[0], stored):
                whole[stored] = whole.pop(touched[0])
                continue
            if (
                alias in whole
                and stored in whole
                and not {alias, stored} & low.keys()
                and self._equal(whole, alias, stored)
            ):
                del whole[alias]
                continue
            self.tensors[alias] = replace(self.tensors[stored], name=alias)
            if stored in self.memory:
                self.memory[alias] = self.memory[stored]
            untied.append(alias)
            self.notes.append(
                f"the adapter {self.adapter.ref} changes {' and '.join(touched)}, and the base ties {alias} to {stored}: "
                "they are stored apart"
            )
        if not untied:
            return
        if self.config is not None:
            self.config = edit_config(self.config, tie=False)
        still = anatomy.read({n: t.shape for n, t in self.tensors.items()}, self.config).tied
        for alias in untied:
            if alias in still:
                raise IncompatibleModels(
                    f"changes {alias}, which this architecture always shares with {still[alias]}", where=self.ref
                )

    def _equal(self, whole: Mapping[str, str], alias: str, stored: str) -> bool:
        """Whether the adapter holds one tensor under both names, as PEFT does with tied modules."""
        weights = self.adapter.weights
        one, two = (weights.tensors[whole[name]] for name in (alias, stored))
        return (one.dtype, one.shape) == (two.dtype, two.shape) and weights.read_bytes(one) == weights.read_bytes(two)

    def _together(self, whole: Mapping[str, str], name: str, stored: str) -> bool:
        """Whether a tensor that replaces one of a tied pair stands for both."""
        shape = self.adapter.weights.tensors[whole[name]].shape
        return self.adapter.config.get("ensure_weight_tying") is True or shape != self.tensors[stored].shape

    # -- whole tensors -------------------------------------------------------------------------------------------------

    def _replace(self, whole: Mapping[str, str]) -> int | None:
        """Put the adapter's whole tensors in the base's place; returns the rows of a vocabulary that they changed."""
        rows: set[int] = set()
        for name, stored in whole.items():
            new, old = self.adapter.weights.tensors[stored], self.tensors[name]
            if new.shape != old.shape:
                axis = self.anatomy.vocabulary.get(name)
                cut = None if axis is None else new.shape[:axis] + new.shape[axis + 1 :]
                if axis is None or len(new.shape) != len(old.shape) or cut != old.shape[:axis] + old.shape[axis + 1 :]:
                    raise self._shapes(name, f"{list(new.shape)}", old)
                rows.add(new.shape[axis])
            dtype = self._dtype(name)
            placed = replace(new, name=name)
            if self.base.memory or self.adapter.weights.memory:
                self.memory[name] = load(self.adapter.weights, new)
                placed = replace(placed, file=None, offset=0)
            self.tensors[name] = placed
            if new.dtype != dtype:
                self.changes[name] = Change(dtype)
        if not rows:
            return None
        sizes = {
            name: self.tensors[name].shape[axis]
            for name, axis in self.anatomy.vocabulary.items()
            if name in self.tensors and not (name in self.anatomy.tied and name not in whole)
        }
        if len(set(sizes.values())) != 1:
            listed = ", ".join(f"{name}: {count:,}" for name, count in sizes.items())
            raise IncompatibleModels(
                f"the adapter brings a vocabulary of another size for some matrices only ({listed} rows)",
                where=self.ref,
            )
        return rows.pop()

    # -- low-rank changes ----------------------------------------------------------------------------------------------

    def _change(self, name: str, low: LowRank) -> None:
        info = self.tensors[name]
        dtype = self.changes[name].dtype if name in self.changes else self._dtype(name)
        if DTYPES[dtype].kind != "float":
            raise IncompatibleModels(f"changes {name}, which is {DTYPES[dtype].recipe}", where=self.ref)
        a, b = (self.adapter.weights.tensors[n].shape for n in (low.a, low.b))
        # PEFT looks at the layer itself and corrects its config's flag; for a family that is not known it is all there is.
        flagged = self.adapter.fan_in_fan_out and self.anatomy.guessed
        transposed = low.embedding or stored_transposed(name, self.base.config) or flagged
        # A 1×1 convolution and a linear layer have the same weights.
        shape, inner = _without_ones(info.shape), _without_ones((0, *a[1:]))[1:]
        fits = shape == (inner[0], b[0]) if transposed and len(inner) == 1 else shape == (b[0], *inner)
        if not fits or (transposed and len(inner) != 1):
            raise self._shapes(name, f"B {list(b)} and A {list(a)}", info)
        if low.magnitude:
            count = self.adapter.weights.tensors[low.magnitude].nbytes
            count //= DTYPES[self.adapter.weights.tensors[low.magnitude].dtype].itemsize
            if count != b[0]:
                raise self._shapes(name, f"{count} magnitudes for {b[0]} outputs", info)
        self.changes[name] = Change(dtype, low.b, low.a, low.scale, transposed, low.magnitude)

    def _add_bias(self, name: str, low: LowRank) -> None:
        info = self.tensors.get(name)
        if info is None:
            raise IncompatibleModels(
                f"the adapter adds a bias to {low.module}, which has none in the base", where=self.ref
            )
        bias = self.adapter.weights.tensors[low.bias].shape
        if bias != info.shape or name in self.changes:
            raise self._shapes(name, f"{list(bias)}", info)
        self.changes[name] = Change(self._dtype(name), low.bias, scale=low.scale)

    def _dtype(self, name: str) -> str:
        return self.tensors[name].dtype

    def _shapes(self, name: str, has: str, info: Coded | TensorInfo) -> IncompatibleModels:
        return IncompatibleModels(
            f"the adapter has {has} for {name}, which has the shape {list(info.shape)} in the base",
            where=self.ref,
            hint=self._said("is this the base that it was trained on?"),
        )

    def _said(self, question: str) -> str:
        return f"{question} It names {self.adapter.base!r}" if self.adapter.base else question

    # -- what stands beside --------------------------------------------------------------------------------------------

    def _compare_base(self) -> None:
        said = self.adapter.base
        own = self.base.hub_id or (str(self.base.path) if self.base.path else self.base.ref)
        if said and PurePath(said).name != PurePath(own).name:
            self.notes.append(
                f"the adapter {PurePath(self.adapter.ref).name} names {PurePath(said).name} as its base and is added to "
                f"{PurePath(own).name}: its shapes fit"
            )

    def _tokenizer(self, rows: int | None) -> Path | None:
        """The adapter's own tokenizer, where it has one: that is what it was trained with."""
        folder = self.adapter.folder
        if folder is not None and any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
            return folder
        if rows is not None and self.base.folder is not None:
            raise IncompatibleModels(
                f"the adapter has a vocabulary of {rows:,} rows and no tokenizer that goes with it",
                where=self.ref,
                hint="put the tokenizer's files into the adapter's directory",
            )
        return None


def stored_transposed(name: str, config: Mapping[str, Any] | None) -> bool:
    """Whether a weight is known to be a linear layer's that is stored as (in, out)."""
    layer = name.removesuffix(".weight").rpartition(".")[2]
    return (config or {}).get("model_type") in _CONV1D and layer in _CONV1D_LAYERS


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without the trailing dimensions of 1 that convolutions of a single place have."""
    cut = list(shape)
    while len(cut) > 2 and cut[-1] == 1:
        cut.pop()
    return tuple(cut)


def describe(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What an adapter does to a model, as plain data; `None` for a model without one."""
    if checkpoint.adapter is None:
        return None
    low = [c for c in checkpoint.changes.values() if c.a]
    return {
        "path": str(checkpoint.adapter),
        "changed": len(low),
        "replaced": sum(1 for t in checkpoint.tensors.values() if t.file and t.file.is_relative_to(checkpoint.adapter)),
        "biases": sum(1 for c in checkpoint.changes.values() if c.b and not c.a),
        "ranks": sorted({checkpoint.factors[c.a].shape[0] for c in low}),
        "scales": sorted({c.scale for c in low}),
        "dora": any(c.magnitude for c in low),
        "notes": list(checkpoint.notes),
    }
