"""Combining adapters into one: on ΔW, never on A and B apart.

* Methods whose result is a linear combination (linear, task arithmetic, SLERP, Karcher, Model Stock, …) give the exact factors
  [c₁B₁ … c_TB_T]·[A₁; …; A_T]; norms and angles come from the factors, too. Truncation to a rank is the best there is.
* Elementwise methods (TIES, DARE, DELLA, Breadcrumbs, SCE, RAM) have a result of full rank. ΔW is made tile by tile, merged as
  the tensors of whole models are, and its leading directions are found from passes over it (`geomerge.adapter.streamed`).
* With KnOTS they act in a basis that the adapters share, and the result has low rank by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from geomerge.adapter import knots as knots_method
from geomerge.adapter.layers import Layer, factors_of, layer_of
from geomerge.adapter.low_rank import Budget, Factors, Truncated, combination, inner, truncate
from geomerge.adapter.report import Report, layer_reports
from geomerge.adapter.streamed import Streamed, in_rows
from geomerge.adapter.streamed import truncate as truncate_streamed
from geomerge.adapter.whole import whole_tensors
from geomerge.adapter.write import Content, write
from geomerge.align.sources import ConstantSource, Once
from geomerge.checkpoint.change import Change
from geomerge.checkpoint.dtypes import parse_dtype, to_torch
from geomerge.checkpoint.lora import Adapter, open_adapter
from geomerge.engine.adapted import open_model
from geomerge.engine.execute import cores
from geomerge.engine.lora import LoraSource
from geomerge.errors import IncompatibleModels, UsageError
from geomerge.late import also_alone, torch_alone
from geomerge.methods import registry
from geomerge.methods.base import Method, Span
from geomerge.methods.elementwise.task_vectors import TaskVectors
from geomerge.methods.gram import Gram
from geomerge.methods.kernel import prepare
from geomerge.methods.tile import Scan, Source
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import NOWHERE

Item = TypeVar("Item")
Made = TypeVar("Made")

_ELEMENTWISE = ("sce", "ram", "ramplus_tl")
"""Elementwise methods beside those of `TaskVectors` that look at task vectors only."""
_PEERS = ("slerp", "layer_adaptive_slerp")
"""Methods whose base is one of the models that are merged."""


class Progress(Protocol):
    """Watches the layers."""

    def start(self, total: int, done: int) -> None:
        """So many layers there are, and so many are done."""

    def advance(self, nbytes: int) -> None:
        """So many more are done."""


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    base: str | Path | None = None,
    knots: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    dtype: str = "float32",
    threads: int | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Make one adapter of several.

    Args:
        adapters: PEFT directories or hub ids, all for one base.
        out: The directory to make.
        method: A merge method's name.
        parameters: Its parameters; one for each adapter may be a list.
        base: Their base: needed where they hold tensors whole that differ.
        knots: Merge in the adapters' shared basis.
        rank, energy: At most so many directions a layer; the fewest that hold this share of ‖ΔW‖². By default as many as the
            adapters have together, which for all but elementwise methods loses nothing.
        seed: Key of random draws.
        dtype: Of the output's factors.
        threads: By default one for each core that the process may use.
        force: Replace an existing adapter.
        allow_pickle: Read pickled weights (weights only).
        progress: Told of each layer.

    Raises:
        UsageError: A method or parameter that adapters cannot be combined with.
        ModelError: An adapter cannot be used, or they do not fit each other.
    """
    budget = checked(rank, energy)
    place = to_torch(parse_dtype(dtype))
    refs = [parse_reference(str(each), NOWHERE) for each in adapters]
    opened = [open_adapter(r.path, r.revision, allow_pickle=allow_pickle) for r in refs]
    root = None if base is None else open_model(parse_reference(str(base), NOWHERE), allow_pickle=allow_pickle)
    try:
        made_by, based = _method(method, parameters or {}, len(opened), knots=knots)
        layers = _layers(opened)
        whole = whole_tensors(opened, root, made_by, seed, based=based)
        notes = _notes(opened)
        work = _Work(opened, made_by, budget, seed, based=based)
        if progress is not None:
            progress.start(len(layers), 0)
        if knots:
            joined = list(each_of(layers, work.join, threads, None))
            merged = knots_method.merge(joined, made_by, seed, based=based) if joined else []
            del joined
            made = list(each_of(merged, lambda f: truncate(f, budget), threads, progress))
        else:
            made = list(each_of(layers, work.make, threads, progress))
        count = "1 adapter" if len(opened) == 1 else f"{len(opened)} adapters"
        how = f"{count} combined by {made_by.name}" + (" in their KnOTS basis" if knots else "")
        first = opened[0]
        tying = all(a.config.get("ensure_weight_tying") for a in opened)
        content = Content(
            [(layer, each.factors) for layer, each in zip(layers, made, strict=True)],
            whole,
            base=first.base,
            base_revision=first.base_revision,
            fan_in_fan_out=first.fan_in_fan_out,
            settings={"task_type": first.config.get("task_type"), **({"ensure_weight_tying": True} if tying else {})},
        )
        report = Report(Path(out), how, layer_reports(layers, made), tuple(whole), notes=notes).noted()
        described = {
            **report.to_json(),
            "method": {"name": made_by.name, "parameters": made_by.values(), "knots": knots, "seed": seed},
            "adapters": [{"name": PurePath(a.ref).name, "fingerprint": a.weights.fingerprint()} for a in opened],
        }
        for checkpoint in [a.weights for a in opened] + ([root] if root else []):
            checkpoint.verify_unchanged()
        places = [*(a.folder or a.weights.path for a in opened), root.path if root else None]
        final, nbytes = write(
            out, content, described, dtype=place, inputs=[p for p in places if p is not None], force=force
        )
        return replace(report, out=final, nbytes=nbytes)
    finally:
        for checkpoint in [a.weights for a in opened] + ([root] if root else []):
            checkpoint.close()


def checked(rank: int | None, energy: float | None) -> Budget:
    """A budget from what the user asked for.

    Raises:
        UsageError: It is none.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"the rank is {rank}; it must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"the energy is {energy}; it is a share of ‖ΔW‖², above 0 and at most 1")
    return Budget(rank, energy)


def each_of(
    items: Sequence[Item], make: Callable[[Item], Made], threads: int | None, progress: Progress | None
) -> Iterator[Made]:
    """Apply a function to each item, in threads; torch's own are off, so the results do not depend on their number."""
    pool = ThreadPoolExecutor(threads or cores(), thread_name_prefix="geomerge-adapter", initializer=also_alone)
    try:
        with torch_alone():
            for made in pool.map(make, items):
                if progress is not None:
                    progress.advance(1)
                yield made
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _method(name: str, given: Mapping[str, Any], count: int, *, knots: bool) -> tuple[Method, bool]:
    """The method, and whether it takes a base beside the adapters (which is zero: no change)."""
    kind = registry.get(name)
    listed = issubclass(kind, TaskVectors) or kind.name in _ELEMENTWISE
    if not issubclass(kind, Span) and not listed:
        raise UsageError(
            f"{kind.name} does not work on task vectors alone, so adapters cannot be combined with it",
            hint="name the models as BASE+ADAPTER in a recipe, and merge those",
        )
    based = kind.base_use == "required" and kind.name not in _PEERS
    values = dict(given)
    weight = kind.parameters().get("weight")
    if "weight" not in values and weight is not None and weight.required:
        values["weight"] = 1.0
    peers = kind.base_use == "required" and not based
    method = kind.make(values, count=count - 1 if peers else count)
    if isinstance(method, Span) and (method.axis != "tensor" or method.grouped):
        raise UsageError(f"{kind.name} with these parameters does not take one set of coefficients for each tensor")
    if knots and (method.rows or (isinstance(method, Span) and method.needs_gram)):
        raise UsageError(
            f"{kind.name} gains nothing from KnOTS" if isinstance(method, Span) else f"{kind.name} needs whole rows",
            hint="use ties, dare_ties, dare_linear or breadcrumbs with --knots",
        )
    return method, based


class _Work:
    """Makes the layers of the combined adapter, one at a time."""

    def __init__(self, adapters: Sequence[Adapter], method: Method, budget: Budget, seed: int, *, based: bool) -> None:
        self._adapters, self._method, self._budget, self._seed = adapters, method, budget, seed
        self._based = based

    def terms(self, layer: Layer) -> list[Factors]:
        """The adapters' changes of a layer; of rank 0 where one does not change it."""
        made = []
        for adapter in self._adapters:
            low = adapter.modules.get(layer.module)
            if low is None:
                rows, columns = layer.shape
                zero = Factors(torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, columns, dtype=torch.float64))
            made.append(zero if low is None else factors_of(adapter, low))
        return made

    def join(self, layer: Layer) -> knots_method.Joint:
        """A layer in the shared basis."""
        return knots_method.joint(self.terms(layer))

    def make(self, layer: Layer) -> Truncated:
        """A layer of the result."""
        terms = self.terms(layer)
        if isinstance(self._method, Span):
            return truncate(combination(terms, self._coefficients(self._method, terms)), self._budget)
        budget = self._budget
        if budget.rank is None and budget.energy is None:
            present = [a.modules[layer.module].rank for a in self._adapters if layer.module in a.modules]
            budget = Budget(sum(present))
        return truncate_streamed(self._streamed(layer, terms), budget, layer.module, self._seed)

    def _coefficients(self, method: Span, terms: Sequence[Factors]) -> list[float]:
        """The adapters' coefficients."""
        count = len(terms) + self._based
        centred = np.full((count, count), np.nan)
        if method.needs_gram:
            gram = np.zeros((count, count))
            gram[self._based :, self._based :] = [[inner(x, y) for y in terms] for x in terms]
            change = np.eye(count)
            change[1:, 0] = -1.0
            centred = change @ gram @ change.T
        found = np.asarray(method.coefficients(Gram(centred)), dtype=np.float64)
        return [float(c) for c in found[int(self._based) :]]

    def _streamed(self, layer: Layer, terms: Sequence[Factors]) -> Streamed:
        """The merged ΔW of an elementwise method."""
        name = f"{layer.module}.weight"
        nothing: Source = ConstantSource(0.0, f"no change: {name}")
        sources = [nothing] * self._based
        for adapter, term in zip(self._adapters, terms, strict=True):
            zero = ConstantSource(0.0, f"{adapter.ref}: {name}")
            sources.append(LoraSource(zero, layer.shape, Change("F64", "b", "a"), _held(term.b), _held(term.a)))

        def open_scan(**tiling: Any) -> Scan:
            return Scan(sources, layer.shape, name=name, seed=self._seed, **tiling)

        prepared = prepare(self._method, open_scan, layer.shape)

        def blocks() -> Iterator[Tensor]:
            pieces = (values for s in prepared.scan.segments for _, values in prepared.tiles(s))
            return in_rows(pieces, *layer.shape)

        return Streamed(*layer.shape, blocks)


def _held(tensor: Tensor) -> Once:
    return Once(lambda: tensor)


def _layers(adapters: Sequence[Adapter]) -> list[Layer]:
    """All layers that any of the adapters changes, in the order of their first mention."""
    if not adapters:
        raise UsageError("there are no adapters to combine")
    found: dict[str, tuple[Layer, Adapter]] = {}
    for adapter in adapters:
        if adapter.layout != "peft":
            raise IncompatibleModels(
                "is a file in kohya's layout, whose modules have no names without their base",
                where=adapter.ref,
                hint="merge BASE+ADAPTER references instead, or extract the result again",
            )
        for module, low in adapter.modules.items():
            if low.magnitude or low.bias:
                what = "magnitudes (DoRA)" if low.magnitude else "a bias"
                raise IncompatibleModels(
                    f"{module} has {what}, so its change is not s·B·A",
                    where=adapter.ref,
                    hint="merge BASE+ADAPTER references instead; `geomerge adapter extract` makes an adapter of the result",
                )
            layer = layer_of(adapter, low)
            known, owner = found.setdefault(module, (layer, adapter))
            if known != layer:
                raise IncompatibleModels(
                    f"{module} is {known.kind} {list(known.shape)} in {owner.ref} and {layer.kind} {list(layer.shape)} "
                    f"in {adapter.ref}",
                    hint="only adapters of one base can be combined",
                )
    return [layer for layer, _ in found.values()]


def _notes(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    notes = []
    bases = list(dict.fromkeys(PurePath(a.base).name for a in adapters if a.base))
    if len(bases) > 1:
        notes.append(f"the adapters name different bases ({', '.join(bases)}); the first is written down")
    first: dict[str, Adapter] = {}
    for each in adapters:
        known = first.setdefault(each.weights.fingerprint(), each)
        # The fingerprint looks at samples.
        if known is not each and known.weights.content_hash() == each.weights.content_hash():
            notes.append(f"{known.ref} and {each.ref} hold the same weights: they count twice")
    return tuple(notes)
