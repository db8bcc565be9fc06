"""Methods as functions of tensors in memory: the same scans and kernels as the engine's, without files."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from geomerge.checkpoint.dtypes import from_torch, out_of_range, parse_dtype, to_torch
from geomerge.errors import IncompatibleModels, UsageError, did_you_mean
from geomerge.methods.base import Matrix, Method, Span
from geomerge.methods.gram import Gram, together
from geomerge.methods.kernel import Open, measure_gram, prepare, survey_scan
from geomerge.methods.rest import merges_whole
from geomerge.methods.tile import TILE, Scan, TensorSource
from geomerge.methods.walk import Walk

if TYPE_CHECKING:
    from torch import Tensor


Weights: TypeAlias = "Tensor | Mapping[str, Tensor]"
"""A tensor, or tensors by name."""


class Function:
    """One method as a function.

    Args of a call:
        base, models: For a method that needs a base: the base, then the list of experts; otherwise the list of models
            (and ``base=`` where it is optional). Tensors of one shape, or mappings with the same names.
        seed: Key of random draws.
        dtype: Of the result, torch's or the recipe's word for it; by default the inputs' common dtype.
        compat: ``"mergekit"`` puts that tool's numeric choices in place of the defaults.
        extrapolate: Lift the bounds of interpolation coefficients.
        tile: Elements in a tile; the result does not depend on it.
        **parameters: The method's own; ``lambda_`` stands for ``lambda``.

    Returns:
        A tensor, or a dictionary of tensors where mappings were given.

    Raises:
        UsageError: A wrong parameter or number of models.
        IncompatibleModels: Names or shapes differ.
        NotFiniteError: An input holds NaN or Inf.
        OutOfRange: The dtype does not hold the result.
    """

    def __init__(self, method: type[Method]) -> None:
        self.method = method
        self.__name__ = method.name
        self.__doc__ = method.__doc__

    def __repr__(self) -> str:
        return f"<geomerge.methods.{self.method.name}>"

    def __call__(
        self,
        *models: Weights | Sequence[Weights],
        base: Weights | None = None,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
        compat: str | None = None,
        extrapolate: bool = False,
        tile: int = TILE,
        **parameters: Any,
    ) -> Any:
        if compat not in (None, "mergekit"):
            raise UsageError(f"there is no profile {compat!r}", hint=did_you_mean(str(compat), ("mergekit",)))
        if isinstance(dtype, str):
            dtype = to_torch(parse_dtype(dtype))
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UsageError(
                f"the dtype must be a floating-point one of torch, not {dtype!r}", hint="such as torch.bfloat16"
            )
        for name, number, least in (("seed", seed, 0), ("tile", tile, 1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, not {number!r}")
        inputs, count = self._inputs(models, base)
        values = {name.rstrip("_"): value for name, value in parameters.items()}
        method = self.method.make(values, count=count, compat=compat, extrapolate=extrapolate)
        if all(isinstance(m, torch.Tensor) for m in inputs):
            return merge_tensors(method, inputs, seed=seed, dtype=dtype, tile=tile)  # type: ignore[arg-type]
        if any(isinstance(m, torch.Tensor) for m in inputs):
            raise UsageError("the models must be all tensors or all mappings of tensors")
        names = list(inputs[0])
        for m in inputs[1:]:
            if set(m) != set(names):
                odd = min(set(names) ^ set(m))
                raise IncompatibleModels(f"the tensor {odd!r} is not in every model")
        measured: Gram | None = None
        if isinstance(method, Span) and method.grouped:
            if method.grouped != "model":
                raise UsageError("tensors are grouped by role in a recipe only", hint="see geomerge.merge_state_dicts")
            measured = _measured(names, inputs, tile=tile)  # type: ignore[arg-type]
        if method.surveys:
            method = _surveyed(method, names, inputs, seed=seed, dtype=dtype, tile=tile)  # type: ignore[arg-type]
        merged: dict[Any, Tensor] = {}
        for name in names:
            tensors: list[Tensor] = [m[name] for m in inputs]
            if not tensors[0].is_floating_point():
                merged[name] = tensors[0].clone()
                continue
            mine = replace(method, known=method.known_of(method.known, str(name))) if method.surveys else method
            merged[name] = merge_tensors(mine, tensors, str(name), measured, seed=seed, dtype=dtype, tile=tile)
        return merged

    def _inputs(self, given: Sequence[Weights | Sequence[Weights]], base: Weights | None) -> tuple[list[Weights], int]:
        use = self.method.base_use
        shape = "base, [models]" if use == "required" else "[models]"
        flat = list(given)
        if use == "required" and len(flat) == 2 and base is None:
            base = flat.pop(0)  # type: ignore[assignment]
        if len(flat) != 1 or isinstance(flat[0], torch.Tensor | Mapping) or (use == "required" and base is None):
            raise UsageError(f"call {self.method.name}({shape}, …)")
        if not isinstance(flat[0], Iterable):
            raise UsageError(f"call {self.method.name}({shape}, …), with a list, not {type(flat[0]).__name__}")
        models: list[Weights] = list(flat[0])
        for each in ([] if base is None else [base]) + models:
            if not isinstance(each, torch.Tensor | Mapping):
                hint = "torch.from_numpy makes tensors of arrays, module.state_dict() gives those of a module"
                raise UsageError(f"a model is a tensor or a mapping of tensors, not {type(each).__name__}", hint=hint)
            if isinstance(each, torch.Tensor) and not each.is_floating_point():
                raise UsageError(f"tensors of {each.dtype} are not merged", hint="convert them, if they are weights")
        if use == "ignored" and base is not None:
            raise UsageError(f"{self.method.name} knows no base; list all models alike")
        return ([base, *models] if base is not None else models), len(models)


def _surveyed(
    method: Method,
    names: Sequence[Any],
    inputs: Sequence[Mapping[Any, Tensor]],
    *,
    seed: int,
    dtype: torch.dtype | None,
    tile: int,
) -> Method:
    """The method with what it has to know of all tensors together."""
    scans, mine, methods = [], [], []
    for name in names:
        tensors = [m[name] for m in inputs]
        if not tensors[0].is_floating_point():
            continue
        here = method
        if isinstance(method, Matrix) and not merges_whole(method, tuple(tensors[0].shape)):
            if not method.surveys_rest:
                continue
            here = replace(method, matrix=False)
        mine.append(name)
        methods.append(here)
        out, open_scan = _opened(tensors, str(name), seed=seed, dtype=dtype, tile=tile)
        scans.append(functools.partial(survey_scan, method, open_scan, tuple(tensors[0].shape), 1.0, from_torch(out)))
    numel = sum(inputs[0][name].numel() for name in mine)
    walk = Walk(scans, [str(name) for name in mine], numel, len(inputs) - 1, methods=methods)
    return replace(method, known=method.survey(walk))


def _measured(names: Sequence[Any], inputs: Sequence[Mapping[Any, Tensor]], *, tile: int) -> Gram:
    """The Gram matrix of whole models."""
    floating = [name for name in names if inputs[0][name].is_floating_point()]
    opened = [_opened([m[name] for m in inputs], str(name), seed=0, dtype=None, tile=tile) for name in floating]
    return together([measure_gram(open_scan) for _, open_scan in opened])


def merge_tensors(
    method: Method,
    tensors: Sequence[Tensor],
    name: str = "tensor",
    measured: Gram | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tile: int = TILE,
) -> Tensor:
    """Merge tensors of one shape, base first where the method has one; arguments as of `Function`, and what was measured."""
    shape = tuple(tensors[0].shape)
    dtype, open_scan = _opened(tensors, name, seed=seed, dtype=dtype, tile=tile)
    out = torch.empty(shape, dtype=dtype, device=tensors[0].device)
    flat = out.view(-1)
    prepared = prepare(method, open_scan, shape, dtype=from_torch(dtype), measured=measured)
    for segment in prepared.scan.segments:
        for start, values in prepared.tiles(segment):
            flat[start : start + values.numel()] = values
    if not bool(torch.isfinite(flat).all()):
        raise out_of_range(name, from_torch(dtype))
    return out


def _opened(
    tensors: Sequence[Tensor], name: str, *, seed: int, dtype: torch.dtype | None, tile: int
) -> tuple[torch.dtype, Open]:
    """The result's dtype, and what opens scans of the tensors.

    Raises:
        UsageError: One has no elements that lie in memory.
        IncompatibleModels: Their shapes differ.
    """
    shape = tuple(tensors[0].shape)
    for i, t in enumerate(tensors):
        if t.is_meta or t.layout is not torch.strided:
            kind = "on the meta device, without values" if t.is_meta else f"of layout {t.layout}"
            hint = "load the weights first" if t.is_meta else "to_dense() makes one that is merged"
            raise UsageError(f"{name} of model {i} is {kind}", hint=hint)
    for t in tensors[1:]:
        if tuple(t.shape) != shape:
            raise IncompatibleModels(f"the shapes of {name} differ: {list(shape)} and {list(t.shape)}")
    if dtype is None:
        dtype = tensors[0].dtype
        for t in tensors[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
    sources = [TensorSource(t, f"model {i}: {name}") for i, t in enumerate(tensors)]

    def open_scan(**tiling: Any) -> Scan:
        # A level of its own: a matrix method may call a function while its caller waits with a half-filled tile.
        return Scan(sources, shape, name=name, seed=seed, tile=tile, device=tensors[0].device, level=-1, **tiling)

    return dtype, open_scan
