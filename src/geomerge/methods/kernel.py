"""From a method and a tensor's inputs to the output's tiles: the one piece of code that all executors share."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from geomerge.errors import RunError, UsageError
from geomerge.late import loaded
from geomerge.methods import gram, native, program
from geomerge.methods.base import Elementwise, Matrix, Method, Span
from geomerge.methods.combine import exactly, weighted_sum
from geomerge.methods.rest import merges_whole, rest_method
from geomerge.methods.tile import Loop, Place, Scan, Segment, Tile
from geomerge.methods.walk import Walk, whole

if TYPE_CHECKING:
    from torch import Tensor


_NARROW = ("BF16", "F16")

_UNDERFLOW = 1e-30
_SMALL = 1e-4
"""Of the largest squared norm: smaller ones are lost to the differences of float32's products."""

M = TypeVar("M", bound=Method)

Open = Callable[..., Scan]
"""Makes the scan of one output tensor, with the tiling that a method asks for as keyword arguments."""


@dataclass(frozen=True)
class Prepared:
    """A method bound to one tensor: its statistics are measured, its tiles can be blended in any order of segments.

    Attributes:
        scan: Gives the tiles.
        blend: From a tile of the inputs to the output's elements.
        coefficients: Of the inputs, for span methods with one for the whole tensor.
        begin: Called before the first tile of a segment is read: what it computes may use the thread's tile buffers.
        told: What the manifest shall say of the tensor; asked when all tiles are blended.
        fused: The compiled loop that does the same as reading a tile, `blend` and rounding to nearest, where there is one.
    """

    scan: Scan
    blend: Callable[[Tile], Tensor]
    coefficients: tuple[float, ...] | None = None
    begin: Callable[[], object] | None = None
    told: Callable[[], dict[str, Any]] = dict
    fused: Loop | None = None

    @property
    def copies(self) -> int | None:
        """The one input that the output equals bit for bit, if the coefficients say so."""
        c = self.coefficients
        if c is not None and self.scan.thinning is None and sum(x != 0.0 for x in c) == 1 and 1.0 in c:
            return c.index(1.0)
        return None

    def tiles(self, segment: Segment) -> Iterator[tuple[int, Tensor]]:
        """Start and float64 elements of the output's tiles; each is valid until the next is asked for."""
        if self.begin is not None:
            self.begin()
        for tile in self.scan.tiles(segment):
            yield tile.start, self.blend(tile).reshape(-1)

    def loop(self, dtype: str) -> Loop | None:
        """The compiled loop for this output, if it can do all that is asked."""
        return self.fused if self.fused is not None and self.scan.compiled and native.takes([dtype]) else None

    def at(self, place: Place) -> Tensor:
        """What a compiled loop left to `blend`: the elements of a place before they are rounded."""
        part = Segment(place.segment, place.start, place.start + place.numel)
        return self.blend(self.scan.tile_at(part, place.numel)).reshape(-1)


def prepare(
    method: Method,
    open_scan: Open,
    shape: tuple[int, ...],
    scale: float = 1.0,
    dtype: str | None = None,
    measured: gram.Gram | Tensor | None = None,
) -> Prepared:
    """Measure what a method needs of one tensor.

    Args:
        method: The method with its parameters.
        open_scan: Makes the scan.
        shape: The tensor's shape.
        scale: What a step after the method multiplies the merged task vector by: θ₀ + scale·(merge − θ₀).
        dtype: What the output will be rounded to: where that is a 16-bit format, float32 may do for the arithmetic.
        measured: What the caller knows already: the Gram matrix of the inputs, or what `merge_matrix` gave.
    """
    if isinstance(method, Matrix):
        if method.surveys_rest and method.known is None:
            method = _alone(method, open_scan())
        if merges_whole(method, shape):
            assert not isinstance(measured, gram.Gram)
            return _prepare_matrix(method, open_scan, shape, scale, measured)
        count = len(open_scan().sources) - (method.base_use == "required")
        method = rest_method(method, count)
    last = shape[-1] if len(shape) > 1 else max(_numel(shape), 1)
    if isinstance(method, Span):
        if method.rows and len(shape) > 1:
            length = last if method.axis == "row" else max(_numel(shape[1:]), 1)
            return Prepared(open_scan(columns=length), functools.partial(_blend_rows, method, scale))
        if method.axis == "column" and len(shape) > 1:
            scan = open_scan(columns=max(_numel(shape[1:]), 1))
            table = _scaled(np.asarray(method.coefficients(gram.measure(scan, "column"))), scale)
            columns = torch.from_numpy(np.ascontiguousarray(table.T)).to(scan.device)
            return Prepared(scan, functools.partial(_combine_columns, columns))
        scan = open_scan(check=not method.needs_gram)
        if method.needs_gram and not isinstance(measured, gram.Gram):
            measured = measure_gram(open_scan)
        try:
            if isinstance(measured, gram.Gram):
                coefficients = _coefficients(method, len(scan.sources), scale, measured)
            elif method.known is not None:  # which is no part of a method's equality
                coefficients = _coefficients(method, len(scan.sources), scale)
            else:
                coefficients = _unmeasured(method, len(scan.sources), scale)
        except UsageError as error:
            raise UsageError(error.what, where=scan.name, hint=error.hint) from None
        combine = _combine_differences if _cancels(coefficients) else _combine
        if scan.thinning is not None:
            combine = _combine_thinned
        elif not method.needs_gram and all(coefficients):
            # What is not finite in an input shows in the output: one look instead of one for each input.
            scan.look_later()
            combine = functools.partial(_looked_at, combine)
        plain = combine is not _combine_differences and scan.thinning is None and any(coefficients)
        summed = functools.partial(_fused_sum, coefficients) if plain else None
        return Prepared(scan, functools.partial(combine, coefficients), coefficients, fused=summed)
    if not isinstance(method, Elementwise):
        raise TypeError(f"{type(method).__name__} belongs to no family")
    scan = elementwise_scan(method, open_scan, shape, scale, dtype)
    if method.surveys and method.known is None:
        method = _alone(method, scan)
    stats = method.measure(scan)

    def blend(tile: Tile) -> Tensor:
        base = None if scale == 1.0 else tile.base.clone()
        found = method.blend(tile, stats)
        if loaded("torch") and isinstance(found, torch.Tensor) and found.numel() != tile.numel:
            raise UsageError(
                f"{method.name} made {found.numel()} elements of a tile of {tile.numel}",
                where=scan.name,
                hint="its `blend` has to return as many as the tile's base has",
            )
        return found if base is None else _rescale(base, found, scale)

    fused = method.compiled(scan, stats) if scale == 1.0 else None
    if fused is None and method.recorded and scan.compiled:
        fused = program.loop(scan, blend)
    return Prepared(scan, blend, fused=fused, told=functools.partial(method.tell, stats))


def _alone(method: M, scan: Scan) -> M:
    """The method with what it finds in one tensor: nobody looked at the whole model, so this is all there is."""
    walk = Walk([lambda: scan], [scan.name], scan.numel, scan.experts, methods=[method])
    return replace(method, known=method.survey(walk))


def columnwise(prepared: Prepared, factors: Tensor, stride: int) -> Prepared:
    """The same with each column of the merged task vector multiplied by a factor: θ₀ + f ⊙ (merge − θ₀).

    As such factors are diagonal, they and `scale` may follow each other in any order.

    Args:
        prepared: The method bound to a tensor whose tiles are float64.
        factors: fⱼ, float64.
        stride: Elements between one column's and the next one's (1: columns lie along the last dimension).
    """

    def blend(tile: Tile) -> Tensor:
        base = tile.base.clone().reshape(-1)
        merged = prepared.blend(tile).reshape(-1)
        place = torch.arange(tile.start, tile.start + tile.numel, device=base.device)
        return base.addcmul_(
            merged.sub_(base), factors[place.div_(stride, rounding_mode="floor").remainder_(len(factors))]
        )

    return replace(prepared, blend=blend, coefficients=None, fused=None)


def elementwise_scan(
    method: Elementwise, open_scan: Open, shape: tuple[int, ...], scale: float = 1.0, dtype: str | None = None
) -> Scan:
    """The scan on which an elementwise method measures and blends a tensor; arguments as in `prepare`."""
    last = shape[-1] if len(shape) > 1 else max(_numel(shape), 1)
    width = last if method.rows else None
    scan = open_scan(columns=width)
    if method.single and scale == 1.0 and dtype in _NARROW and _narrow(scan):
        return open_scan(columns=width, single=True)
    return scan


def survey_scan(
    method: Method, open_scan: Open, shape: tuple[int, ...], scale: float = 1.0, dtype: str | None = None
) -> Scan:
    """The scan on which a method's survey looks at a tensor; arguments as in `prepare`."""
    return elementwise_scan(method, open_scan, shape, scale, dtype) if isinstance(method, Elementwise) else open_scan()


def _prepare_matrix(
    method: Matrix, open_scan: Open, shape: tuple[int, ...], scale: float, measured: Tensor | None
) -> Prepared:
    """Tiles of the base, to which the merged matrix is added; that is computed once, when a first tile is asked for."""
    based = method.base_use == "required"
    factor = method.factor * scale if based else 1.0

    def compute() -> Tensor:
        made = merge_matrix(method, open_scan(), shape) if measured is None else measured
        return made if factor == 1.0 else made * factor

    merged = Once(compute)
    scan = open_scan(check=False)  # every element has been looked at by then
    del scan.sources[1:]
    scan.thinning = None

    def blend(tile: Tile) -> Tensor:
        piece = merged()[tile.start : tile.start + tile.numel]
        if based:
            return tile.base.add_(piece)
        return piece if scale == 1.0 else _rescale(tile.base, piece.clone(), scale)

    return Prepared(scan, blend, begin=merged)


def merge_matrix(method: Matrix, scan: Scan, shape: tuple[int, ...]) -> Tensor:
    """g(τ₁ … τ_T), flat and without the method's factor.

    Raises:
        NotFiniteError: An input holds NaN or Inf.
        RunError: The result does.
    """
    from geomerge.methods.linalg import one_thread

    based = method.base_use == "required"
    inputs = whole(scan, based=based)
    with one_thread():
        merged = method.merge(inputs.view(len(inputs), *shape))
    if merged.shape != shape:
        raise TypeError(f"{type(method).__name__}.merge returned {list(merged.shape)} for matrices of {list(shape)}")
    flat = merged.reshape(-1)
    if not math.isfinite(flat.sum().item()) and not bool(torch.isfinite(flat).all()):
        raise RunError(
            f"{method.name} gave numbers that are not finite", where=scan.name, hint="are the weights of ordinary size?"
        )
    return flat


class Once:
    """A matrix that is computed at most once, by whichever thread asks first."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._lock = threading.Lock()
        self._held: Tensor | None = None

    def __call__(self) -> Tensor:
        with self._lock:
            if self._held is None:
                self._held = self._compute()
            return self._held


def _narrow(scan: Scan) -> bool:
    """Whether float32 holds the differences of all inputs."""
    return not scan.exact and all(source.dtype in _NARROW for source in scan.sources)


def measure_gram(open_scan: Open) -> gram.Gram:
    """The Gram matrix of whole tensors, from float32 products for 16-bit inputs.

    Products are rounded to float32, added in fixed lanes within blocks and exactly between them: eight digits, where the
    coefficients of a merge need three. Inputs that are not finite show in the sums.
    """
    if _narrow(open_scan()):
        found = gram.measure(open_scan(single=True, check=False), "tensor")
        # Products of numbers below 10⁻¹⁹ are lost to float32, and the norm of an input that is small beside the first one.
        if np.isfinite(found.centred).all() and (np.diagonal(found.centred) > _UNDERFLOW).all():
            squares = [float(found.dot(i, i)) for i in range(found.count)]
            if min(squares) > _SMALL * max(squares):
                return found
    return gram.measure(open_scan(), "tensor")


def _coefficients(method: Span, count: int, scale: float, measured: gram.Gram | None = None) -> tuple[float, ...]:
    found = method.coefficients(measured or gram.Unmeasured(count))
    if isinstance(found, list) and scale == 1.0:
        return tuple(found)  # without NumPy, which few merges need
    return tuple(_scaled(np.asarray(found, dtype=np.float64), scale).tolist())


_unmeasured = functools.lru_cache(maxsize=256)(_coefficients)
"""The coefficients of methods that measure nothing: the same for all tensors with the same parameters."""


def _numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _scaled(coefficients: Any, scale: float) -> Any:
    """θ₀ + s·(Σ cᵢxᵢ − θ₀) is again a linear combination."""
    if scale == 1.0:
        return coefficients
    scaled = coefficients * scale
    scaled[..., 0] += 1.0 - scale
    return scaled


def _rescale(base: Tensor, merged: Tensor, scale: float) -> Tensor:
    return base.add_(merged.sub_(base), alpha=scale)


def _combine(coefficients: tuple[float, ...], tile: Tile) -> Tensor:
    """Σ cᵢ·xᵢ; inputs with coefficient 0 are left out, so that one coefficient 1 gives that input's very bits."""
    total: Tensor | None = None
    for c, x in zip(coefficients, tile.inputs, strict=True):
        if c == 0.0:
            continue
        if total is None:
            total = x if c == 1.0 else x.mul_(c)
        else:
            total.add_(x, alpha=c)
    return tile.inputs[0].zero_() if total is None else total


def _fused_sum(
    coefficients: tuple[float, ...], place: Place, out: native.Stored, beginning: native.Doubles | None
) -> bool:
    """`_combine` from the inputs as they are stored."""
    used = [i for i, c in enumerate(coefficients) if c != 0.0]
    # What is used shows in the sum when it is not finite.
    unused = [i for i, c in enumerate(coefficients) if c == 0.0] if place.scan.checks else []
    if unused and not native.finite(place.scan.stored(place.start, place.numel, unused)):
        return False
    inputs = place.scan.stored(place.start, place.numel, used)
    return native.span(inputs, [coefficients[i] for i in used], out, beginning)


def _looked_at(combine: Callable[..., Tensor], coefficients: tuple[float, ...], tile: Tile) -> Tensor:
    total = combine(coefficients, tile)
    if not math.isfinite(total.sum().item()):
        tile.scan.look_again(tile.start, tile.numel)
    return total


def _cancels(coefficients: tuple[float, ...]) -> bool:
    """Whether an affine combination has terms so large that their rounding errors would show in the output.

    Such are those of a task vector that is tiny but given a full share of the merged norm.
    """
    largest = max(abs(c) for c in coefficients)
    return largest > 1e6 and abs(sum(coefficients) - 1.0) < 1e-9 * largest


def _combine_differences(coefficients: tuple[float, ...], tile: Tile) -> Tensor:
    """θ₀ + Σ cᵢ·(xᵢ − θ₀), the same as `_combine` for coefficients of sum 1, without the cancellation."""
    for c, delta in zip(coefficients[1:], tile.task_vectors(), strict=True):
        tile.base.add_(delta, alpha=c)
    return tile.base


def _combine_thinned(coefficients: tuple[float, ...], tile: Tile) -> Tensor:
    """(Σ cᵢ)·θ₀ + Σ cᵢ·τ̂ᵢ, the same as `_combine` of the models that have these task vectors, without rounding them."""
    total = math.fsum(coefficients)
    if abs(total - 1.0) > 1e-12 * max(map(abs, coefficients)):
        tile.base.mul_(total)
    return weighted_sum(tile.base, tile.stack[1:], coefficients[1:], functools.partial(exactly, tile), 0.0)


def _combine_columns(columns: Tensor, tile: Tile) -> Tensor:
    total = tile.inputs[0].mul_(columns[0])
    for c, x in zip(columns[1:], tile.inputs[1:], strict=True):
        total.addcmul_(x, c)
    return total


def _blend_rows(method: Span, scale: float, tile: Tile) -> Tensor:
    rows = _scaled(np.asarray(method.coefficients(gram.of_rows(tile))), scale)
    return _combine_columns(torch.from_numpy(np.ascontiguousarray(rows.T)).to(tile.base.device).unsqueeze(-1), tile)
