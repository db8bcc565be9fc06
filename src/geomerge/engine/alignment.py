"""``align:`` in a plan: which operand is folded and rotated how, and whether that helps.

The rotation of each model is found while the plan is made, from the embeddings of the tokens that it shares with the model that
stays. Angles between a sample of the tensors concerned are then measured three ways: as they are, with the gains folded,
and rotated. A rotation that does not lower the mean angle below both is left out, and the notes and the manifest say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geomerge.anatomy import Part
from geomerge.engine.models import Model, Models
from geomerge.engine.plan import Anchor, Operand, Rotation, Transform
from geomerge.engine.transforms import Transforms
from geomerge.engine.vocabularies import Vocabularies
from geomerge.errors import IncompatibleModels, RecipeError
from geomerge.late import torch_alone
from geomerge.methods.gram import Gram
from geomerge.recipe.values import AlignSpec, Recipe

if TYPE_CHECKING:
    from geomerge.align.residual import Place, Residual
    from geomerge.tokens.rows import IntArray

TENSORS = 96
"""At most so many tensors are measured, spread evenly over the model."""

VECTORS = 64
"""So many rows (of writers: columns) of each, spread evenly."""

FOLDED = "fold: the gain is part of what follows the norm"
"""The rule of norms whose gain went into the readers."""

_SCATTERED = 16
"""Rows in a block of a matrix over a vocabulary that is put in another order."""


@dataclass(frozen=True)
class Angles:
    """Mean angles of one model with the one that stays: as they are, with gains folded, rotated."""

    plain: float
    folded: float
    rotated: float

    @property
    def better(self) -> bool:
        """Whether the rotation helps."""
        return self.rotated < min(self.plain, self.folded)


class Alignment:
    """The alignment of one recipe's models; without ``align`` every operand stays as it is.

    Args:
        recipe: The recipe.
        members: Its models.
        donor: The model that stays unless the recipe names another.
        models: Opened inputs.
        vocabularies: Which rows of which model are one token.
        transforms, rotations: Where these are collected; operands refer to them by index.

    Raises:
        RecipeError: ``to`` is no model of the merge, or the alignment cannot be combined with something else that is asked for.
        IncompatibleModels: A model's basis cannot be rotated, or there are no shared tokens.
    """

    def __init__(
        self,
        recipe: Recipe,
        members: list[Model],
        donor: Model,
        models: Models,
        vocabularies: Vocabularies,
        transforms: list[Transform],
        rotations: list[Rotation],
    ) -> None:
        self.notes: list[str] = []
        self.facts: list[dict[str, Any]] = []
        self.untied: dict[str, str] = {}
        self._members, self._vocabularies = members, vocabularies
        self._transforms, self._rotations = transforms, rotations
        self._residuals: dict[int, Residual] = {}
        self._embeddings: dict[int, str] = {}
        self._turned: dict[int, int] = {}
        self._known: dict[Transform, int] = {}
        self._opened = Transforms(models.inputs, transforms, rotations)
        spec = recipe.align
        self.spec = spec
        if spec is None:
            return
        self._refuse_combinations(recipe, spec)
        fixed = donor if spec.to is None else models.get(spec.to, spec.where)
        if fixed not in members:
            raise RecipeError(
                f"`align: to` names {spec.to}, which is not a model of this merge",
                where=str(spec.where),
                hint=f"its models: {', '.join(map(str, members))}",
            )
        self._check_members()
        self._measure_all(spec, fixed)

    # -- what may be aligned -------------------------------------------------------------------------------------------

    def _refuse_combinations(self, recipe: Recipe, spec: AlignSpec) -> None:
        for key, given in (("statistics", recipe.statistics), ("requantize", recipe.requantize)):
            if given:
                raise RecipeError(
                    f"`align` and `{key}` exclude each other: {key} belong to the weights as they are stored",
                    where=str(recipe.at(key)),
                )
        for model in self._members:
            if model.checkpoint is None:
                raise RecipeError(
                    f"only models on disk or in memory can be aligned; {model} is made by this file",
                    where=str(spec.where),
                    hint="align in the document that reads the models, or merge in two runs",
                )

    def _check_members(self) -> None:
        assert self.spec is not None
        for model in self._members:
            shapes = {name: kind.shape for name, kind in model.tensors.items()}
            if self.spec.scope == "residual":
                from geomerge.align.residual import read

                found = read(str(model), model.anatomy, shapes, model.config)
                self._residuals[id(model)] = found
                self._embeddings[id(model)] = found.embedding
            else:
                self._embeddings[id(model)] = _embedding(model)
        widths = {str(m): m.tensors[self._embeddings[id(m)]].shape[-1] for m in self._members}
        offsets = {residual.offset for residual in self._residuals.values()}
        if len(set(widths.values())) > 1 or len(offsets) > 1:
            said = ", ".join(f"{m}: {w}" for m, w in widths.items())
            raise IncompatibleModels(
                f"the models' hidden spaces differ ({said}): they cannot be aligned" if len(offsets) < 2
                else "the models' norms differ (one multiplies by its gain, another by 1 + gain): they cannot be aligned",
                where=str(self.spec.where),
            )  # fmt: skip

    # -- finding and judging the rotations -----------------------------------------------------------------------------

    def _measure_all(self, spec: AlignSpec, fixed: Model) -> None:
        turned: dict[int, int] = {}
        before = len(self._transforms)
        for model in self._members:
            if model is fixed:
                continue
            moving, staying = self._shared(model, fixed)
            rotation, determined, using = self._find(spec, model, fixed, moving, staying)
            angles = self._angles(rotation, model, fixed)
            width = len(rotation.held[0])
            if angles.better:
                turned[id(model)] = len(self._rotations)
                self._rotations.append(rotation)
            self.facts.append(
                {
                    "model": _name(model),
                    "to": _name(fixed),
                    "scope": spec.scope,
                    "using": using,
                    "shared_tokens": len(moving),
                    "determined": determined,
                    "dimensions": width,
                    "omega_bar": {
                        "before": _round(angles.plain),
                        "folded": _round(angles.folded),
                        "after": _round(angles.rotated),
                    },
                    "kept": angles.better,
                }
            )
            self.notes.append(_note(self.facts[-1], model, fixed))
        self._turned = turned
        if not turned:
            self._residuals.clear()
            del self._transforms[before:]  # those that the rotations would have been found from
            self._known.clear()
        for model in self._members if turned and spec.scope == "residual" else ():
            places = self._residuals[id(model)].places
            self.untied |= {a: s for a, s in model.anatomy.tied.items() if a in places}
        if self.untied:
            self.notes.append(
                "the last norm's gain went into the head, which is therefore stored apart from the embedding "
                f"({', '.join(self.untied)})"
            )

    def _find(
        self, spec: AlignSpec, model: Model, fixed: Model, moving: IntArray, staying: IntArray
    ) -> tuple[Rotation, int, str]:
        """The rotation of a model, how many dimensions its vectors determine, and what it was found from."""
        embedding = Anchor(model.operand(self._embeddings[id(model)]), fixed.operand(self._embeddings[id(fixed)]))
        options = (moving, staying, spec.centre, spec.normalise, spec.weight)
        width = model.tensors[self._embeddings[id(model)]].shape[-1]
        using, determined = spec.using, 0
        rotation = Rotation((embedding,), *options)
        if using == "tokens":
            determined = self._opened.find(rotation)
            if determined < width and spec.scope == "residual":
                self.notes.append(
                    f"the embeddings of {len(moving):,} shared tokens determine {determined} of {width} dimensions of the "
                    f"rotation of {_name(model)}: it is found from the weights as well"
                )
                using = "weights"
        if using == "weights" and spec.scope == "residual":
            rotation = Rotation((embedding, *self._weight_anchors(model, fixed)), *options)
            determined = self._opened.find(rotation)
        return rotation, determined, using

    def _weight_anchors(self, model: Model, fixed: Model) -> list[Anchor]:
        """All matrices that read from or write into the stream, in both models."""
        anchors = []
        for name, place in self._residuals[id(model)].places.items():
            mine, theirs = model.find(name), fixed.find(name)
            vocabulary = mine in model.anatomy.vocabulary
            if place.action not in ("reads", "writes") or mine is None or theirs is None:
                continue
            if model.tensors[mine].shape != fixed.tensors[theirs].shape or (vocabulary and mine != name):
                continue  # a tied head is the embedding once more
            if vocabulary and self._vocabularies.changes:
                continue  # its rows are in another order
            moving, staying = self._folded(model, mine, name), self._folded(fixed, theirs, name)
            anchors.append(Anchor(moving, staying, columns=place.action == "writes"))
        return anchors

    def _folded(self, model: Model, stored: str, name: str) -> Operand:
        """A tensor with its norm's gain, not rotated."""
        residual = self._residuals[id(model)]
        place = residual.places[name]
        if not place.norm:
            return model.operand(stored)
        return self._with(model.operand(stored), Transform(gain=place.norm, offset=residual.offset))

    def _shared(self, model: Model, fixed: Model) -> tuple[IntArray, IntArray]:
        """The rows of the same tokens in both embeddings."""
        rows = [m.tensors[self._embeddings[id(m)]].shape[0] for m in (model, fixed)]
        plan = self._vocabularies.plan
        if plan is not None:
            k, f = (self._members.index(m) for m in (model, fixed))
            both = (plan.owner_rows[k] >= 0) & (plan.owner_rows[f] >= 0)
            named = np.array([name is not None for name in plan.names])
            both &= named if named.any() else True
            pair = plan.owner_rows[k][both], plan.owner_rows[f][both]
        else:
            pair = _same_tokens(model, fixed, rows)
        inside = (pair[0] < rows[0]) & (pair[1] < rows[1])
        moving, staying = pair[0][inside], pair[1][inside]
        if not len(moving):
            raise IncompatibleModels(
                f"{model} and {fixed} have no token in common: there is nothing to align them by",
                where=None if self.spec is None else str(self.spec.where),
            )
        order = np.argsort(moving, kind="stable")
        return moving[order], staying[order]

    def _angles(self, rotation: Rotation, model: Model, fixed: Model) -> Angles:
        """Mean angles between samples of the tensors that the alignment changes."""
        first = rotation.anchors[0]
        tokens = _spread(len(rotation.moving), 16 * VECTORS)
        samples = [(first, rotation.moving[tokens], rotation.fixed[tokens])]
        if id(model) in self._residuals:
            anchors = self._weight_anchors(model, fixed)
            for index in _spread(len(anchors), TENSORS).tolist():
                shape = self._opened.shape(anchors[index].moving)
                which = _spread(shape[1] if anchors[index].columns else shape[0], VECTORS)
                samples.append((anchors[index], which, which))
        found: list[tuple[float, float, float]] = []
        with torch_alone(), torch.inference_mode():
            for anchor, mine, theirs in samples:
                found.append(self._angles_of(rotation, anchor, mine, theirs))
        return Angles(*(math.fsum(column) / len(found) for column in zip(*found, strict=True)))

    def _angles_of(
        self, rotation: Rotation, anchor: Anchor, mine: IntArray, theirs: IntArray
    ) -> tuple[float, float, float]:
        read_vectors = self._opened.vectors
        plain = [o._replace(transform=-1) for o in (anchor.moving, anchor.fixed)]
        a = read_vectors(plain[0], mine, columns=anchor.columns)
        b = read_vectors(plain[1], theirs, columns=anchor.columns)
        before = folded = _angle(a, b)
        if anchor.moving.transform >= 0:
            a = read_vectors(anchor.moving, mine)
            b = read_vectors(anchor.fixed, theirs)
            folded = _angle(a, b)
        return before, folded, _angle(a @ rotation.held[0], b)

    # -- for the planner -----------------------------------------------------------------------------------------------

    def operand(self, model: Model, stored: str, name: str | None = None) -> Operand:
        """The operand of a tensor as the alignment wants it.

        Args:
            model: Whose.
            stored: The tensor's name in its files.
            name: The name by which it is asked for: a tied head is not turned as the embedding is.
        """
        operand = model.operand(stored)
        if not self._turned:
            return operand
        assert self.spec is not None
        rotation = self._turned.get(id(model), -1)
        key = name if name is not None and name in model.anatomy.tied else stored
        vocabulary = stored in model.anatomy.vocabulary and self._vocabularies.changes
        height = _SCATTERED if vocabulary else 0
        if self.spec.scope == "embedding":
            turns = rotation >= 0 and key == self._embeddings[id(model)]
            return self._with(operand, Transform(rotation, height=height)) if turns else operand
        residual = self._residuals[id(model)]
        place = residual.places.get(key) or residual.places[stored]
        how = _transform(place, rotation, residual.offset, height)
        return operand if how is None else self._with(operand, how)

    def folds(self, operand: Operand) -> bool:
        """Whether the operand is a gain that was folded away."""
        return operand.transform >= 0 and self._transforms[operand.transform].constant is not None

    def head(self, alias: str) -> Part:
        """The part of a head that no model stores and the output has to."""
        return Part(alias, "head", "", None, 1.0, "post")

    def _with(self, operand: Operand, how: Transform) -> Operand:
        if how not in self._known:
            self._known[how] = len(self._transforms)
            self._transforms.append(how)
        return operand._replace(transform=self._known[how])


def _transform(place: Place, rotation: int, offset: float, height: int) -> Transform | None:
    if place.action == "gain":
        return Transform(constant=1.0 - offset)
    if place.action == "reads":
        return Transform(rotation, gain=place.norm, offset=offset, height=height)
    if place.action == "inside" or rotation < 0:
        return None
    return Transform(rotation, writes=place.action == "writes", height=height)


def _embedding(model: Model) -> str:
    """The token embedding of any model."""
    found = [
        name
        for name, axis in model.anatomy.vocabulary.items()
        if name in model.tensors
        and axis == 0
        and len(model.tensors[name].shape) == 2
        and model.anatomy.parts[name].role == "embedding"
        and name not in model.anatomy.tied
    ]
    if len(found) != 1:
        raise IncompatibleModels(
            "the model has no token embedding that could be aligned"
            if not found
            else f"the model has several token embeddings ({', '.join(found[:3])}): which to align by is not clear",
            where=str(model),
        )
    return found[0]


def _same_tokens(model: Model, fixed: Model, rows: list[int]) -> tuple[IntArray, IntArray]:
    """Rows of the same token by name, where both vocabularies can be read; else by position."""
    a, b = model.vocabulary, fixed.vocabulary
    if a is None or b is None or "opaque" in (a.kind, b.kind):
        both = np.arange(min(rows), dtype=np.int64)
        return both, both
    pairs = [(i, b.ids[token]) for token, i in a.ids.items() if token in b.ids]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _spread(count: int, most: int) -> IntArray:
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def _angle(a: torch.Tensor, b: torch.Tensor) -> float:
    x, d = b.reshape(-1), (a - b).reshape(-1)
    cross = float(x @ d)
    gram = Gram(np.array([[float(x @ x), cross], [cross, float(d @ d)]]))
    if not np.isfinite(gram.centred).all():
        return math.nan  # the merge itself will find it, and name it
    return float(gram.angle(0, 1)) if gram.norm(0) and gram.norm(1) else 0.0


def _name(model: Model) -> str:
    """A model without its path: notes and manifests hold none."""
    checkpoint = model.checkpoint
    if checkpoint is None:
        return str(model)
    base = checkpoint.hub_id or (checkpoint.path.name if checkpoint.path else checkpoint.ref)
    return f"{base}+{checkpoint.adapter.name}" if checkpoint.adapter else base


def _round(angle: float) -> float | None:
    return None if math.isnan(angle) else float(f"{angle:.3g}")


def _note(fact: Mapping[str, Any], model: Model, fixed: Model) -> str:
    angles = fact["omega_bar"]
    before, after = (math.nan if angles[key] is None else angles[key] for key in ("before", "after"))
    if fact["kept"]:
        warning = ""
        if fact["scope"] == "embedding":
            warning = "; only the embedding is rotated, which changes what the model computes"
        return (
            f"{_name(model)} is rotated into the basis of {_name(fixed)} (align: {fact['scope']}, "
            f"{fact['shared_tokens']:,} shared tokens): the mean angle falls from {before:.3g} to {after:.3g} rad{warning}"
        )
    return (
        f"{_name(model)} is not rotated into the basis of {_name(fixed)}: the mean angle would not fall "
        f"(from {before:.3g} to {after:.3g} rad); merged as it is"
    )
