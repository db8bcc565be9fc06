"""What a recipe says, as frozen values: models, slices, modules, parameters, and the lines where they stand.

`geomerge.recipe.parse` makes them from YAML and `geomerge.recipe.resolve` evaluates the parameters for one tensor.
Nothing here reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from geomerge.recipe.patterns import Kind, searcher

if TYPE_CHECKING:
    from geomerge.anatomy import Part

Scalar = float | int | bool | str
"""One value of a parameter."""


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a recipe's file; ``str()`` gives ``file:line``, and nothing for a recipe that no user wrote."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else ""


NOWHERE = Where("<recipe>", 1)
"""The place of values that were made in Python rather than read."""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model as a recipe names it: a local path, a hub id, or the name of an earlier document.

    Attributes:
        path: The path (``~`` expanded) or hub id.
        revision: The branch, tag or commit of a hub id.
        lora: An adapter that is added to the model.
        subfolder: The folder in the repository or directory in which the model lies.
        written: The text in the recipe, for messages. Two references that mean the same are equal however written.
    """

    path: str
    revision: str | None = None
    lora: ModelRef | None = None
    subfolder: str | None = None
    written: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        if self.written:
            return self.written
        text = f"{self.path}@{self.revision}" if self.revision else self.path
        text += f":{self.subfolder}" if self.subfolder else ""
        return f"{text}+{self.lora}" if self.lora else text


@dataclass(frozen=True, slots=True)
class Filter:
    """Which tensors an entry is for. All given conditions must hold; a filter without any holds everywhere.

    Attributes:
        name: A piece of the tensor's name, ``"*"`` for all, a glob over the whole name, or a regular expression.
        role: A role of `geomerge.anatomy`, such as ``attention``.
        blocks: First and last block, both included.
        kind: How `name` is meant.
        component: A component of a composite model, such as ``vision``.
    """

    name: str | None = None
    role: str | None = None
    blocks: tuple[int, int] | None = None
    kind: Kind = "substring"
    component: str | None = None

    def matches(self, part: Part) -> bool:
        """Whether the tensor is meant."""
        if self.role is not None and part.role != self.role:
            return False
        if self.component is not None and part.component != self.component:
            return False
        if self.blocks is not None and (part.block is None or not self.blocks[0] <= part.block <= self.blocks[1]):
            return False
        if self.name is None or self.name == "*":
            return True
        if self.kind == "substring":
            return self.name in part.name
        return searcher(self.kind, self.name)(part.name) is not None

    @property
    def everywhere(self) -> bool:
        """Whether the filter holds for every tensor."""
        limited = self.role is not None or self.component is not None or self.blocks is not None
        return self.name in (None, "", "*") and not limited

    def __str__(self) -> str:
        said = []
        if self.name is not None:
            said.append(f"filter: {f'/{self.name}/' if self.kind == 'regex' else self.name}")
        if self.role is not None:
            said.append(f"role: {self.role}")
        if self.component is not None:
            said.append(f"component: {self.component}")
        if self.blocks is not None:
            first, last = self.blocks
            said.append(f"block: {first}" if first == last else f"block: {first}-{last}")
        return ", ".join(said) or "filter: *"


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of a setting, or a gradient (a tuple of anchors over the slice's depth), and the tensors it is for."""

    filter: Filter | None
    value: Scalar | tuple[Scalar, ...]
    where: Where = NOWHERE

    def at(self, t: float) -> Scalar:
        """The value at the depth `t` in [0, 1].

        K numeric anchors v₀ … v_{K−1} are interpolated linearly: with s = t·(K − 1) and i = ⌊s⌋ the value is
        (1 − s + i)·v_i + (s − i)·v_{i+1}. Words and truth values step: v_⌊s⌋.
        """
        if not isinstance(self.value, tuple):
            return self.value
        anchors = self.value
        position = min(max(t, 0.0), 1.0) * (len(anchors) - 1)
        low = min(math.floor(position), len(anchors) - 1)
        first = anchors[low]
        if low == position or low + 1 == len(anchors) or any(isinstance(a, bool | str) for a in anchors):
            return first
        weight = position - low
        return (1 - weight) * float(first) + weight * float(anchors[low + 1])


@dataclass(frozen=True, slots=True)
class Setting:
    """What one scope says about one parameter: entries of which the first that matches counts."""

    entries: tuple[Entry, ...]
    where: Where = NOWHERE

    def match(self, part: Part) -> Entry | None:
        """The first entry that is for this tensor."""
        for entry in self.entries:
            if entry.filter is None or entry.filter.matches(part):
                return entry
        return None

    def value_for(self, part: Part, t: float) -> Scalar | None:
        """The value for a tensor at the depth `t`; ``None`` when no entry is for it."""
        entry = self.match(part)
        return None if entry is None else entry.at(t)


Parameters = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Source:
    """One model (or a range of its blocks, half open) that goes into a slice."""

    model: ModelRef
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    where: Where = NOWHERE


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive blocks of the output and what they are merged from. Without layer ranges: all blocks."""

    sources: tuple[Source, ...]
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    where: Where = NOWHERE


@dataclass(frozen=True, slots=True)
class Module:
    """One stack of blocks of the output; `name` is ``None`` when the recipe does not tell stacks apart."""

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters = field(default_factory=dict)
    where: Where = NOWHERE


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Where the embedding of one token comes from.

    Attributes:
        token: The token in the output's vocabulary.
        kind: ``model``: the same token of `model`; ``model_token``: another token of `model`; ``zero``: zeros.
        source_token, source_token_id: The other token, by text or by id; exactly one for ``model_token``.
        force: Whether the rule also holds for models that have the token themselves.
    """

    token: str
    kind: Literal["model", "model_token", "zero"]
    model: ModelRef | None = None
    source_token: str | None = None
    source_token_id: int | None = None
    force: bool = False
    where: Where = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """The output's vocabulary: of all models, of the base, common to all, or one model's; and rules for single tokens.

    Attributes:
        source: Whose tokens.
        tokens: Rules for single tokens.
        pad_to_multiple_of: What the number of rows is made a multiple of.
        where: Where the recipe says so.
        missing: What a model gets for a token that it lacks: by default the base's row, or the mean over the models that have
            it; ``average``: that mean in any case; ``mean``: of its own rows; a model: that model's row where it has one;
            ``omp``: a sparse sum of its own rows.
        sparsity: The most rows in such a sum.
    """

    source: Literal["union", "base", "intersection"] | ModelRef
    tokens: tuple[TokenRule, ...] = ()
    pad_to_multiple_of: int | None = None
    where: Where = NOWHERE
    missing: Literal["default", "mean", "zero", "average", "omp"] | ModelRef = "default"
    sparsity: int = 64


@dataclass(frozen=True, slots=True)
class AlignSpec:
    """Which models' hidden basis is rotated before the merge, and how the rotation is found.

    Attributes:
        scope: ``embedding``: the token embedding alone; ``residual``: all that reads from or writes into the stream.
        to: The model that stays as it is; `None`: the base, or else the first.
        using: ``tokens``: the embeddings of shared tokens; ``weights``: all matrices of the scope as well.
        centre, normalise: What is done to the embeddings before the rotation is found.
        weight: ``log_frequency``: a token counts as the logarithm of its expected frequency.
    """

    scope: Literal["embedding", "residual"]
    to: ModelRef | None = None
    using: Literal["tokens", "weights"] = "tokens"
    centre: bool = False
    normalise: bool = False
    weight: Literal["none", "log_frequency"] = "none"
    where: Where = NOWHERE


@dataclass(frozen=True, slots=True)
class Component:
    """What becomes of one component of a composite model: merged by the recipe's method, or copied from `copy`."""

    copy: ModelRef | None = None
    where: Where = field(default=NOWHERE, compare=False)


@dataclass(frozen=True, slots=True)
class Step:
    """Something done to each model's task vector before the method, or to the merged one after it.

    Attributes:
        name: As `geomerge.recipe.grammar` has it; no alias.
        parameters: Its parameters.
        statistics: The file that its statistics are in.
    """

    name: str
    parameters: Parameters = field(default_factory=dict)
    where: Where = NOWHERE
    statistics: ModelRef | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """One merge, as one YAML document describes it.

    Attributes:
        name: What later documents of the file call the result.
        method: ``merge_method`` as written (a name or an alias).
        modules: The output's stacks. Top-level ``models`` or ``slices`` make one module without a name, and
            ``models`` one slice without layer ranges.
        schedule: geomerge's schedule over depth, as plain data: a preset's name or a mapping.
        statistics: Files with a non-negative number for each weight (Fisher diagonals): their sum weights inner products.
        components: For composite models: what becomes of each component; those that are not named are merged.
        text: The whole file's text, which is stored beside the merge.
        notes: What was accepted but has no effect, each with its ``file:line``.
        lines: Where the top-level keys stand; see `at`.
    """

    name: str | None
    method: str
    modules: tuple[Module, ...]
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerSpec | None = None
    align: AlignSpec | None = None
    chat_template: str | None = None
    schedule: Mapping[str, Any] | str | None = None
    statistics: tuple[ModelRef, ...] = ()
    steps: tuple[Step, ...] = ()
    components: Mapping[str, Component] = field(default_factory=dict)
    compat: Literal["mergekit"] | None = None
    seed: int = 0
    guardrails: Literal["warn", "enforce", "off"] | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    extrapolate: bool = False
    unmatched: Literal["refuse", "copy"] = "refuse"
    requantize: Literal["same", "int8", "fp8"] | None = None
    text: str = ""
    where: Where = NOWHERE
    notes: tuple[str, ...] = ()
    lines: Mapping[str, Where] = field(default_factory=dict)

    def at(self, key: str) -> Where:
        """Where a top-level key stands; the document's first line when it is not given."""
        return self.lines.get(key, self.where)

    def slices(self) -> Iterator[Slice]:
        """All slices of all modules, in order."""
        for module in self.modules:
            yield from module.slices

    def line_of(self, model: ModelRef | None) -> Where:
        """Where a model is listed first; the document's first line if it is not."""
        sources = (source for each in self.slices() for source in each.sources)
        return next((source.where for source in sources if model is not None and source.model == model), self.where)

    def models(self) -> tuple[ModelRef, ...]:
        """The distinct models in the recipe's order; a base that is not listed as a source comes last."""
        found: dict[ModelRef, None] = {}
        for each in self.slices():
            found.update(dict.fromkeys(source.model for source in each.sources))
        for base in (*(each.base_model for each in self.slices()), self.base_model):
            if base is not None:
                found.setdefault(base)
        return tuple(found)

    def scopes(self) -> Iterator[Parameters]:
        """Every place where parameters are given: sources, slices, modules, the recipe itself, and the steps."""
        for module in self.modules:
            for each in module.slices:
                for source in each.sources:
                    yield source.parameters
                yield each.parameters
            yield module.parameters
        yield self.parameters
        for step in self.steps:
            yield step.parameters


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The recipes of one file in an order in which they can run; the last one makes the output.

    A model's path in a recipe may be the name of an earlier one.
    """

    recipes: tuple[Recipe, ...]

    @property
    def output(self) -> Recipe:
        """The recipe whose result is the file's result."""
        return self.recipes[-1]

    def requantised(self, scheme: Literal["same", "int8", "fp8"]) -> Pipeline:
        """The same with another ``requantize`` than its last recipe says."""
        note = f"requantize: {scheme}, whatever the recipe says of it"
        output = replace(self.output, requantize=scheme, notes=(*self.output.notes, note))
        return replace(self, recipes=(*self.recipes[:-1], output))

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of all recipes."""
        return tuple(note for recipe in self.recipes for note in recipe.notes)
