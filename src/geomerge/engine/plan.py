"""What will be done, as values: every output tensor with its inputs, its method with all parameters, and the rule it follows.

A plan is made once (`geomerge.engine.planner`) and then only read: it can be printed, hashed, saved as JSON and run on
another machine that has the same input files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from geomerge.checkpoint.dtypes import DTYPES
from geomerge.errors import UsageError
from geomerge.methods import registry
from geomerge.methods.base import Method, Span
from geomerge.methods.chain import Step
from geomerge.tokens.rows import RowPlan
from geomerge.version import __version__

if TYPE_CHECKING:
    from geomerge.tokens.rows import IntArray

M = TypeVar("M", bound=Method)

FORMAT = 6
"""The version of the saved form. A plan of another version is refused, not guessed at."""

MIXTURE = "moe"
"""What a stage that puts a mixture of experts together has in place of a method."""
SCALES = "scales of codes"
"""The rule of tensors that are written together with the codes they belong to."""

BUFFER = "copy: buffer of the first model"
"""The rule of tensors that are computed or count steps; a mask among them may hold −∞ on purpose."""

REST = "rest: "
"""How the rule of a tensor begins that a matrix method does not take for a matrix; what follows is its `rest` parameter."""


class Operand(NamedTuple):
    """One input tensor of a node.

    Attributes:
        input: Index in `Plan.inputs`, or -1 when an earlier stage makes the tensor.
        tensor: The name in that input.
        node: Index in `Plan.nodes` for a tensor of an earlier stage, else -1.
        rows: Index in `Plan.rows` when the rows are put in another vocabulary's order, else -1.
        transform: Index in `Plan.transforms` when the tensor is folded or rotated while it is read, else -1.
    """

    input: int
    tensor: str
    node: int = -1
    rows: int = -1
    transform: int = -1


class Columns(NamedTuple):
    """Factors of a merged task vector's columns, from the activations of its input features (AIM).

    Attributes:
        statistics: Mean |xⱼ| of each input feature j.
        omega: What the most active feature keeps: the factor is 1 − (1 − ω)·aⱼ / max a.
        axis: The tensor's dimension of the input features.
    """

    statistics: Operand
    omega: float
    axis: int


@dataclass(frozen=True, slots=True)
class Node:
    """One tensor that is made: of the output, or of an earlier stage.

    Attributes:
        name, shape, dtype: The tensor (`dtype` in safetensors' name).
        operands: Its inputs, base first.
        method: The method with its parameters; `None` copies the first operand's bytes.
        scale: What the steps after the method multiply the merged task vector by.
        chain: The steps that thin each expert's task vector before the method.
        columns: What the steps after the method multiply each column of the merged task vector by.
        lift: Of LiNeS with `alpha: auto`: β·depth; the survey finds α and multiplies `scale` by α + β·depth.
        rule: In words why it is done so: ``"merge"``, ``"copy: integer buffer"``, …
        stage: Which recipe of the pipeline makes it.
        group: Nodes of one stage with the same group share one Gram matrix, the sum of theirs.
        statistics: Further inputs, whose sum weights the inner products.
        scales: For codes (whose `dtype` says which): the node that holds their scales, which is written with this one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    operands: tuple[Operand, ...]
    method: Method | None
    scale: float = 1.0
    rule: str = "merge"
    stage: int = 0
    group: str = ""
    statistics: tuple[Operand, ...] = ()
    scales: str = ""
    lift: float | None = None
    chain: tuple[Step, ...] = ()
    columns: tuple[Columns, ...] = ()

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def interpolates(self) -> bool:
        """Whether it is SLERP of two inputs' tensors."""
        return (
            isinstance(self.method, Span)
            and self.method.needs_gram
            and len(self.operands) == 2
            and isinstance(getattr(self.method, "t", None), float | int)
            and all(operand.input >= 0 for operand in self.operands)
        )


@dataclass(frozen=True, slots=True)
class InputModel:
    """One parent.

    Attributes:
        ref: As the recipe writes it.
        path: Where it was found; empty for a model in memory.
        hub_id, revision: When it came from the hub.
        files: Name, size in bytes and sha256 of the header of each weight file.
        fingerprint: See `Checkpoint.fingerprint`.
        licence: The licence its model card states, if any.
        adapter: Where the adapter was found that is added to it; empty without one.
    """

    ref: str
    path: str
    hub_id: str | None
    revision: str | None
    files: tuple[tuple[str, int, str], ...]
    fingerprint: str
    licence: str | None = None
    adapter: str = ""

    @property
    def name(self) -> str:
        """Without its path: the hub id or the directory's name, and BASE+ADAPTER where an adapter is added."""
        base = self.hub_id or (PurePath(self.path).name if self.path else self.ref)
        return f"{base}+{PurePath(self.adapter).name}" if self.adapter else base


@dataclass(frozen=True, slots=True)
class Stage:
    """What holds for all nodes of one recipe."""

    name: str | None
    method: str
    seed: int
    rounding: str
    compat: str | None


@dataclass(frozen=True)
class Plan:
    """All of a merge.

    Attributes:
        inputs: The parents.
        stages: One for each recipe; the last makes the output.
        nodes: All tensors that are made.
        outputs: Indices in `nodes` of the output's tensors, in the order of its files.
        left_out: Tensors of the parents that the output does not have, with the rule: ``"a: lm_head.weight"`` → why.
        rows: For vocabulary matrices in a new order: the inputs' matrices and where each row comes from.
        config: The output's ``config.json``, or `None` when the parents have none.
        copies: Files to copy into the output: name → path.
        texts: Files to write: name → content.
        recipe: The recipe's text.
        notes: What the user should know.
        transforms, rotations: How operands are folded and rotated while they are read, and what the rotations are found from.
        alignment: What was found when models were aligned, for the manifest.
        guardrails: What the guardrails found and did, for the manifest; empty where they were not asked.
    """

    inputs: tuple[InputModel, ...]
    stages: tuple[Stage, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    left_out: Mapping[str, str]
    rows: tuple[Rows, ...]
    config: dict[str, Any] | None
    copies: Mapping[str, str]
    texts: Mapping[str, str]
    recipe: str
    notes: tuple[str, ...] = ()
    transforms: tuple[Transform, ...] = ()
    rotations: tuple[Rotation, ...] = ()
    alignment: tuple[Mapping[str, Any], ...] = ()
    guardrails: Mapping[str, Any] = field(default_factory=dict)
    _hash: list[str] = field(default_factory=list, compare=False, repr=False)

    def output_nodes(self) -> Iterable[Node]:
        """The output's tensors in order."""
        return (self.nodes[i] for i in self.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of the output's tensors."""
        return sum(node.nbytes for node in self.output_nodes())

    @property
    def hash(self) -> str:
        """sha256 of what the plan does: the same for the same recipe on the same inputs, wherever they lie."""
        if not self._hash:
            data = self.to_dict()
            for model in data["inputs"]:
                model["path"] = model["adapter"] = ""
            data["copies"] = sorted(data["copies"])
            self._hash.append(hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest())
        return self._hash[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which `from_dict` makes an equal plan."""
        methods: dict[Method | None, int] = {}
        steps: dict[Step, int] = {}
        nodes = []
        for n in self.nodes:
            index = methods.setdefault(n.method, len(methods))
            operands = [list(o) for o in n.operands]
            statistics = [list(o) for o in n.statistics]
            nodes.append(
                [
                    n.name,
                    list(n.shape),
                    n.dtype,
                    operands,
                    index,
                    n.scale,
                    n.rule,
                    n.stage,
                    n.group,
                    statistics,
                    n.scales,
                    n.lift,
                    [steps.setdefault(s, len(steps)) for s in n.chain],
                    [[list(c.statistics), c.omega, c.axis] for c in n.columns],
                ]
            )
        return {
            "geomerge_plan": FORMAT,
            "version": __version__,
            "inputs": [
                {
                    "ref": i.ref,
                    "path": i.path,
                    "hub_id": i.hub_id,
                    "revision": i.revision,
                    "files": [list(f) for f in i.files],
                    "fingerprint": i.fingerprint,
                    "licence": i.licence,
                    "adapter": i.adapter,
                }
                for i in self.inputs
            ],
            "stages": [[s.name, s.method, s.seed, s.rounding, s.compat] for s in self.stages],
            "methods": [None if m is None else {"name": m.name, "parameters": _plain(m.values())} for m in methods],
            "steps": [{"name": s.name, "parameters": _plain(s.values())} for s in steps],
            "nodes": nodes,
            "outputs": list(self.outputs),
            "left_out": dict(self.left_out),
            "rows": [r.to_dict() for r in self.rows],
            "config": self.config,
            "copies": dict(self.copies),
            "texts": dict(self.texts),
            "recipe": self.recipe,
            "notes": list(self.notes),
            "transforms": [list(t) for t in self.transforms],
            "rotations": [r.to_dict() for r in self.rotations],
            "alignment": [dict(a) for a in self.alignment],
            "guardrails": dict(self.guardrails),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` described.

        Raises:
            UsageError: It is not a plan, or one of another version.
        """
        if data.get("geomerge_plan") != FORMAT:
            raise UsageError(
                f"this is not a plan of format {FORMAT}", hint="make it again with `geomerge plan RECIPE --save FILE`"
            )
        from geomerge.methods import before

        try:
            methods = [None if m is None else _made(registry.get(m["name"]), m) for m in data["methods"]]
            steps = [_made(before.get(s["name"]), s) for s in data["steps"]]
            nodes = tuple(_node(row, methods, steps) for row in data["nodes"])
            stages = tuple(Stage(*s) for s in data["stages"])
            for method in {s.method for s in stages} - {MIXTURE}:
                registry.get(method)  # which the model card will name
            return cls(
                inputs=tuple(
                    InputModel(**{**i, "files": tuple((str(a), int(b), str(c)) for a, b, c in i["files"])})
                    for i in data["inputs"]
                ),
                stages=stages,
                nodes=nodes,
                outputs=tuple(data["outputs"]),
                left_out=data["left_out"],
                rows=tuple(Rows.from_dict(r) for r in data["rows"]),
                config=data["config"],
                copies=data["copies"],
                texts=data["texts"],
                recipe=data["recipe"],
                notes=tuple(data["notes"]),
                transforms=tuple(Transform(*t) for t in data["transforms"]),
                rotations=tuple(Rotation.from_dict(r) for r in data["rotations"]),
                alignment=tuple(data["alignment"]),
                guardrails=dict(data["guardrails"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"the plan is damaged: {error}", hint="make it again with `geomerge plan`") from error

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a saved plan.

        Raises:
            UsageError: The file is not a plan.
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"the plan cannot be read: {error}", where=str(path)) from None
        return cls.from_dict(data if isinstance(data, dict) else {})


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Where the rows of one re-ordered vocabulary matrix come from.

    Attributes:
        matrices: Every input's matrix, in the token plan's order; `None` for an input without one.
        plan: The row plan of one of them.
        sparsity: The most rows in a sparse sum, where there are any.
    """

    matrices: tuple[Operand | None, ...]
    plan: RowPlan
    sparsity: int = 64

    def to_dict(self) -> dict[str, Any]:
        return {
            "matrices": [None if m is None else list(m) for m in self.matrices],
            "model": self.plan.model,
            "source": self.plan.source.tolist(),
            "row": self.plan.row.tolist(),
            "owners": self.plan.owners.tolist(),
            "sparsity": self.sparsity,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rows:
        arrays = [np.array(data[key], dtype=np.int64) for key in ("source", "row", "owners")]
        matrices = tuple(None if m is None else Operand(*m) for m in data["matrices"])
        return cls(matrices, RowPlan(data["model"], *arrays), data["sparsity"])


class Transform(NamedTuple):
    """What happens to a tensor of an input while it is read.

    Attributes:
        rotation: Index in `Plan.rotations`, or -1.
        writes: The tensor writes into the rotated stream (Qᵀ·W); else it reads from it (W·Q).
        gain: The norm gain of the same input that is folded in; empty: none.
        offset: What the norm adds to its stored gain.
        constant: What every element is instead: a gain that was folded away.
        height: Rows in a block; 0: as suits the tensor.
    """

    rotation: int = -1
    writes: bool = False
    gain: str = ""
    offset: float = 0.0
    constant: float | None = None
    height: int = 0


class Anchor(NamedTuple):
    """Two tensors whose vectors in the hidden space correspond: along rows, or along columns of matrices that write."""

    moving: Operand
    fixed: Operand
    columns: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """What a rotation is found from; the matrix itself (d×d) is found again where it is needed, with the same bits.

    Attributes:
        anchors: Pairs of tensors, the token embeddings first.
        moving, fixed: The rows of shared tokens in the first anchor's two tensors.
        centre, normalise, weight: See `AlignSpec`.
        held: The matrix, once it is known.
    """

    anchors: tuple[Anchor, ...]
    moving: IntArray
    fixed: IntArray
    centre: bool = False
    normalise: bool = False
    weight: str = "none"
    held: list[Any] = field(default_factory=list, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "anchors": [[list(a.moving), list(a.fixed), a.columns] for a in self.anchors],
            "moving": _runs(self.moving),
            "fixed": _runs(self.fixed),
            "options": [self.centre, self.normalise, self.weight],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rotation:
        anchors = tuple(Anchor(Operand(*m), Operand(*f), c) for m, f, c in data["anchors"])
        return cls(anchors, _from_runs(data["moving"]), _from_runs(data["fixed"]), *data["options"])


def _runs(rows: IntArray) -> list[list[int]]:
    """Numbers as ``[first, count]`` of runs that rise by 1: the shared tokens of two like vocabularies are few runs."""
    if not len(rows):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(rows) != 1) + 1))
    counts = np.diff(np.append(starts, len(rows)))
    return [[int(rows[s]), int(c)] for s, c in zip(starts, counts, strict=True)]


def _from_runs(runs: Iterable[Iterable[int]]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(f, f + c, dtype=np.int64) for f, c in runs)])


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _node(row: Sequence[Any], methods: Sequence[Method | None], steps: Sequence[Step]) -> Node:
    """A node from its row in `Plan.to_dict`."""
    name, shape, dtype, operands, m, scale, rule, stage, group, statistics, scales, lift, before, columns = row
    return Node(
        name,
        tuple(shape),
        dtype,
        tuple(Operand(*o) for o in operands),
        methods[m],
        scale,
        rule,
        stage,
        group,
        tuple(Operand(*o) for o in statistics),
        scales,
        lift,
        tuple(steps[s] for s in before),
        tuple(Columns(Operand(*o), omega, axis) for o, omega, axis in columns),
    )


def _made(cls: type[M], data: Mapping[str, Any]) -> M:
    """A method or a step with its parameters."""
    parameters = cls.parameters()
    values = {}
    for name, value in data["parameters"].items():
        values[parameters[name].attribute] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
