"""What a merge method is: a frozen value of parameters with one pure function of mathematics.

Three families (docs/architecture.md): `Span` (the output is a linear combination of the inputs), `Elementwise` (each
output element is a function of the same element of the inputs and of a few statistics), and `Matrix` (the output is a
function of whole 2-D weights: singular vectors, projections, solutions of systems). A method subclasses its family,
declares its parameters with `parameter` and `per_model`, and says in class attributes which models it takes. Everything
else (recipe validation, help, schema, documentation, conformance tests) is derived from the class by
`geomerge.methods.registry`.

Inputs are always ordered: the base first (when the method works on one), then the others in the recipe's order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from geomerge.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.gram import Gram
    from geomerge.methods.tile import Loop, Scan, Tile
    from geomerge.methods.walk import Walk

BaseUse = Literal["required", "optional", "ignored"]
"""How a method uses the base model: as the origin of the task vectors or first endpoint, if given, or as any other model."""

Axis = Literal["tensor", "row", "filter", "column"]
"""What a span method measures at a time: whole tensors, slices along the last dimension, slices along all dimensions but the
first (a matrix's rows, a convolution's filters), or slices along the first."""

_METADATA = "geomerge"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as its class declares it.

    Attributes:
        name: The recipe's key (a trailing underscore of the Python name is dropped: ``lambda_`` is ``lambda``).
        attribute: The Python attribute.
        kind: ``float``, ``int``, ``bool`` or ``str``.
        per_model: One value for each non-base model (given in the recipe beside that model) instead of one in all.
        required: There is no default: the recipe must give it.
        default: The value when the recipe is silent.
        within: Inclusive bounds for numbers.
        above: An exclusive lower bound (which the profile ``compat: mergekit`` lets touch, as that tool does).
        extrapolates: The recipe's ``extrapolate: true`` lifts the bounds.
        expert: The number of an expert, from 1, in whose place a recipe may give its name.
        choices: The allowed words for strings.
        doc: One sentence.
    """

    name: str
    attribute: str
    kind: type
    per_model: bool
    required: bool
    default: Any
    within: tuple[float, float] | None
    choices: tuple[str, ...]
    doc: str
    above: float | None = None
    extrapolates: bool = False
    expert: bool = False

    @property
    def interval(self) -> str:
        """The values `within` which it must lie, as in ``(0, 1]``."""
        assert self.within is not None
        low, high = self.within
        return f"{'(' if self.above == low else '['}{low:g}, " + (f"{high:g}]" if math.isfinite(high) else "∞)")

    def check(self, value: Any, *, compat: str | None = None, extrapolate: bool = False) -> Any:
        """The value as the parameter's kind; raises `ValueError` with the reason when it cannot be one."""
        if value is None:
            if not self.required and self.default is None:
                return None
            raise ValueError(f"{self.name} must be {_kind_name(self.kind)}, not empty")
        if self.kind is bool:
            if isinstance(value, bool) or value in (0, 1):
                return bool(value)
            raise ValueError(f"{self.name} must be true or false, not {value!r}")
        if self.kind is str:
            if value is False and "off" in self.choices:
                return "off"  # as YAML 1.1 has it
            if not isinstance(value, str) or (self.choices and value not in self.choices):
                raise ValueError(f"{self.name} must be one of {', '.join(self.choices)}, not {value!r}")
            return value
        try:
            if isinstance(value, bool) and compat is None:
                raise TypeError
            number = float(value)
        except (TypeError, ValueError):
            said = str(value).lower() if isinstance(value, bool) else repr(value)
            raise ValueError(f"{self.name} must be a number, not {said}") from None
        if not math.isfinite(number):
            raise ValueError(f"{self.name} must be finite, not {number}")
        if self.within and not extrapolate * self.extrapolates and not self.within[0] <= number <= self.within[1]:
            more = " (or set `extrapolate: true`)" if self.extrapolates else ""
            raise ValueError(f"{self.name} must lie in {self.interval}, not {number:g}{more}")
        if self.above is not None and number <= self.above and compat is None:
            inside = f"lie in {self.interval}" if self.within else f"be greater than {self.above:g}"
            raise ValueError(f"{self.name} must {inside}, not {number:g}")
        if self.kind is int:
            if number != int(number):
                raise ValueError(f"{self.name} must be a whole number, not {number:g}")
            return int(number)
        return number


def _kind_name(kind: type) -> str:
    return {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}[kind]


def parameter(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    within: tuple[float, float] | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    extrapolates: bool = False,
    expert: bool = False,
) -> Any:
    """Declare a parameter with one value for each tensor. Without a default the recipe must give it."""
    return _declare(
        default,
        doc=doc,
        within=within,
        above=above,
        choices=choices,
        extrapolates=extrapolates,
        expert=expert,
        per_model=False,
    )


def per_model(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    within: tuple[float, float] | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    extrapolates: bool = False,
) -> Any:
    """Declare a parameter with one value for each tensor *and* each non-base model: a tuple in the models' order."""
    return _declare(
        default, doc=doc, within=within, above=above, choices=choices, extrapolates=extrapolates, per_model=True
    )


def _declare(default: Any, **meta: Any) -> Any:
    required = default is dataclasses.MISSING
    meta |= {"required": required, "default": None if required else default}
    # A per-model default is widened to the models' number when a method is made: see `Method.make`.
    return field(default=None if required else default, kw_only=True, metadata={_METADATA: meta})


_KINDS = {"float": float, "int": int, "bool": bool, "str": str, "tuple[float, ...]": float, "tuple[bool, ...]": bool}
_KINDS |= {"float | None": float, "tuple[float | None, ...]": float, "bool | None": bool, "int | None": int}


@dataclass(frozen=True)
class Method:
    """The common part of all families. Subclasses are frozen dataclasses whose fields are `parameter`s.

    Class attributes that a method states:
        name, aliases: The recipe's ``merge_method``.
        title, paper: For people: what it is, and the publication (authors, year, arXiv id).
        formula: The output in the paper's symbols, one line.
        when: One or two sentences: when to use it, and when not.
        models: Smallest and largest number of models *without* the base (``None``: no limit); for a method whose
            `base_use` is ``ignored``, of all models.
        base_use: See `BaseUse`.
        interpolates: It goes from the base to the other models, one of which may well be the base; else it adds task vectors
            to a base that is given.
        properties: Which metamorphic properties hold, by the names of `geomerge.methods.properties`.
        mergekit: Parameter values that the profile ``compat: mergekit`` puts in place of the defaults.
        rows: The method needs whole rows (slices along the last dimension) in a tile.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str]
    paper: ClassVar[str]
    formula: ClassVar[str]
    when: ClassVar[str]
    family: ClassVar[str]
    models: ClassVar[tuple[int, int | None]] = (1, None)
    base_use: ClassVar[BaseUse] = "required"
    interpolates: ClassVar[bool] = False
    properties: ClassVar[frozenset[str]] = frozenset()
    findings: ClassVar[tuple[type, ...]] = ()  # named tuples and dataclasses that `survey` gives: for the journal
    mergekit: ClassVar[Mapping[str, Any]] = {}
    example: ClassVar[str]

    known: Any = field(default=None, kw_only=True, repr=False, compare=False)
    """What `survey` found, or `known_of` it; `None` before. No parameter: nobody sets it but what runs the survey."""

    @property
    def adapters_only(self) -> bool:
        """Whether it is made for LoRA adapters: a plan refuses whole checkpoints, unless ``full_weights`` admits them."""
        return False

    @property
    def surveys(self) -> int:
        """Passes over the whole model that `survey` makes before the first tensor is made; 0: none are needed."""
        return 0

    @property
    def surveyed_alike(self) -> Hashable:
        """What two tensors' parameters must have in common to be surveyed together; by default all parameters."""
        return tuple(self.values().items())

    def survey(self, walk: Walk) -> Any:
        """Look at all tensors that are merged alike (of a matrix method: at all matrices, or see `surveys_rest`); the result
        becomes `known`. A tensor on its own is all there is: a survey is made of it alone, but the `merge` of a matrix method
        finds `known` to be `None`.

        Args:
            walk: The tensors. It may be gone through any number of times.
        """
        raise NotImplementedError

    def known_of(self, known: Any, name: str) -> Any:
        """What of a survey's result the merge of one tensor needs: by default all of it."""
        return known

    @classmethod
    def parameters(cls) -> dict[str, Parameter]:
        """The method's parameters by their recipe names, in the order of declaration."""
        found = cls.__dict__.get("_parameters")
        if found is None:
            found = {}
            for f in dataclasses.fields(cls):
                meta = f.metadata.get(_METADATA)
                if meta is not None:
                    name = f.name.rstrip("_")
                    said = f.type.__name__ if isinstance(f.type, type) and not get_args(f.type) else str(f.type)
                    if said not in _KINDS:
                        known = ", ".join(_KINDS)
                        raise TypeError(
                            f"the parameter {f.name!r} of {cls.__name__} is {said}, which is none of {known}"
                        )
                    kind = _KINDS[said]
                    meta = meta | {"choices": tuple(meta["choices"])}
                    found[name] = Parameter(name=name, attribute=f.name, kind=kind, **meta)
            cls._parameters = found  # type: ignore[attr-defined]
        return found

    @classmethod
    def make(
        cls, values: Mapping[str, Any], *, count: int, compat: str | None = None, extrapolate: bool = False
    ) -> Method:
        """Build the method from recipe values.

        Args:
            values: Parameter values by recipe name; a per-model parameter may be one value or a sequence of `count`.
            count: The number of models without the base (of all models when the base is ignored).
            compat: ``"mergekit"`` puts that tool's numeric choices in place of the defaults.
            extrapolate: Lift the bounds of interpolation coefficients.

        Raises:
            UsageError: An unknown name, a missing required parameter, a value out of bounds, a wrong number of models.
        """
        known = cls.parameters()
        for name in values:
            if name not in known:
                raise UsageError(f"{cls.name} has no parameter {name!r}", hint=did_you_mean(name, known))
        low, high = cls.models
        if count < low or (high is not None and count > high):
            raise UsageError(f"{cls.name} takes {cls.models_text()}, not {count}")
        defaults = cls.mergekit if compat == "mergekit" else {}
        made: dict[str, Any] = {}
        for name, p in known.items():
            if name in values:
                value = values[name]
            elif name in defaults:
                value = defaults[name]
            elif p.required:
                raise UsageError(f"{cls.name} needs the parameter {name!r}: {p.doc}")
            else:
                value = p.default
            try:
                if p.per_model:
                    several = value if isinstance(value, list | tuple) else [value] * count
                    if len(several) != count:
                        raise ValueError(f"{name} has {len(several)} values for {count} models")
                    made[p.attribute] = tuple(p.check(v, compat=compat, extrapolate=extrapolate) for v in several)
                else:
                    made[p.attribute] = p.check(value, compat=compat, extrapolate=extrapolate)
            except ValueError as error:
                raise UsageError(f"{cls.name}: {error}") from None
        method = cls(**made)
        try:
            method.check(count, compat)
        except ValueError as error:
            raise UsageError(f"{cls.name}: {error}") from None
        return method

    @classmethod
    def models_text(cls) -> str:
        """``exactly 2 models``, ``at least 1 model beside the base``."""
        low, high = cls.models
        number = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        beside = " beside the base" if cls.base_use == "required" else ""
        return f"{number} model{'' if low == high == 1 or (high is None and low == 1) else 's'}{beside}"

    @classmethod
    def adds_to_base(cls) -> bool:
        """Whether it adds task vectors to a base that is given."""
        return cls.base_use != "ignored" and not cls.interpolates

    @classmethod
    def usage(cls) -> str:
        """How one asks for it."""
        return f"merge_method: {cls.name}"

    @property
    def loops(self) -> bool:
        """Whether compiled loops do most of the work, where they exist."""
        return False

    def check(self, count: int, compat: str | None = None) -> None:
        """Raise `ValueError` for parameters that do not go together. Arguments are as in `make`."""

    @property
    def rows(self) -> bool:
        """Whether a tile must hold whole rows."""
        return False

    def values(self) -> dict[str, Any]:
        """The parameters by recipe name, as `make` takes them back."""
        return {name: getattr(self, p.attribute) for name, p in type(self).parameters().items()}


@dataclass(frozen=True)
class Span(Method):
    """The output is Σ cᵢ·xᵢ: a method writes the coefficients as a function of the inputs' Gram matrix.

    Class attributes beside those of `Method`:
        takes_statistics: The recipe's `statistics` may weight the inner products.
        default_schedule: The schedule for `t` when the recipe gives neither.
    """

    family: ClassVar[str] = "span"
    takes_statistics: ClassVar[bool] = False
    default_schedule: ClassVar[str | None] = None

    @property
    def axis(self) -> Axis:
        """What one Gram matrix is measured over."""
        return "tensor"

    @property
    def grouped(self) -> str:
        """What shares one Gram matrix: a block's tensors of one role (``group``), those of the ``model``, or none (empty)."""
        return ""

    @property
    def loops(self) -> bool:
        return self.axis == "tensor"

    @property
    def needs_gram(self) -> bool:
        """Whether the coefficients depend on the weights at all (when not, nothing is measured)."""
        return True

    @property
    def rows(self) -> bool:
        return self.axis in ("row", "filter")

    def coefficients(self, gram: Gram) -> Any:
        """The coefficients of the K inputs.

        Args:
            gram: The Gram matrix of the inputs; for all axes but ``tensor`` one matrix for each slice.

        Returns:
            Shape ``(K,)`` for the axis ``tensor``, ``(slices, K)`` otherwise: an array of float64, or a list.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Elementwise(Method):
    """Each output element is a function of the same element of all inputs, and of statistics of the tensor."""

    family: ClassVar[str] = "elementwise"

    recorded: ClassVar[bool] = False
    """`blend` is written in operations that `geomerge.methods.program` can record, so that a compiled loop does it."""

    @property
    def single(self) -> bool:
        """Whether tiles of 16-bit models may come as float32 (twice as fast).

        Only for a method that sees to it that the result is still that of float64: see `geomerge.methods.combine`.
        """
        return False

    @property
    def looks(self) -> bool:
        """Whether `measure` or a survey looks at the elements, so that they are read more than once."""
        return type(self).measure is not Elementwise.measure or self.surveys > 0

    def measure(self, scan: Scan) -> Any:
        """Statistics of one tensor that `blend` needs; computed with additive passes over its tiles."""
        return None

    def blend(self, tile: Tile, stats: Any) -> Tensor:
        """The output's elements, float64, shaped as the tile's inputs.

        Args:
            tile: The inputs' elements, each a float64 tensor that may be overwritten.
            stats: What `measure` returned.
        """
        raise NotImplementedError

    def tell(self, stats: Any) -> dict[str, Any]:
        """What the manifest shall say of a tensor whose tiles have all been blended: plain data by name."""
        return {}

    def warning(self, told: Sequence[tuple[int, Mapping[str, Any]]]) -> str | None:
        """What the user should know once the whole model is made.

        Args:
            told: Of each tensor that this method made (with whatever parameters) its elements and what `tell` said.
        """
        return None

    @property
    def loops(self) -> bool:
        return self.recorded or type(self).compiled is not Elementwise.compiled

    def compiled(self, scan: Scan, stats: Any) -> Loop | None:
        """A compiled loop with the very bits of `blend` rounded to nearest, or `None`: see `Prepared.fused`.

        Args:
            scan: What `measure` looked at.
            stats: What it returned.
        """
        return None


RESTS = ("mean", "sum", "scaled_sum", "base")  # for tensors that are no weight matrices: see `Matrix.rest_weights`


@dataclass(frozen=True)
class Matrix(Method):
    """The output is θ₀ + λ·g(τ₁ … τ_T) of whole 2-D weights: a method writes g.

    What is no matrix (vectors, convolutions, embeddings, heads) gets the rest rule, a sum of task vectors; with `surveys_rest`
    the survey looks at it, too. A method whose `base_use` is ``ignored`` gets the weights themselves, and gives the output.
    """

    family: ClassVar[str] = "matrix"
    surveys_rest: ClassVar[bool] = False

    rest: str = parameter("mean", choices=RESTS, doc="what tensors that are no weight matrices get of the task vectors")
    matrix: bool | None = parameter(
        None, doc="whether a 2-D tensor is a weight matrix; by default all are but embeddings, heads, norms and tables"
    )
    lambda_: float = parameter(1.0, doc="factor of the merged task vector")

    @property
    def factor(self) -> float:
        """What the engine multiplies the merged task vector by: λ, unless `merge` has its own use for it."""
        return self.lambda_

    def workspace(self, count: int) -> int:
        """How many matrices of the tensor's size `merge` has in memory at most, beside the `count` that it is given."""
        return 14

    def rest_weights(self, count: int) -> tuple[float, ...]:
        """The factor of each of `count` task vectors in tensors that are no matrices, λ included.

        ``mean``: λ/T. ``sum``: λ. ``scaled_sum``: λ/√T, so that orthogonal task vectors of equal length sum to that length.
        ``base``: 0, the base is kept.
        """
        share = {"mean": 1 / count, "sum": 1.0, "scaled_sum": 1 / math.sqrt(count), "base": 0.0}[self.rest]
        return (self.lambda_ * share,) * count

    def merge(self, deltas: Tensor) -> Tensor:
        """The merged task vector, not yet multiplied by `factor`: a pure function, the same bits for the same input.

        Args:
            deltas: τ_t = θ_t − θ₀ of one weight: shape ``(T, rows, columns)``, float64. They may be overwritten.

        Returns:
            Shape ``(rows, columns)``, float64. Zero task vectors give zero, never NaN.
        """
        raise NotImplementedError
