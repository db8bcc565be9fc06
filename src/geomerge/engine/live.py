"""Live merges: candidates blended in memory onto one module, again and again, without touching the disk.

    live = LiveMerge({"a": "./a", "b": "./b"}, module)
    for t in (0.3, 0.5, 0.7):
        live.blend(recipe_with(t))      # the module now is the merge
        score(module)

The parents are read once. What a span method measures of them (their Gram matrices) does not depend on its coefficients, and
what a matrix method makes of them not on λ, so that is done once, too; a candidate then costs one blending pass.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from geomerge.anatomy import memory_names
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.dtypes import to_torch
from geomerge.checkpoint.reader import resident
from geomerge.engine.adapted import open_model
from geomerge.engine.build import Builder
from geomerge.engine.execute import Threads, Work
from geomerge.engine.plan import REST, Node, Plan
from geomerge.engine.planner import make_plan
from geomerge.engine.survey import surveyed
from geomerge.errors import IncompatibleModels
from geomerge.methods.native import in_memory
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import NOWHERE
from geomerge.tokens.compare import ONE_VOCABULARY, one_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.gram import Gram
    from geomerge.methods.native import Stored
    from geomerge.recipe.values import Pipeline


class LiveMerge:
    """A module in memory and the parents that candidates for it are blended from.

    Args:
        parents: Every model that the recipes name: path or opened checkpoint.
        module: A module whose state dict has the merge's tensors (a model class's prefix may be missing or added).
        threads: By default one for each core.
        allow_pickle: Read pickled weights (weights only).

    Raises:
        ModelError: A parent cannot be read.
    """

    def __init__(
        self,
        parents: Mapping[str, str | Path | Checkpoint],
        module: torch.nn.Module,
        *,
        threads: int | None = None,
        allow_pickle: bool = False,
    ) -> None:
        self.module = module
        self._threads = threads
        self._kept: dict[object, Gram | Tensor] = {}
        self.parents: dict[str, Checkpoint] = {}
        for name, parent in parents.items():
            opened = (
                parent
                if isinstance(parent, Checkpoint)
                else open_model(parse_reference(str(parent), NOWHERE), allow_pickle=allow_pickle)
            )
            self.parents[name] = resident(opened)

    def blend(self, recipe: Pipeline) -> Plan:
        """Make the module the merge that a recipe describes: bit for bit what `run_plan` writes, in the module's dtype.

        Raises:
            RecipeError: The recipe cannot be carried out with these parents.
            IncompatibleModels: The module lacks a tensor of the merge, or has one that the merge lacks.
        """
        with one_vocabulary():
            plan, inputs = make_plan(recipe, models=self.parents)
        try:
            sink = ModuleSink(self.module, plan)
            known = surveyed(plan, lambda p: Builder(p, inputs), threads=self._threads)
            work = Work(Builder(known, inputs, kept=self._kept), sink, lambda nbytes: None, threading.Event())
            Threads(work, self._threads).run(list(enumerate(known.output_nodes())), lambda entries: None)
        finally:
            mine = {id(parent) for parent in self.parents.values()}
            # Files of statistics, which a recipe names beside the parents.
            files = {o.input for n in plan.nodes for o in (*n.statistics, *(c.statistics for c in n.columns))}
            for opened in (inputs[index] for index in files):
                if id(opened) not in mine:
                    opened.close()
        return plan


class ModuleSink:
    """Writes a plan's output into a module's parameters and buffers.

    Raises:
        IncompatibleModels: Names or shapes do not fit.
    """

    readable = True

    def __init__(self, module: torch.nn.Module, plan: Plan) -> None:
        state = module.state_dict(keep_vars=True)
        prefix = str(getattr(module, "base_model_prefix", "")) + "."
        renamed = memory_names.in_memory(module)
        self._flat: dict[str, Tensor] = {}
        touched: set[int] = set()
        for node in plan.output_nodes():
            known = dict.fromkeys((node.name, renamed(node.name)))
            names = (n for each in known for n in (each, prefix + each, each.removeprefix(prefix)))
            name = next((n for n in names if n in state), None)
            if name is None or tuple(state[name].shape) != node.shape:
                if not _needed(node):
                    continue
                has = "no" if name is None else f"another shape ({list(state[name].shape)}) for"
                raise IncompatibleModels(
                    f"the module has {has} {node.name} {list(node.shape)}",
                    where=type(module).__name__,
                    hint=ONE_VOCABULARY if plan.rows else "load the module from one of the parents' directories",
                )
            target = state[name].detach()
            touched.add(target.data_ptr())
            self._flat[node.name] = target.view(-1)
        left = [n for n, p in module.named_parameters() if p.data_ptr() not in touched]
        if left:
            raise IncompatibleModels(
                f"the merge lacks {left[0]}" + (f" and {len(left) - 1} more parameters" if len(left) > 1 else ""),
                where=type(module).__name__,
            )

    def write(self, node: Node, start: int, values: Tensor) -> None:
        """See `geomerge.engine.sinks.Sink`."""
        flat = self._flat.get(node.name)
        if flat is not None:
            flat[start : start + values.numel()].copy_(values.detach().reshape(-1))

    def stored(self, node: Node) -> Stored | None:
        """See `geomerge.engine.sinks.Sink`."""
        flat = self._flat.get(node.name)
        return None if flat is None or flat.dtype != to_torch(node.dtype) else in_memory(flat)


def _needed(node: Node) -> bool:
    """Whether a tensor must have its place in a module: buffers that are copied need not."""
    return node.rule == "merge" or node.rule.startswith(REST)
