"""From a base and a fine-tune to an adapter: ΔW of every linear layer at low rank, the rest whole.

What becomes of a tensor:

* equal in both: nothing;
* a 2-D weight that is neither an embedding nor a head: its difference, truncated to the rank or energy asked for, read block by
  block and never held whole;
* a bias beside such a weight: whole;
* anything else that changed (norms, embeddings, heads, convolutions, experts stored as one): its module whole
  (``modules_to_save``), or left out, or refused, as asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from geomerge.adapter.combine import Progress, checked, each_of
from geomerge.adapter.layers import Layer
from geomerge.adapter.low_rank import Budget, Factors, Truncated
from geomerge.adapter.report import Report, layer_reports
from geomerge.adapter.streamed import Streamed, height
from geomerge.adapter.streamed import truncate as truncate_streamed
from geomerge.adapter.write import Content, write
from geomerge.checkpoint.dtypes import DTYPES, parse_dtype, to_torch
from geomerge.checkpoint.reader import load
from geomerge.checkpoint.side_files import side_files
from geomerge.engine.adapted import stored_transposed
from geomerge.engine.models import Model, Models
from geomerge.engine.stored import stored_source
from geomerge.errors import IncompatibleModels, NotFiniteError, UsageError
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import NOWHERE

Rest = Literal["save", "drop", "refuse"]
"""What becomes of changes that have no low-rank form."""


@dataclass(frozen=True)
class _Found:
    """What one tensor came to."""

    name: str
    changed: bool = False
    layer: Layer | None = None
    made: Truncated | None = None


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    rest: Rest = "save",
    prefix: str = "",
    dtype: str = "float32",
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Make an adapter that turns a base into a fine-tune of it.

    Args:
        base, tuned: Models as recipes name them; each may be BASE+ADAPTER.
        out: The directory to make.
        rank, energy: At most so many directions a layer; the fewest that hold this share of ‖ΔW‖². One of them at least.
        rest: What becomes of changes that have no low-rank form: saved whole, dropped, or a reason to refuse.
        prefix: Put before every module's name, where names in memory have a component more than on disk.
        dtype: Of the factors; whole tensors keep the fine-tune's.
        seed: Key of random draws.
        threads: By default one for each core that the process may use.
        force: Replace an existing adapter.
        allow_pickle: Read pickled weights (weights only).
        progress: Told of each tensor.

    Raises:
        UsageError: Neither rank nor energy, or the output's place is taken.
        ModelError: A model cannot be read, or they do not fit each other.
    """
    if rank is None and energy is None:
        raise UsageError("neither a rank nor an energy is given", hint="such as --rank 16, or --energy 0.95")
    if rest not in get_args(Rest):
        raise UsageError(f"rest is {rest!r}", hint=f"known: {', '.join(get_args(Rest))}")
    budget, place = checked(rank, energy), to_torch(parse_dtype(dtype))
    opened = Models(allow_pickle=allow_pickle)
    try:
        pair = [opened.get(parse_reference(str(each), NOWHERE)) for each in (base, tuned)]
        work = _Extraction(pair[0], pair[1], budget, seed)
        if progress is not None:
            progress.start(len(work.names), 0)
        found = list(each_of(work.names, work.examine, threads, progress))
        content, report = work.conclude(found, rest, prefix)
        for checkpoint in opened.inputs:
            checkpoint.verify_unchanged()
        inputs = [p for c in opened.inputs for p in (c.path, c.adapter) if p is not None]
        final, nbytes = write(out, content, report.to_json(), dtype=place, inputs=inputs, force=force)
        return replace(report, out=final, nbytes=nbytes)
    finally:
        for checkpoint in opened.inputs:
            checkpoint.close()


class _Extraction:
    def __init__(self, base: Model, tuned: Model, budget: Budget, seed: int) -> None:
        self._base, self._tuned, self._budget, self._seed = base, tuned, budget, seed
        if base.checkpoint is tuned.checkpoint:
            raise UsageError(f"{base} and {tuned} are the same model")
        self.names: list[str] = []
        for name in dict.fromkeys((*base.tensors, *tuned.tensors)):
            if name in base.anatomy.buffers or name in tuned.anatomy.buffers:
                continue
            if name in base.anatomy.tied and name in tuned.anatomy.tied:
                continue
            theirs = base.find(name), tuned.find(name)
            if None in theirs:
                lacking = base if theirs[0] is None else tuned
                raise IncompatibleModels(f"{lacking} has no {name}", hint="both must be of one architecture")
            self._check(name)
            self.names.append(name)

    def _check(self, name: str) -> None:
        one, two = self._kind(self._base, name), self._kind(self._tuned, name)
        resized = name in self._base.anatomy.vocabulary and one[1][1:] == two[1][1:]
        if one[1] != two[1] and not resized:
            raise IncompatibleModels(
                f"the shapes of {name} differ: {list(one[1])} and {list(two[1])}",
                hint="both must be of one architecture and size",
            )

    @staticmethod
    def _kind(model: Model, name: str) -> tuple[str, tuple[int, ...]]:
        stored = model.find(name)
        assert stored is not None
        return model.tensors[stored]

    # -- one tensor ----------------------------------------------------------------------------------------------------

    def examine(self, name: str) -> _Found:
        """Compare a tensor, and truncate its change where it is a linear layer's."""
        shape = self._kind(self._base, name)[1]
        if shape != self._kind(self._tuned, name)[1]:
            return _Found(name, changed=True)
        rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
        if not rows * columns:
            return _Found(name)
        matrix = Streamed(rows, columns, lambda: self._difference(name, rows, columns))
        if not self._changed(matrix):
            return _Found(name)
        if not self._linear(name, shape):
            return _Found(name, changed=True)
        budget = self._budget
        if budget.rank is None:
            # Beyond this the factors are larger than the matrix.
            budget = replace(budget, rank=max(rows * columns // (rows + columns), 1))
        made = truncate_streamed(matrix, budget, name, self._seed)
        outputs, inputs = rows, columns
        if stored_transposed(name, self._base.config):
            factors = Factors(made.factors.a.T.contiguous(), made.factors.b.T.contiguous())
            made, outputs, inputs = replace(made, factors=factors), columns, rows
        return _Found(name, True, Layer(name.removesuffix(".weight"), "linear", outputs, (inputs,)), made)

    def _linear(self, name: str, shape: tuple[int, ...]) -> bool:
        part = self._base.anatomy.parts.get(name) or self._tuned.anatomy.parts[name]
        floats = all(DTYPES[self._kind(m, name)[0]].kind == "float" for m in (self._base, self._tuned))
        apart = name in self._base.anatomy.vocabulary or part.role in ("embedding", "head", "norm")
        return floats and len(shape) == 2 and name.endswith(".weight") and not apart

    def _difference(self, name: str, rows: int, columns: int) -> Iterator[Tensor]:
        """Blocks of rows of tuned − base."""
        sources = []
        for model in (self._tuned, self._base):
            stored = model.find(name)
            assert stored is not None
            assert model.checkpoint is not None
            sources.append(stored_source(model.checkpoint, stored, f"{model}: {stored}"))
        step = min(height(columns), rows)
        pair = torch.empty(2, step * columns, dtype=torch.float64)
        for first in range(0, rows, step):
            count = (min(first + step, rows) - first) * columns
            for source, values in zip(sources, pair, strict=True):
                source.read(first * columns, values[:count])
                if not math.isfinite(values[:count].sum().item()):
                    raise NotFiniteError("the tensor holds NaN or Inf", where=source.label)
            yield (pair[0, :count] - pair[1, :count]).view(-1, columns)

    @staticmethod
    def _changed(matrix: Streamed) -> bool:
        return any(bool(block.any()) for block in matrix.blocks())

    # -- the whole -----------------------------------------------------------------------------------------------------

    def conclude(self, found: list[_Found], rest: Rest, prefix: str) -> tuple[Content, Report]:
        """What goes into the adapter, and the report (its `out` is still to be filled in)."""
        low = [(f.layer, f.made) for f in found if f.layer is not None and f.made is not None]
        low = [(replace(layer, module=prefix + layer.module), made) for layer, made in low]
        adapted = {f.layer.module for f in found if f.layer is not None}
        whole = [f.name for f in found if f.changed and f.layer is None]
        left = [n for n in whole if not self._savable(n, rest)]
        if left and rest == "refuse":
            raise IncompatibleModels(
                f"{left[0]}{f' and {len(left) - 1} more' if len(left) > 1 else ''} changed and has no low-rank form",
                where=str(self._tuned),
                hint="keep such tensors whole with --rest save, or leave them out with --rest drop",
            )
        if not low and not whole:
            raise IncompatibleModels(f"{self._tuned} does not differ from {self._base}: there is nothing to extract")
        kept = self._with_modules([n for n in whole if n not in left], adapted)
        base = self._base.checkpoint
        assert base is not None
        notes = [] if low else ["no linear layer changed, and PEFT loads no adapter without one; geomerge reads it"]
        resized = [n for n in kept if self._kind(self._base, n)[1] != self._kind(self._tuned, n)[1]]
        if resized:
            notes.append(
                f"{resized[0]} has another number of rows than the base's: resize the base before PEFT loads this"
            )
        whole_tensors = {name: self._load(name) for name in kept}
        shared = {a: s for a, s in self._base.anatomy.tied.items() if a in self._tuned.anatomy.tied and s in kept}
        # PEFT wants tied modules under both of their names.
        whole_tensors |= {alias: whole_tensors[stored].clone() for alias, stored in shared.items()}
        content = Content(
            [(layer, made.factors) for layer, made in low],
            {prefix + name: value for name, value in whole_tensors.items()},
            base=None if self._base.ref.lora else base.hub_id or self._base.ref.path,
            base_revision=base.revision,
            fan_in_fan_out=any(stored_transposed(f"{layer.module}.weight", self._base.config) for layer, _ in low),
            settings={
                "task_type": _task_type(self._base.config),
                **({"ensure_weight_tying": True} if shared else {}),
            },
            copies=self._tokenizer(),
        )
        asked = [f"rank {self._budget.rank}"] if self._budget.rank is not None else []
        asked += [f"energy {self._budget.energy:g}"] if self._budget.energy is not None else []
        report = Report(
            out=Path(),
            how=f"extracted at {', '.join(asked)}",
            layers=layer_reports([layer for layer, _ in low], [made for _, made in low]),
            whole=tuple(content.whole),
            left_out=tuple((name, "no low-rank form") for name in left),
            notes=tuple(notes),
        )
        return content, report.noted()

    def _savable(self, name: str, rest: Rest) -> bool:
        if rest == "save" and "." not in name:
            raise IncompatibleModels(f"{name} changed and belongs to no module that an adapter could hold")
        return rest == "save"

    def _with_modules(self, names: list[str], adapted: set[str]) -> list[str]:
        """The names, and the other tensors of their modules: PEFT saves modules, not tensors. A bias beside a low-rank
        change comes alone."""
        modules = {n.rpartition(".")[0] for n in names} - adapted
        chosen = {n for n in names if n.rpartition(".")[0] in adapted}
        return [n for n in self.names if n in chosen or n.rpartition(".")[0] in modules]

    def _load(self, name: str) -> Tensor:
        """A tensor of the fine-tune, as it is stored, or computed where it is not."""
        checkpoint, stored = self._tuned.checkpoint, self._tuned.find(name)
        assert checkpoint is not None
        assert stored is not None
        info = checkpoint.tensors[stored]
        if not checkpoint.computed(stored):
            return load(checkpoint, info)
        values = torch.empty(math.prod(info.shape), dtype=torch.float64)
        stored_source(checkpoint, stored, f"{self._tuned}: {stored}").read(0, values)
        return values.view(info.shape).to(to_torch(checkpoint.dtype(stored)))

    def _tokenizer(self) -> dict[str, Path]:
        """The fine-tune's tokenizer and chat template, which go with the adapter as trainers write them."""
        folder = self._tuned.tokenizer_folder
        if folder is None:
            return {}
        files = [p for kind in ("tokenizer", "chat_template") for p in side_files(folder, self._tuned.config, kind)]
        return {p.relative_to(folder).as_posix(): p for p in files}


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""The end of an architecture's name → PEFT's name of its task, from which it chooses the class that loads the base."""


def _task_type(config: Mapping[str, Any] | None) -> str | None:
    names = [str(name) for name in (config or {}).get("architectures") or ()]
    return next((task for end, task in _TASKS.items() if any(name.endswith(end) for name in names)), None)
