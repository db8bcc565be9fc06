"""From a plan's nodes to scans over their sources: the piece between values and mathematics that all executors share."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.coded.scaled import Scaled
from geomerge.checkpoint.dtypes import to_torch
from geomerge.engine import rounding
from geomerge.engine.codes import own_error
from geomerge.engine.lora import LoraSource
from geomerge.engine.matrices import ROOM
from geomerge.engine.mixtures import Mixtures
from geomerge.engine.plan import Columns, Node, Operand, Plan
from geomerge.engine.sources import FileSource, HeldSource, RowSource, StageSource, StoredParts, mappable
from geomerge.engine.stored import stored_source
from geomerge.engine.transforms import Transforms
from geomerge.errors import IncompatibleModels
from geomerge.methods import gram
from geomerge.methods.base import Elementwise, Matrix, Span
from geomerge.methods.chain import thinned
from geomerge.methods.gram import Gram
from geomerge.methods.kernel import Open, Prepared, columnwise, measure_gram, merge_matrix, prepare
from geomerge.methods.rest import merges_whole
from geomerge.methods.tile import TILE, Scan, Segment, Source

if TYPE_CHECKING:
    from torch import Tensor


Run = Callable[[Callable[[Segment], Any], Iterable[Segment]], Iterable[Any]]


class Builder:
    """Makes what a node needs to be computed.

    Args:
        plan: The plan.
        inputs: The opened models in the plan's order.
        tile: Elements in a tile.
        device: Where tiles are computed.
        read_ahead: Read the next tile while one is computed.
        kept: Keeps what span methods measured and matrix methods computed, for further plans over the same inputs in the
            same order.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[Checkpoint],
        *,
        tile: int = TILE,
        device: str = "cpu",
        read_ahead: bool = False,
        kept: dict[object, Gram | Tensor] | None = None,
    ) -> None:
        self._kept = kept
        self.plan, self.inputs = plan, inputs
        self.tile, self.device, self.read_ahead = tile, device, read_ahead
        self._mapped = device == "cpu" and mappable(inputs)
        self.transforms = Transforms(inputs, plan.transforms, plan.rotations)
        self.transforms.settle()
        self._groups: dict[tuple[int, str], list[Node]] = {}
        self._measured: dict[tuple[int, str], Gram] = {}
        self._measuring = threading.RLock()
        self._mixtures: dict[int, Mixtures] = {}
        self._named: dict[str, Node] = {}
        for node in plan.nodes:
            if node.group:
                self._groups.setdefault((node.stage, node.group), []).append(node)

    def prepare(self, node: Node, run: Run = map) -> Prepared:
        """Measure what the node's method needs; `run` maps over segments."""
        assert node.method is not None
        open_scan = self.opener(node, node.operands, run)
        measured: Gram | Tensor | None = None
        if isinstance(node.method, Matrix):
            measured = self._kept_matrix(node, node.method)
        elif isinstance(node.method, Span) and node.method.needs_gram:
            if node.group:
                measured = self._group_gram(node)
            elif node.statistics:
                measured = self._weighted_gram(node, run)
            elif self._kept is not None and node.method.axis == "tensor":
                measured = self._kept_gram(node, run)
        prepared = prepare(node.method, open_scan, node.shape, node.scale, node.dtype, measured)
        for each in node.columns:
            prepared = columnwise(prepared, self._factors(each, node), math.prod(node.shape[each.axis + 1 :]))
        return prepared

    def _factors(self, columns: Columns, node: Node) -> Tensor:
        """1 − (1 − ω)·aⱼ / max a for each input feature j."""
        activity = torch.empty(node.shape[columns.axis], dtype=torch.float64, device=self.device)
        source = self.source(columns.statistics, node)
        source.read(0, activity)
        if not bool(torch.isfinite(activity).all()) or bool((activity < 0).any()):
            raise IncompatibleModels(
                "the activations hold a number that is negative or not finite",
                where=source.label,
                hint="they are the mean absolute value of each input feature",
            )
        most = activity.max() if activity.numel() else activity.sum()
        if not bool(most > 0):
            return torch.ones_like(activity)
        return 1.0 - (activity / most) * (1.0 - columns.omega)  # exactly ω where a is largest

    def _group_gram(self, node: Node) -> Gram:
        """The sum of the Gram matrices of a node's group, measured once in a process."""
        key = node.stage, node.group
        with self._measuring:
            if key not in self._measured:
                found = [
                    self._weighted_gram(n, map) if n.statistics else measure_gram(self.opener(n, n.operands, map))
                    for n in self._groups[key]
                ]
                self._measured[key] = gram.together(found)
            return self._measured[key]

    def _kept_gram(self, node: Node, run: Run) -> Gram | None:
        """The Gram matrix of a node whose operands are the inputs' own tensors, measured at most once."""
        key = self._inputs_of(node)
        if self._kept is None or key is None:
            return None
        found = self._kept.get(key)
        if not isinstance(found, Gram):
            found = self._kept[key] = measure_gram(self.opener(node, node.operands, run))
        return found

    def _kept_matrix(self, node: Node, method: Matrix) -> Tensor | None:
        """What a matrix method makes of the inputs' own tensors, computed once for all λ while there is room to keep it."""
        inputs = self._inputs_of(node)
        if self._kept is None or inputs is None or not merges_whole(method, node.shape):
            return None
        same = type(method).factor is Matrix.factor
        # What a survey found is no part of a method's equality.
        key = (replace(method, lambda_=1.0) if same else method, method.known, inputs)
        found = self._kept.get(key)
        if not isinstance(found, torch.Tensor):
            found = merge_matrix(method, self.opener(node, node.operands, map)(), node.shape)
            if found.nbytes + sum(t.nbytes for t in list(self._kept.values()) if isinstance(t, torch.Tensor)) <= ROOM:
                self._kept[key] = found
        return found

    def _inputs_of(self, node: Node) -> tuple[Hashable, ...] | None:
        """A node's operands by model and tensor, if all of them are read as they are, and the steps that thin them."""
        if any(o.node >= 0 or o.rows >= 0 or o.transform >= 0 for o in node.operands):
            return None
        inputs = tuple((self.plan.inputs[o.input].ref, o.tensor) for o in node.operands)
        # Random steps draw by the seed and the output's name.
        return (*node.chain, self.plan.stages[node.stage].seed, node.name, *inputs) if node.chain else inputs

    def _weighted_gram(self, node: Node, run: Run) -> Gram:
        scan = self.opener(node, (*node.operands, *node.statistics), run)()
        return gram.measure(scan, "tensor", statistics=len(node.statistics))

    def opener(self, node: Node, operands: Sequence[Operand], run: Run) -> Open:
        """Opens scans of a node's operands."""
        level = len(self.plan.stages) - 1 - node.stage
        sources = [self.source(operand, node) for operand in operands]
        if self._mapped and isinstance(node.method, Elementwise) and node.method.looks:
            sources = [s.mapped() if isinstance(s, FileSource) else s for s in sources]
        # What is read once need not be held.
        once = isinstance(node.method, Span) and not node.method.needs_gram
        if node.numel <= self.tile and self.device == "cpu" and not once:
            sources = [HeldSource(s, node.numel) if isinstance(s, FileSource | LoraSource) else s for s in sources]

        def open_scan(**tiling: Any) -> Scan:
            if node.columns:
                tiling["exact"] = True
            return Scan(
                sources,
                node.shape,
                name=node.name,
                seed=self.plan.stages[node.stage].seed,
                tile=self.tile,
                run=run,
                device=self.device,
                level=level,
                read_ahead=self.read_ahead,
                **tiling,
            )

        return thinned(open_scan, node.chain, node.shape, len(node.operands) - 1)

    def node(self, name: str) -> Node:
        """The output's node of a name."""
        if not self._named:
            self._named.update((n.name, n) for n in self.plan.output_nodes())
        return self._named[name]

    def parents_as_codes(self, node: Node) -> list[Tensor | float]:
        """The scales of those of a node's operands that are codes; if none is, what each would lose in the node's scheme."""
        found: list[Tensor | float] = []
        for operand in node.operands:
            coded = self.inputs[operand.input].coded.get(operand.tensor) if operand.input >= 0 else None
            if isinstance(coded, Scaled) and coded.encodable:
                parts = StoredParts(self.inputs[operand.input], self._label(operand))
                found.append(parts.whole(coded.scale).reshape(-1).double())
        if not found:
            rows = max(self.node(node.scales).numel, 1)
            sources = [self.source(operand, node) for operand in node.operands]
            found += [own_error(source, rows, node.numel // rows, node.dtype) for source in sources]
        return found

    def rounding(self, node: Node) -> Callable[[int, Tensor], Tensor]:
        """The rounding of a node's elements to its dtype."""
        stage = self.plan.stages[node.stage]
        return rounding.make(stage.rounding, to_torch(node.dtype), seed=stage.seed, name=node.name)

    def nearest(self, node: Node) -> bool:
        """Whether a node's elements are rounded to nearest."""
        return self.plan.stages[node.stage].rounding == "nearest"

    def source(self, operand: Operand, node: Node) -> Source:
        """An operand as a source of elements."""
        if operand.transform >= 0:
            return self.transforms.source(operand)
        if operand.rows >= 0:
            rows = self.plan.rows[operand.rows]
            columns = node.numel // max(node.shape[0], 1)
            matrices = [None if m is None else self.source(m, node) for m in rows.matrices]
            return RowSource(matrices, rows.plan, columns, self._label(operand), self._sums(operand.rows, matrices))
        if operand.node >= 0:
            made = self.plan.nodes[operand.node]
            if made.method is None:
                return self.source(made.operands[0], made)
            return StageSource(self.prepare(made), self.rounding(made), made.dtype, self._label(operand))
        return stored_source(self.inputs[operand.input], operand.tensor, self._label(operand))

    def _sums(self, index: int, matrices: Sequence[Source | None]) -> Mixtures | None:
        """The sparse sums among a matrix's rows, found when they are first asked for, once for all who ask."""
        rows = self.plan.rows[index]
        if not rows.plan.pursued:
            return None
        with self._measuring:
            if index not in self._mixtures:
                donors = {}
                for k in rows.plan.pursued:
                    source, operand = matrices[k], rows.matrices[k]
                    assert source is not None
                    assert operand is not None
                    donors[k] = source, self._width(operand)
                self._mixtures[index] = Mixtures(rows.plan, donors, rows.sparsity)
            return self._mixtures[index]

    def mixtures(self, nodes: Iterable[Node]) -> list[Mixtures]:
        """The sparse sums that some tensors' operands are made with."""
        for node in nodes:
            for operand in node.operands:
                if operand.rows >= 0:
                    matrices = self.plan.rows[operand.rows].matrices
                    self._sums(operand.rows, [None if m is None else self.source(m, node) for m in matrices])
        return list(self._mixtures.values())

    def _width(self, operand: Operand) -> int:
        """Columns of a matrix."""
        if operand.input >= 0:
            return self.inputs[operand.input].logical[operand.tensor].shape[1]
        return self.plan.nodes[operand.node].shape[1]

    def raw(self, node: Node) -> tuple[Checkpoint, str]:
        """Where the bytes of a copied node come from."""
        operand = node.operands[0]
        while operand.node >= 0:
            made = self.plan.nodes[operand.node]
            if made.method is not None:
                raise ValueError(f"{node.name} is to be copied, but {made.name} of an earlier stage is computed")
            operand = made.operands[0]
        return self.inputs[operand.input], operand.tensor

    def _label(self, operand: Operand) -> str:
        model = self.plan.stages[self.plan.nodes[operand.node].stage].name if operand.node >= 0 else None
        return f"{model or self.plan.inputs[operand.input].ref}: {operand.tensor}"
