"""The models of a diagnosis: opened, checked to be comparable, and lined up tensor by tensor as a plan.

The plan is one that makes nothing: its nodes only say which tensors belong together, so that the engine's sources, tiles and
workers can be used on them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomerge.anatomy import Part
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.dtypes import DTYPES
from geomerge.diagnose.tokens import shared_rows
from geomerge.engine.models import Model, Models
from geomerge.engine.plan import InputModel, Node, Operand, Plan, Rows, Stage
from geomerge.errors import IncompatibleModels, UsageError
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import Where
from geomerge.tokens.rows import RowPlan

_NOWHERE = Where("diagnose", 1)
_SHARED = 0.5
"""Models of which so small a share of the tensors can be compared have different architectures."""


@dataclass(frozen=True)
class Parents:
    """Models lined up with each other.

    Attributes:
        models: The models to be merged.
        base: What they were trained from, if it is known.
        names: What the models are called in the results; each is different.
        plan: One node for each tensor that all of them have; the base's operand comes first.
        parts: What each of these tensors is.
        lacking: For each tensor that only some models have: which models lack it.
    """

    models: tuple[Model, ...]
    base: Model | None
    names: tuple[str, ...]
    plan: Plan
    parts: Mapping[str, Part]
    lacking: Mapping[str, tuple[str, ...]]
    inputs: tuple[Checkpoint, ...]

    @property
    def all(self) -> tuple[Model, ...]:
        """The base, if there is one, and the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names that belong to `all`."""
        return self.names if self.base is None else ("the base", *self.names)


@contextlib.contextmanager
def open_parents(
    references: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    given: Mapping[str, Checkpoint] | None = None,
    allow_pickle: bool = False,
) -> Iterator[Parents]:
    """Open and line up models; they are closed at the end of the context.

    Args:
        references: Paths or hub ids.
        base: The same for their base.
        given: Models in memory by reference.
        allow_pickle: Read pickled weights (weights only).

    Raises:
        UsageError: There are fewer than two, or one is named twice.
        ModelError: One cannot be opened.
        IncompatibleModels: They have different architectures, or no token in common.
    """
    said = [str(r) for r in references]
    if len(said) < 2:
        raise UsageError("a diagnosis compares at least two models", hint="geomerge diagnose A B")
    opened = Models(given, allow_pickle=allow_pickle)
    try:
        models = [opened.get(parse_reference(r, _NOWHERE)) for r in said]
        root = None if base is None else opened.get(parse_reference(str(base), _NOWHERE))
        _check_distinct(models, root)
        yield _line_up(models, root, opened.inputs)
    finally:
        for checkpoint in opened.inputs:
            checkpoint.close()


def _check_distinct(models: Sequence[Model], base: Model | None) -> None:
    seen: dict[object, Model] = {}
    for model in models:
        key = _place(model)
        if key in seen:
            raise UsageError(f"{model} and {seen[key]} are the same model", hint="give models that differ")
        seen[key] = model
    if base is not None and _place(base) in seen:
        raise UsageError(
            f"the base is {seen[_place(base)]} itself, whose task vector is zero",
            hint="leave out --base, or give the models that were trained from it",
        )


def _place(model: Model) -> object:
    checkpoint = model.checkpoint
    if checkpoint is None or checkpoint.path is None:
        return id(model)
    return checkpoint.path.resolve(), checkpoint.adapter and checkpoint.adapter.resolve()


def short_names(models: Sequence[Model]) -> tuple[str, ...]:
    """The last part of each path, or more of it where two would be the same."""
    written = [str(m) for m in models]
    for depth in range(1, 4):
        names = ["/".join(Path(w).parts[-depth:]) if Path(w).parts else w for w in written]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(written)


def _line_up(models: Sequence[Model], base: Model | None, inputs: Sequence[Checkpoint]) -> Parents:
    everyone = list(models) if base is None else [base, *models]
    names = short_names(models)
    labels = list(names) if base is None else [f"the base {short_names([base])[0]}", *names]
    _check_depth(everyone, labels)
    nodes: list[Node] = []
    rows: list[Rows] = []
    parts: dict[str, Part] = {}
    lacking: dict[str, tuple[str, ...]] = {}
    rows_of = _RowPlans(everyone, labels, rows)
    first = models[0]
    candidates = dict.fromkeys(n for m in models for n in m.anatomy.parts)
    for name in candidates:
        owner = next(m for m in models if name in m.anatomy.parts)
        if name in owner.anatomy.buffers or _alias(owner, name):
            continue
        found = [m.find(name) for m in everyone]
        without = tuple(label for label, n in zip(labels, found, strict=True) if n is None)
        if without:
            lacking[name] = without
            continue
        stored = [n for n in found if n is not None]
        kinds = [m.tensors[n] for m, n in zip(everyone, stored, strict=True)]
        if any(DTYPES[k.dtype].kind != "float" for k in kinds):
            continue
        operands = tuple(m.operand(n) for m, n in zip(everyone, stored, strict=True))
        shape = kinds[0].shape
        if owner.anatomy.vocabulary.get(name) == 0 and all(len(k.shape) == len(shape) for k in kinds):
            reordered = rows_of.reorder(operands, [k.shape for k in kinds], name)
            if reordered is not None:
                operands, shape = reordered
        elif any(k.shape != shape for k in kinds):
            raise _shapes_differ(name, labels, [k.shape for k in kinds])
        nodes.append(Node(name, shape, kinds[0].dtype, operands, None))
        parts[name] = owner.anatomy.parts[name]
    if len(nodes) < _SHARED * max(len(nodes) + len(lacking), 1) or not nodes:
        example, without = next(iter(lacking.items()), ("any tensor", tuple(labels)))
        raise IncompatibleModels(
            f"the models have different architectures: {len(lacking):,} of {len(nodes) + len(lacking):,} tensors are not in "
            f"all of them ({', '.join(without)} has no {example})",
            where=str(first),
            hint="models can be merged when they share an architecture",
        )
    plan = Plan(
        inputs=tuple(InputModel(c.ref, "", None, None, (), "") for c in inputs),
        stages=(Stage(None, "passthrough", 0, "nearest", None),),
        nodes=tuple(nodes),
        outputs=tuple(range(len(nodes))),
        left_out={},
        rows=tuple(rows),
        config=None,
        copies={},
        texts={},
        recipe="",
    )
    return Parents(tuple(models), base, names, plan, parts, lacking, tuple(inputs))


def _alias(model: Model, name: str) -> bool:
    """Whether a name stands for another tensor that the model stores."""
    return name in model.anatomy.tied and model.anatomy.tied[name] in model.tensors


def _check_depth(models: Sequence[Model], labels: Sequence[str]) -> None:
    first = dict(models[0].anatomy.depth)
    for model, label in zip(models[1:], labels[1:], strict=True):
        if dict(model.anatomy.depth) != first:
            types = [str((each.config or {}).get("model_type")) for each in (models[0], model)]
            kinds = [f"{kind} with " if types[0] != types[1] else "" for kind in types]
            cut = "" if types[0] != types[1] else "; `slices:` in a recipe can cut blocks out"
            raise IncompatibleModels(
                f"the models have different architectures: {labels[0]} has {kinds[0]}{_said_depth(first)}, {label} has "
                f"{kinds[1]}{_said_depth(dict(model.anatomy.depth))}",
                where=str(model),
                hint=f"models can be merged when they share an architecture{cut}",
            )


def _said_depth(depth: dict[str, int]) -> str:
    return (
        ", ".join(f"{blocks} blocks" + (f" in {name}" if name else "") for name, blocks in depth.items()) or "no blocks"
    )


def _shapes_differ(name: str, labels: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> IncompatibleModels:
    said = ", ".join(f"{label} {list(shape)}" for label, shape in zip(labels, shapes, strict=True))
    return IncompatibleModels(
        f"the models have different architectures: {name} has different shapes: {said}",
        hint="models can be merged when they share an architecture",
    )


class _RowPlans:
    """Rows of vocabulary matrices that mean the same token in all models."""

    def __init__(self, models: Sequence[Model], labels: Sequence[str], rows: list[Rows]) -> None:
        self._models, self._labels, self._rows = models, labels, rows
        self._shared: dict[tuple[int, ...], Any] = {}

    def reorder(
        self, operands: tuple[Operand, ...], shapes: Sequence[tuple[int, ...]], name: str
    ) -> tuple[tuple[Operand, ...], tuple[int, ...]] | None:
        """Operands that read the shared tokens' rows only; `None` when the matrices can be compared as they are."""
        if len({shape[1:] for shape in shapes}) > 1:
            raise _shapes_differ(name, self._labels, shapes)
        heights = tuple(shape[0] for shape in shapes)
        if heights not in self._shared:
            self._shared[heights] = shared_rows([m.vocabulary for m in self._models], heights)
        shared = self._shared[heights]
        if shared is None:
            return None
        if not shared.shape[1]:
            raise IncompatibleModels(
                f"the vocabularies of {' and '.join(self._labels)} are disjoint: they have no token in common",
                hint="models can be merged when they share tokens; choose another pair",
            )
        made = []
        for k, operand in enumerate(operands):
            plan = RowPlan(k, np.full(shared.shape[1], k), shared[k], shared)
            made.append(operand._replace(rows=len(self._rows)))
            self._rows.append(Rows(operands, plan))
        return tuple(made), (shared.shape[1], *shapes[0][1:])
