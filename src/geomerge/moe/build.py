"""From a configuration to a model directory: a plan of copies, and gates that are made before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from geomerge.checkpoint.config import edit_config
from geomerge.checkpoint.dtypes import DTYPES, recipe_name, to_torch
from geomerge.checkpoint.output_place import check_free
from geomerge.checkpoint.reader import from_state_dict
from geomerge.engine.models import Model, Models
from geomerge.engine.output import donor_files
from geomerge.engine.plan import MIXTURE, Node, Operand, Plan, Stage
from geomerge.engine.planner import input_model
from geomerge.engine.run import Progress, Report, run_plan
from geomerge.engine.stored import stored_source
from geomerge.errors import IncompatibleModels
from geomerge.methods import registry
from geomerge.moe.families import DEFAULTS, EMPTY, FAMILIES, MLP, PARTS, Family, dense_type, moe_config, slides
from geomerge.moe.router import alike, prompt_gates, random_gates
from geomerge.moe.spec import Expert, MoeSpec, read_spec

if TYPE_CHECKING:
    from geomerge.checkpoint.checkpoint import Checkpoint

GATES = "gates"
"""The name of the input that holds the routers."""


def moe(
    config: str | Path | MoeSpec,
    out: str | Path,
    *,
    allow_pickle: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Build a mixture of experts from dense models of one architecture.

    Args:
        config: A file, YAML text (recognised by a line break), or what `geomerge.moe.spec.read_spec` returned.
        out: The directory to make. It appears whole or not at all.
        allow_pickle: Read pickled weights (weights only, no code is run).
        device: Where the base model is run, if the gates need that.
        threads, resume, force, progress: See `geomerge.engine.run.run_plan`, as for further ``options``.

    Raises:
        RecipeError: The configuration is wrong; the line is named.
        ModelError: A model cannot be used, or the models do not fit.
    """
    check_free(out, force=force)
    plan, opened = plan_moe(config, allow_pickle=allow_pickle, device=device)
    return run_plan(plan, out, inputs=opened, threads=threads, resume=resume, force=force, progress=progress, **options)


def plan_moe(
    config: str | Path | MoeSpec, *, allow_pickle: bool = False, device: str = "cpu"
) -> tuple[Plan, list[Checkpoint]]:
    """The plan of a mixture of experts, its gates made; arguments and errors as in `moe`.

    Returns:
        The plan, and the opened inputs in its order (the caller closes them).
    """
    spec = config if isinstance(config, MoeSpec) else read_spec(config)
    models = Models(allow_pickle=allow_pickle)
    try:
        mixture = _Mixture(spec, models)
        gates = mixture.gates(device)
        return mixture.plan(gates), [*models.inputs, gates]
    except BaseException:
        for checkpoint in models.inputs:
            checkpoint.close()
        raise


@dataclass(frozen=True)
class _Piece:
    """One feed-forward matrix of the base."""

    name: str
    block: int
    part: str


class _Mixture:
    """A configuration resolved against its models.

    Raises:
        IncompatibleModels: The models differ in what must be the same, or no architecture can hold them.
    """

    def __init__(self, spec: MoeSpec, models: Models) -> None:
        self.spec, self.models = spec, models
        self.base = models.get(spec.base, spec.where)
        self.experts = [models.get(e.model, e.where) for e in spec.experts]
        self.shared = [models.get(e.model, e.where) for e in spec.shared]
        for model in (self.base, *self.experts, *self.shared):
            self._check_alike(model)
        self.notes: list[str] = []
        self.family = self._family()
        self.pieces = [_Piece(name, int(m[1]), m[2]) for name in self.base.tensors if (m := MLP.fullmatch(name))]
        self.blocks = 1 + max((piece.block for piece in self.pieces), default=-1)
        self._check_pieces()
        if self.family.shared_gate and not self.shared:
            self.notes.append(
                f"{self.family.title} has a shared expert in any case; without `shared_experts` it is {EMPTY} units of zeros"
            )

    # -- what fits -----------------------------------------------------------------------------------------------------

    def _check_alike(self, model: Model) -> None:
        kind = dense_type(model.config)
        if kind not in DEFAULTS:
            raise IncompatibleModels(
                f"a mixture of experts cannot be made from models of the type {kind or 'unknown'!r}",
                where=str(model),
                hint=f"types that it can be made from: {', '.join(DEFAULTS)}",
            )
        ours, theirs = self.base.config or {}, model.config or {}
        if kind != dense_type(ours):
            raise IncompatibleModels(
                f"the models are not of one architecture: {self.base} is {dense_type(ours)}, {model} is {kind}"
            )
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            if ours.get(key) != theirs.get(key):
                raise IncompatibleModels(
                    f"{key} differs: {self.base} has {ours.get(key)}, {model} has {theirs.get(key)}",
                    hint="experts need the base's width and depth",
                )
        acts = [config.get("hidden_act", "silu") for config in (ours, theirs)]
        if acts[0] != acts[1]:
            raise IncompatibleModels(
                f"the activations differ: {self.base} has {acts[0]}, {model} has {acts[1]}: one config holds one"
            )

    def _family(self) -> Family:
        """The output's architecture: the one that is asked for, or the first that can hold everything."""
        if self.spec.architecture is not None:
            family = FAMILIES[self.spec.architecture]
            reason = self._refusal(family)
            if reason is not None:
                raise IncompatibleModels(f"{family.title} cannot hold this: {reason}", where=str(self.spec.where))
            return family
        reasons = []
        for family in FAMILIES.values():
            reason = self._refusal(family)
            if reason is None:
                return family
            reasons.append(f"{family.title}: {reason}")
        raise IncompatibleModels(
            "no architecture can hold this mixture", where=str(self.spec.where), hint="; ".join(reasons)
        )

    def _refusal(self, family: Family) -> str | None:
        kind = dense_type(self.base.config)
        if kind not in family.dense:
            return f"its dense models are {' and '.join(sorted(family.dense))}, not {kind}"
        if len(self.shared) > (1 if family.shared else 0):
            return f"it has {'one shared expert at most' if family.shared else 'no shared experts'}"
        if family.shared and not family.shared_gate:
            if not self.shared:
                return "it needs a shared expert"
            if self.spec.shared[0].positive:
                return "its shared expert has no gate, so that prompts for it have no effect"
            if len(self.experts) < 2:
                return "its router needs two experts at least"
        if slides(self.base.config or {}) and not family.windows:
            return "the base's attention has a sliding window, for which its config has no words"
        for name in self.base.tensors:
            if not (MLP.fullmatch(name) or name.endswith(".inv_freq") or family.holds(name)):
                return f"it has no place for the base's {name}"
        return None

    def _check_pieces(self) -> None:
        for model in (self.base, *self.experts, *self.shared):
            for piece in self.pieces:
                kind, ours = model.tensors.get(piece.name), self.base.tensors[piece.name]
                if kind is None or kind.shape != ours.shape:
                    has = "is not there" if kind is None else f"has the shape {list(kind.shape)}"
                    raise IncompatibleModels(
                        f"{piece.name} {has}, where {self.base} has {list(ours.shape)}", where=str(model)
                    )
            extra = sorted(n for n in model.tensors if ".mlp." in n and not MLP.fullmatch(n))
            if extra:
                raise IncompatibleModels(
                    f"no mixture's feed-forward layers have {extra[0]}", where=str(model), hint="biases cannot be kept"
                )

    # -- the gates -----------------------------------------------------------------------------------------------------

    def gates(self, device: str) -> Checkpoint:
        """The routers, rounded once to the output's dtype, as a model in memory."""
        made: dict[str, Tensor] = {}
        routed = self._gates(self.spec.experts, device)
        for i, j, blocks in alike(routed):
            self.notes.append(
                f"the gates of the experts {i} and {j} point the same way in {blocks} of {self.blocks} blocks: "
                "the router cannot tell them apart; make their prompts differ more"
            )
        self._round(made, self.family.router, routed)
        if self.family.shared_gate:
            prompts = bool(self.spec.shared and self.spec.shared[0].positive)
            width = routed.shape[2]
            self._round(
                made,
                self.family.shared_gate,
                self._gates(self.spec.shared, device) if prompts else np.zeros((self.blocks, 1, width)),
            )
            if self.shared and not prompts:
                self.notes.append(
                    "the shared expert has no prompts: its gate is zero, so that half of it is added to every token "
                    "(`residual_scale: 2` makes it whole)"
                )
        if self.family.shared_gate and not self.shared:
            self._empty(made, routed.shape[2])
        if self.family.bias:
            for block in range(self.blocks):
                made[self.family.bias.format(block=block)] = torch.zeros(len(self.experts), dtype=torch.float32)
        return from_state_dict(made, name=GATES)

    def _gates(self, experts: Sequence[Expert], device: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        spec = self.spec
        embedding = "model.embed_tokens.weight"
        width = self.base.tensors[embedding].shape[1]
        if spec.mode in ("random", "uniform_random"):
            return random_gates(spec.mode, self.blocks, len(experts), width, spec.seed)
        checkpoint = self.base.checkpoint
        assert checkpoint is not None
        if self.base.folder is None:
            raise IncompatibleModels(
                f"gate_mode {spec.mode!r} needs the base's directory with its tokenizer", where=str(self.base)
            )
        if checkpoint.changes and spec.mode != "cheap_embed":
            raise IncompatibleModels(
                f"gate_mode {spec.mode!r} runs the base as its files are, without its adapter",
                where=str(self.base),
                hint="merge the adapter into a directory first, or use `gate_mode: cheap_embed` or `random`",
            )
        source = stored_source(checkpoint, embedding, f"{self.base}: {embedding}")

        def embed(ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
            rows = torch.empty(len(ids), width, dtype=torch.float64)
            for row, index in zip(rows, ids, strict=True):
                source.read(index * width, row)
            return np.asarray(rows.numpy())

        return prompt_gates(spec.mode, experts, self.blocks, self.base.folder, embed, device=device)

    def _empty(self, made: dict[str, Tensor], width: int) -> None:
        """A shared expert that adds nothing, for an architecture that has one in any case."""
        dtype = to_torch(self._dtype(self.base.tensors[self.pieces[0].name].dtype))
        for block in range(self.blocks):
            for part in PARTS:
                shape = (width, EMPTY) if part == "down_proj" else (EMPTY, width)
                made[self.family.shared.format(block=block, part=part)] = torch.zeros(shape, dtype=dtype)

    def _round(self, made: dict[str, Tensor], name: str, gates: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        for block in range(self.blocks):
            dtype = self._dtype(self.base.tensors[self.pieces[0].name].dtype)
            made[name.format(block=block)] = torch.from_numpy(gates[block].copy()).to(to_torch(dtype))

    # -- the plan ------------------------------------------------------------------------------------------------------

    def plan(self, gates: Checkpoint) -> Plan:
        """Every tensor of the output as a copy."""
        nodes = list(self._nodes(gates))
        base = self.base.config or {}
        config = moe_config(
            self.family,
            base,
            experts=len(self.experts),
            per_token=self.spec.per_token,
            shared=bool(self.shared),
            tensors=self.base.tensors.keys(),
        )
        floats = {n.dtype for n in nodes if not (self.family.bias and n.dtype == "F32" and n.name.endswith("bias"))}
        dtype = floats.pop() if len(floats) == 1 else None
        return Plan(
            inputs=tuple(input_model(c) for c in (*self.models.inputs, gates)),
            stages=(Stage(None, MIXTURE, self.spec.seed, "nearest", None),),
            nodes=tuple(nodes),
            outputs=tuple(range(len(nodes))),
            left_out=self._left_out(),
            rows=(),
            config=edit_config(config, dtype=None if dtype is None else recipe_name(dtype)),
            copies={n: str(p) for n, p in donor_files(self.base, without_tokenizer=False).items()},
            texts={},
            recipe=self.spec.text,
            notes=tuple(self.notes),
        )

    def _nodes(self, gates: Checkpoint) -> Iterator[Node]:
        last = {block: index for index, block in enumerate(_block_of(name) for name in self.base.tensors)}
        for index, name in enumerate(self.base.tensors):
            piece = MLP.fullmatch(name)
            if piece is not None:
                yield from self._experts(_Piece(name, int(piece[1]), piece[2]))
            elif not name.endswith(".inv_freq"):
                yield self._copy(name, self.base, name, f"copy: from the base {self.base}")
            block = _block_of(name)
            if block is not None and last[block] == index:
                yield from self._routers(gates, block)

    def _experts(self, piece: _Piece) -> Iterator[Node]:
        part = self.family.part(piece.part)
        for number, (expert, model) in enumerate(zip(self.spec.experts, self.experts, strict=True)):
            name = self.family.expert.format(block=piece.block, expert=number, part=part)
            yield self._copy(name, model, piece.name, f"copy: expert {number}, {model}", self._scale(expert, piece))
        if self.shared:
            name = self.family.shared.format(block=piece.block, part=piece.part)
            scale = self._scale(self.spec.shared[0], piece)
            yield self._copy(name, self.shared[0], piece.name, f"copy: shared expert, {self.shared[0]}", scale)

    @staticmethod
    def _scale(expert: Expert, piece: _Piece) -> float:
        return 1.0 if expert.scale is None or piece.part != "down_proj" else expert.scale

    def _routers(self, gates: Checkpoint, block: int) -> Iterator[Node]:
        names = [p.format(block=block) for p in (self.family.router, self.family.shared_gate, self.family.bias)]
        if self.family.shared_gate and not self.shared:
            names += [self.family.shared.format(block=block, part=part) for part in PARTS]
        for name in names:
            if name:
                info = gates.tensors[name]
                operand = Operand(len(self.models.inputs), name)
                rule = f"router: {self.spec.mode}" if ".shared_expert." not in name else "zeros: no shared expert"
                yield Node(name, info.shape, info.dtype, (operand,), None, rule=rule)

    def _copy(self, name: str, model: Model, stored: str, rule: str, scale: float = 1.0) -> Node:
        kind, operand = model.tensors[stored], model.operand(stored)
        # transformers fuses the experts' matrices, so all of them have the dtype that the base has there.
        dtype = self._dtype(self.base.tensors[stored].dtype)
        computed = self.models.inputs[operand.input].computed(stored) or dtype != kind.dtype or scale != 1.0
        method = registry.get("passthrough").make({"scale": [scale]}, count=1) if computed else None
        return Node(name, kind.shape, dtype, (operand,), method, rule=rule)

    def _dtype(self, own: str) -> str:
        return self.spec.dtype if self.spec.dtype is not None and DTYPES[own].kind == "float" else own

    def _left_out(self) -> Mapping[str, str]:
        """What of the models is not used, and why."""
        giving = {id(m) for m in (*self.experts, *self.shared)}
        found: dict[str, str] = {}
        for model in dict.fromkeys((self.base, *self.experts, *self.shared)):
            for name in model.tensors:
                if MLP.fullmatch(name):
                    if id(model) not in giving:
                        found[f"{model}: {name}"] = "the base is not an expert"
                elif name.endswith(".inv_freq"):
                    found[f"{model}: {name}"] = "a buffer that transformers computes"
                elif model is not self.base:
                    found[f"{model}: {name}"] = f"everything but feed-forward layers comes from {self.base}"
        return found


def _block_of(name: str) -> int | None:
    words = name.split(".")
    return int(words[2]) if name.startswith("model.layers.") else None
