"""One step of a continual merge, from the old state and new experts to the next state."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from geomerge import anatomy
from geomerge.checkpoint.card import combine_licences
from geomerge.checkpoint.checkpoint import Checkpoint
from geomerge.checkpoint.layout import plan_layout
from geomerge.checkpoint.output_place import STATE
from geomerge.checkpoint.reader import open_checkpoint
from geomerge.checkpoint.writer import OutputDirectory
from geomerge.continual.rules import RULES, Rule, norm
from geomerge.continual.state import FILE, FOLDER, Known, State
from geomerge.continual.work import Accumulate, SumFile, Write
from geomerge.engine.build import Builder
from geomerge.engine.execute import Facts, Threads, Work
from geomerge.engine.experts import plan_experts
from geomerge.engine.manifest import total_loss
from geomerge.engine.matrices import is_weight
from geomerge.engine.plan import InputModel, Node, Plan
from geomerge.engine.run import Progress, write_model_files
from geomerge.engine.sinks import FileSink
from geomerge.errors import DamagedCheckpoint, IncompatibleModels, UsageError, did_you_mean
from geomerge.version import __version__

DEFAULT = "opcm"


@dataclass(frozen=True)
class Step:
    """What a step did.

    Attributes:
        out: The state's directory, which is the merged model's.
        state: The state that was written.
        norm: ‖S‖ over all tensors.
        change: ‖θ − θ₀‖ of the merged model, before it is rounded.
        seconds, nbytes, tensors: As in `geomerge.engine.run.Report`.
        rounding_loss: The share of the merged task vector's norm that rounding took, estimated on a sample.
        notes: What the user should know.
    """

    out: Path
    state: State
    norm: float
    change: float
    seconds: float
    nbytes: int
    tensors: int
    rounding_loss: float | None
    notes: tuple[str, ...]


def continue_merge(
    state: str | Path,
    experts: Sequence[str | Path] | str | Path,
    *,
    base: str | Path | None = None,
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Step:
    """Take experts into a continual merge, one after the other, and write the merged model and the next state.

    Several experts in one call give the same bits as one call for each; only the last merged model is written.

    Args:
        state: The state's directory. Where there is none, `base` starts one.
        experts: Paths or hub ids, in their order; or one of them.
        base: The model that all experts were trained from. Later steps know it; it must be given again when it has moved.
        method: ``opcm`` (the default), ``average``, ``task_arithmetic`` or ``ties``; said at the start only.
        parameters: The method's, by name; said at the start only.
        allow_pickle: Read pickled weights (weights only).
        threads: By default one for each core that the process may use.
        progress: Told how far the step is.

    Raises:
        UsageError: There is no state and no base, or the directory is no state, or the method is not the state's, or an
            expert is the base, or in the state already.
        ModelError: A model cannot be opened, or does not fit, or the state is damaged.
        RunError: The disk is full, an input changed.
    """
    begun = time.perf_counter()
    place = Path(state).resolve()
    experts = [experts] if isinstance(experts, str | Path) else experts
    if not experts:
        raise UsageError("there is no expert to take in", hint="geomerge continue STATE EXPERT")
    known = State.read(place)
    rule = _rule(known, method, parameters, place)
    if known is None and base is None:
        raise UsageError(
            "there is no state yet, and no base to start one from",
            where=str(state),
            hint="give the base at the first step: geomerge continue STATE EXPERT --base BASE",
        )
    root = str(base) if base is not None else known.base.path  # type: ignore[union-attr]
    plan, opened = plan_experts(root, experts, allow_pickle=allow_pickle)
    before: Checkpoint | None = None
    try:
        merged = [node for node in plan.output_nodes() if node.method is not None]
        if not merged:
            raise IncompatibleModels("the models share no tensor that could be merged", where=str(state))
        origin, *added = [plan.inputs[operand.input] for operand in merged[0].operands]
        if known is not None:
            _check_base(origin, known, place)
            before = known.open_sum(place)
            _check_sum(before, merged, place)
        _check_new(added, known, place)
        now = known or State(rule, Known.of(origin, path=True))
        if base is not None:
            now = replace(now, base=Known.of(origin, path=True))
        places = [Path(i.path) for i in plan.inputs if i.path]
        with OutputDirectory(place, force=True, inputs=places, kind=STATE) as output:
            if State.read(place) != known:  # between the reading and the lock
                output.abandon()
                raise UsageError(
                    "another step has changed the state meanwhile", where=str(state), hint="run this one again"
                )
            made = _Run(plan, opened, output, merged, threads, progress)
            try:
                squares = made.accumulate(now, before)
                sizes = [norm([facts[k] for facts in squares]) for k in range(len(experts))]
                size = norm([facts[-1] for facts in squares])
                norms = now.norms
                for each in sizes:
                    norms += each
                count = now.count + len(experts)
                now = replace(
                    now,
                    experts=(*now.experts, *map(Known.of, added)),
                    norms=norms,
                    factor=rule.factor(size, norms, count),
                )
                with open_checkpoint(str(output.partial / FOLDER)) as total:
                    facts = made.write(total, now.factor)
                    now = replace(now, sum=total.fingerprint())
                for checkpoint in opened:
                    checkpoint.verify_unchanged()
                _side_files(plan, output, now)
                final = output.finish()
            except BaseException:
                output.abandon()  # a step starts from the state, never from what another step left
                raise
    finally:
        for checkpoint in [*opened, *([before] if before is not None else [])]:
            checkpoint.close()
    return Step(
        out=final,
        state=now,
        norm=size,
        change=size * abs(now.factor),
        seconds=time.perf_counter() - begun,
        nbytes=plan.nbytes,
        tensors=len(plan.outputs),
        rounding_loss=total_loss(facts).share,
        notes=plan.notes,
    )


def _rule(known: State | None, method: str | None, parameters: Mapping[str, Any] | None, place: Path) -> Rule:
    # As it is listed beside the methods of recipes, or by itself.
    name = (method or (known.rule.name if known else DEFAULT)).removeprefix("continual_")
    if name not in RULES:
        raise UsageError(f"there is no continual method {name!r}", hint=did_you_mean(name, RULES))
    given = {key.rstrip("_"): value for key, value in (parameters or {}).items()}
    if known is None:
        rule = RULES[name].make(given, count=1)
    else:
        rule = RULES[name].make({**(known.rule.values() if name == known.rule.name else {}), **given}, count=1)
        if rule != known.rule:
            said = ", ".join(f"{key} {value}" for key, value in known.rule.values().items())
            raise UsageError(
                f"this state was made with {known.rule.name}{f' ({said})' if said else ''}",
                where=str(place),
                hint="leave out the method and its parameters, or start another state",
            )
    assert isinstance(rule, Rule)
    return rule


def _check_base(base: InputModel, known: State, place: Path) -> None:
    if base.fingerprint != known.base.fingerprint:
        raise IncompatibleModels(
            f"{base.ref} is not the base that this state was started from ({known.base.model}, fingerprint "
            f"{known.base.fingerprint[:16]})",
            where=str(place),
            hint="say with --base where that base is now",
        )


def _check_new(added: Sequence[InputModel], known: State | None, place: Path) -> None:
    taken = (
        {} if known is None else {each.fingerprint: f"in this state already, as {each.model}" for each in known.experts}
    )
    for model in added:
        if model.fingerprint in taken:
            raise UsageError(
                f"{model.ref} is {taken[model.fingerprint]}",
                where=str(place),
                hint="a state takes each expert once, and nothing was changed",
            )
        taken[model.fingerprint] = f"given twice, first as {model.ref}"


def _check_sum(before: Checkpoint, merged: Sequence[Node], place: Path) -> None:
    wanted = {node.name: tuple(node.shape) for node in merged}
    there = {name: tuple(info.shape) for name, info in before.tensors.items() if info.dtype == "F64"}
    if len(there) != len(before.tensors):
        raise DamagedCheckpoint("the running sum is not float64", where=str(place / FOLDER))
    odd = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    if odd:
        raise IncompatibleModels(
            f"{len(odd)} tensors differ from those that the state has summed up, such as {odd[0]} "
            f"({_shape(wanted.get(odd[0]))} here, {_shape(there.get(odd[0]))} there)",
            where=str(place),
            hint="all experts of a continual merge need the same tensors",
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


class _Run:
    """The passes of one step."""

    def __init__(
        self,
        plan: Plan,
        opened: Sequence[Checkpoint],
        output: OutputDirectory,
        merged: Sequence[Node],
        threads: int | None,
        progress: Progress | None,
    ) -> None:
        self._nodes, self._merged = list(enumerate(plan.output_nodes())), merged
        self._output, self._threads, self._progress = output, threads, progress
        self._builder = Builder(plan, opened)
        self._layout = plan_layout(
            [(n.name, n.dtype, n.shape) for _, n in self._nodes], metadata={"geomerge": __version__}
        )
        self._base = opened[merged[0].operands[0].input]
        self._total = plan.nbytes + sum(node.nbytes for node in merged)
        self._lock = threading.Lock()
        output.create(self._layout)

    def accumulate(self, now: State, before: Checkpoint | None) -> list[list[float]]:
        """Write the next sum; ‖τ‖² of each expert and ‖S‖² for each tensor."""
        if self._progress is not None:
            self._progress.start(self._total, 0)
        file = SumFile(self._output, self._merged)
        try:
            work = Accumulate(
                *self._common(),
                rule=now.rule,
                count=now.count,
                before=before,
                after=file,
                matrices=weight_matrices(self._base),
            )
            found = self._carry_out(work, [item for item in self._nodes if item[1].method is not None])
        finally:
            file.close()
        return [found[i]["squares"] for i in sorted(found)]

    def write(self, total: Checkpoint, factor: float) -> dict[int, Facts]:
        """Write the merged model."""
        found = self._carry_out(Write(*self._common(), total=total, factor=factor), self._nodes)
        if self._progress is not None:
            self._progress.finish()
        return found

    def _common(self) -> tuple[Builder, FileSink, Callable[[int], None], threading.Event]:
        return self._builder, FileSink(self._output, self._layout), self._advance, threading.Event()

    def _carry_out(self, work: Work, nodes: Sequence[tuple[int, Node]]) -> dict[int, Facts]:
        found: dict[int, Facts] = {}

        def done(entries: list[tuple[int, Facts]]) -> None:
            with self._lock:
                found.update(entries)

        Threads(work, self._threads).run(nodes, done)
        return found

    def _advance(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress.advance(nbytes)


def weight_matrices(model: Checkpoint) -> frozenset[str]:
    """The tensors that are weights of linear layers: of two dimensions, and neither embeddings nor heads nor tables."""
    parts = anatomy.read(model.shapes, model.config).parts
    return frozenset(
        name for name, shape in model.shapes.items() if (part := parts.get(name)) is not None and is_weight(part, shape)
    )


def _side_files(plan: Plan, output: OutputDirectory, state: State) -> None:
    write_model_files(plan, output)
    output.write_json(FILE, state.to_json())
    output.write_text("README.md", _card(output.out.name, state, plan.notes))


def _card(name: str, state: State, notes: Sequence[str]) -> str:
    """The model card: what was merged, in which order."""
    licence, note = combine_licences({k.model: k.licence for k in (state.base, *state.experts)})
    front = ["---", "base_model_relation: merge", f"tags: [merge, geomerge, {state.rule.name}]"]
    front += [f"license: {json.dumps(licence)}"] if licence else []
    lines = [f"{i}. `{_code(k.model)}` (fingerprint `{k.fingerprint[:16]}`)" for i, k in enumerate(state.experts, 1)]
    values = ", ".join(f"{key} = {value}" for key, value in state.rule.values().items())
    what = (
        f"{state.count} expert{'' if state.count == 1 else 's'} of `{_code(state.base.model)}` (fingerprint "
        f"`{state.base.fingerprint[:16]}`), taken in one after the other by {state.rule.title}"
        f"{f' ({values})' if values else ''} with [geomerge](https://github.com/geomerge/geomerge) {__version__}. "
        f"{state.rule.paper}."
    )
    more = "`geomerge continue` takes in the next one: `continual/` holds what it needs for that, and nothing else reads it."
    said = [*front, "---", f"# `{_code(name)}`", "", what, "", *lines, "", more, "", "## Licence", "", note]
    said += [f"\n> **Note.** {text}" for text in notes]
    return "\n".join(said) + "\n"


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
