"""Every merge method once more: slow, in float64, written from the formulas with NumPy alone.

Nothing here knows of tiles, Gram matrices or brackets, and nothing is shared with the package, so that an error would have
to be made twice to go unseen. Arrays are float64 of any shape; `experts` are the models beside the base. Random methods
take the masks that were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def round_once(values: Array, dtype: str) -> Array:
    """To the nearest value of ``float32``, ``bfloat16`` or ``float16`` (ties to even) without a rounding in between."""
    bits, smallest = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}[dtype]
    _, exponent = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponent - bits, smallest))
    return np.rint(values / step) * step


def ulp(values: Array, dtype: str) -> Array:
    """The distance of neighbouring numbers of a dtype at the given values."""
    bits, smallest = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}[dtype]
    exponent = np.where(values == 0, smallest, np.frexp(values)[1])
    return np.ldexp(1.0, np.maximum(exponent - bits, smallest))


# Linear combinations


def linear(models: Sequence[Array], weight: Sequence[float], normalize: bool = True) -> Array:
    """Σ wᵢθᵢ / Σ wᵢ."""
    total = sum(w * m for w, m in zip(weight, models, strict=True))
    return np.asarray(total / sum(weight) if normalize else total)


def task_arithmetic(base: Array, experts: Sequence[Array], weight: Sequence[float], lambda_: float = 1.0) -> Array:
    """θ₀ + λ Σ wₖτₖ."""
    return base + lambda_ * sum(w * (x - base) for w, x in zip(weight, experts, strict=True))


def slerp(a: Array, b: Array, t: float) -> Array:
    """sin((1−t)φ)/sin φ·a + sin(tφ)/sin φ·b; a straight line for vectors that are zero or parallel."""
    length = np.linalg.norm(a.ravel()), np.linalg.norm(b.ravel())
    if min(length) == 0:
        return (1 - t) * a + t * b
    x, y = a.ravel() / length[0], b.ravel() / length[1]
    # ‖x − y‖ = 2 sin(φ/2): the angle of close vectors, which arccos of their product would lose.
    phi = 2 * np.arcsin(min(np.linalg.norm(x - y) / 2, 1.0))
    if np.sin(phi) < 1e-9 or phi > np.pi - 1e-3:
        return (1 - t) * a + t * b
    return np.asarray(np.sin((1 - t) * phi) / np.sin(phi) * a + np.sin(t * phi) / np.sin(phi) * b)


def slerp_norm(a: Array, b: Array, t: float, norm: str) -> Array:
    """SLERP of the two directions, at the geometric or the linear mean of the lengths."""
    n, m = np.linalg.norm(a.ravel()), np.linalg.norm(b.ravel())
    length = n ** (1 - t) * m**t if norm == "geo" else (1 - t) * n + t * m
    return slerp(a / n, b / m, t) * length


def sphere_mean(models: Sequence[Array], weights: Sequence[float]) -> Array:
    """The unit vector with the least weighted sum of squared angles to the models, by small steps in the full space."""
    units = [(x / np.linalg.norm(x.ravel())).ravel() for x in models]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(3000):
        step = np.zeros_like(mean)
        for w, u in zip(weights, units, strict=True):
            side = u - (u @ mean) * mean
            length = np.linalg.norm(side)
            if length > 1e-15:
                step += w * np.arctan2(length, u @ mean) * side / length
        mean = mean + 0.3 * step
        mean /= np.linalg.norm(mean)
    return np.asarray(mean.reshape(models[0].shape))


def nuslerp(models: Sequence[Array], weight: Sequence[float], base: Array | None = None, axis: str = "tensor") -> Array:
    """Slerp at w₂/(w₁+w₂), of task vectors if there is a base; `axis` ``row`` or ``column``: slice by slice."""
    origin = np.zeros_like(models[0]) if base is None else base
    a, b = (m - origin for m in models)
    t = weight[1] / sum(weight) if abs(sum(weight)) >= 1e-6 else 0.5
    if axis == "tensor" or a.ndim < 2 or a.size == 0:
        return origin + slerp(a, b, t)
    if axis == "row":
        rows = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1]), strict=True)
        return origin + np.stack([slerp(x, y, t) for x, y in rows]).reshape(a.shape)
    columns = zip(a.reshape(len(a), -1).T, b.reshape(len(a), -1).T, strict=True)
    return origin + np.stack([slerp(x, y, t) for x, y in columns], 1).reshape(a.shape)


def multislerp(models: Sequence[Array], weight: Sequence[float], base: Array | None = None, eps: float = 1e-8) -> Array:
    """The barycentre as mergekit writes it: a step along the tangents at the mean direction."""
    origin = np.zeros_like(models[0]) if base is None else base
    vectors = [m - origin for m in models]
    w = np.array(weight) / sum(weight)
    norms = np.array([np.linalg.norm(v.ravel()) for v in vectors])
    units = [v / (n + eps) for v, n in zip(vectors, norms, strict=True)]
    mean = sum(x * u for x, u in zip(w, units, strict=True))
    mean = mean / np.linalg.norm(np.ravel(mean))
    tangents = [u - np.vdot(u, mean) * mean for u in units]
    step = sum(x * v for x, v in zip(w, tangents, strict=True))
    length = np.linalg.norm(np.ravel(step))
    direction = mean if length < eps else mean * np.cos(length) + np.sin(length) * step / length
    return origin + direction * float(w @ norms)


def karcher(models: Sequence[Array], max_iter: int = 10, tol: float = 1e-5) -> Array:
    """Gradient descent on the sphere itself, in full-sized vectors."""
    norms = [float(np.linalg.norm(m.ravel())) for m in models]
    units = [m / n for m, n in zip(models, norms, strict=True) if n > tol]
    if not units:
        return np.asarray(sum(models) / len(models))
    u = sum(units) / len(units)
    u = u / np.linalg.norm(np.ravel(u)) if np.linalg.norm(np.ravel(u)) > 0 else units[0]
    for _ in range(max_iter):
        step = np.zeros_like(u)
        for x in units:
            cosine = np.clip(np.vdot(u, x), -1, 1)
            theta = np.arccos(cosine)
            if theta >= tol:
                step += theta / np.sin(theta) * (x - cosine * u) / len(units)
        length = np.linalg.norm(step.ravel())
        if length < tol:
            break
        u = np.cos(length) * u + np.sin(length) * step / length
        u = u / np.linalg.norm(u.ravel())
    return np.asarray(u * np.mean(norms))


def model_stock(base: Array, experts: Sequence[Array], filter_wise: bool = False, clamp_negative: bool = True) -> Array:
    """θ₀ + s·(mean θₖ − θ₀) with s = K c/(1 + (K−1) c)."""
    if filter_wise and base.ndim > 1 and base.size:
        rows = [np.reshape(m, (len(base), -1)) for m in (base, *experts)]
        out = [model_stock(r[0], r[1:], clamp_negative=clamp_negative) for r in zip(*rows, strict=True)]
        return np.reshape(out, base.shape)
    taus = [np.ravel(x - base) for x in experts]
    k = len(taus)
    cosines = []
    for i in range(k):
        for j in range(i + 1, k):
            size = np.linalg.norm(taus[i]) * np.linalg.norm(taus[j])
            cosines.append(np.clip(taus[i] @ taus[j] / size, -1, 1) if size > 0 else 0.0)
    c = np.mean(cosines)
    c = max(c, 0.0) if clamp_negative else c
    s = k * c / (1 + (k - 1) * c)
    return np.asarray(base + s * (sum(experts) / k - base))


# Thinning of task vectors


def top(values: Array, k: int) -> Array:
    """1 for the k largest magnitudes, the lowest index among equals, else 0."""
    order = np.argsort(-np.abs(values.ravel()), kind="stable")
    mask = np.zeros(values.size)
    mask[order[:k]] = 1
    return mask.reshape(values.shape)


def magnitude(tau: Array, density: float) -> Array:
    """The ⌊density·n⌋ largest of a task vector, at least one."""
    return tau * top(tau, max(int(density * tau.size + 1e-9), 1))


def outliers(tau: Array, density: float, gamma: float) -> Array:
    """The ⌊density·n⌋ that follow the ⌊γ·n⌋ largest."""
    cut = int(gamma * tau.size + 1e-9)
    return tau * (top(tau, cut + int(density * tau.size + 1e-9)) - top(tau, cut))


def outliers_of_rows(tau: Array, density: float, gamma: float) -> Array:
    """The same in each slice along the last dimension; a single number stays as it is."""
    if not tau.ndim:
        return tau
    if tau.ndim < 2 or not tau.size:
        return outliers(tau, density, gamma)
    return np.array([outliers(row, density, gamma) for row in tau.reshape(-1, tau.shape[-1])]).reshape(tau.shape)


def keep_probability(tau: Array, density: float, epsilon: float) -> Array:
    """density − ε + 2ε·rank/(n−1), ranks ascending in |τ| along the last dimension."""
    if tau.ndim == 0 or tau.shape[-1] <= 1:
        return np.full(tau.shape, density)
    ranks = np.argsort(np.argsort(np.abs(tau), axis=-1, kind="stable"), axis=-1, kind="stable")
    return density - epsilon + 2 * epsilon * ranks / (tau.shape[-1] - 1)


# Combination of task vectors


def sign(values: Array) -> Array:
    """+1 for zero."""
    return np.where(values >= 0, 1.0, -1.0)


def combine(
    base: Array, taus: Sequence[Array], weight: Sequence[float], *, elect: bool, normalize: bool, lambda_: float = 1.0
) -> Array:
    """θ₀ + λ·Σ wτ over all, or over those that agree with the sign of Σ wτ; divided by the sum of those w if asked."""
    out = np.empty(base.size)
    for p, column in enumerate(np.stack([np.ravel(t) for t in taus], 1) if base.size else []):
        weighted = [w * x for w, x in zip(weight, column, strict=True)]
        elected = 1.0 if sum(weighted) >= 0 else -1.0
        part = [(w, x) for w, x in zip(weight, weighted, strict=True) if not elect or x * elected > 0]
        divisor = sum(w for w, _ in part) if normalize else 1.0
        out[p] = sum(x for _, x in part) / (divisor or 1.0)
    return base + lambda_ * out.reshape(base.shape)


def population_variance(values: Sequence[float]) -> float:
    """In fractions: equal variances must come out equal, and that of equal numbers zero."""
    exact = [Fraction(float(v)) for v in values]
    mean = sum(exact) / len(exact)
    return float(sum((v - mean) ** 2 for v in exact) / len(exact))


def sce(
    base: Array, experts: Sequence[Array], select_topk: float = 1.0, select_only_for_weights: bool = False
) -> Array:
    """Select by variance, weigh by energy, erase minority signs."""
    taus = [x - base for x in experts]
    variance = np.array([population_variance(column) for column in zip(*(np.ravel(t) for t in taus), strict=True)])
    count = int(select_topk * np.count_nonzero(variance) + 1e-9)
    mask = np.ones(base.shape) if select_topk >= 1 else top(variance.reshape(base.shape), count)
    energy = np.array([np.sum((t * mask) ** 2) for t in taus])
    w = energy / energy.sum() if energy.sum() > 0 else np.full(len(taus), 1 / len(taus))
    if not select_only_for_weights:
        taus = [t * mask for t in taus]
    elected = sign(np.asarray(sum(taus)))
    agree = [(t * elected > 0).astype(float) for t in taus]
    divisor = sum(c * m for c, m in zip(w, agree, strict=True))
    total = sum(c * t * m for c, t, m in zip(w, taus, agree, strict=True))
    return base + np.where(divisor > 0, total / np.where(divisor > 0, divisor, 1.0), 0.0)


# The rest


def nearswap(a: Array, b: Array, t: float) -> Array:
    """a + w(b − a) with w = min(1, t/max(|a − b|, 10⁻⁶))."""
    return a + np.minimum(1.0, t / np.maximum(np.abs(a - b), 1e-6)) * (b - a)


def arcee_fusion(a: Array, b: Array) -> Array:
    """b where |b − a|·KL(softmax b ‖ softmax a) reaches median + 1.5·IQR, else a."""

    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    if a.size == 0:
        return a
    x, y = (a.reshape(1), b.reshape(1)) if a.ndim == 0 else (a, b)
    p, q = softmax(y), softmax(x)
    importance = np.abs(y - x) * np.maximum((p * np.log(p / q)).sum(-1, keepdims=True), 0.0)
    ordered = np.sort(importance.ravel())
    lower, median, upper = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (upper - lower), y, x).reshape(a.shape)


def ram(base: Array, experts: Sequence[Array], epsilon: float = 1e-5, factors: Sequence[float] | None = None) -> Array:
    """The mean of the changes above ε over those that made one; what one expert alone changed times its factor."""
    taus = [np.where(np.abs(x - base) > epsilon, x - base, 0.0) for x in experts]
    number = sum((t != 0).astype(float) for t in taus)
    scaled = [
        np.where(number == 1, f * t, t) for f, t in zip(factors or [1.0] * len(taus), taus, strict=True)
    ]  # fmt: skip
    return np.asarray(base + sum(scaled) / np.maximum(number, 1))


def ramplus_tl(
    base: Array, experts: Sequence[Array], r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> Array:
    """RAM with factors 1 + r·clip(shared/unique, 0, α)."""
    active = [np.abs(x - base) > epsilon for x in experts]
    number = sum(a.astype(int) for a in active)
    factors = []
    for a in active:
        unique, shared = np.sum(a & (number == 1)), np.sum(a & (number > 1))
        factors.append(1 + r * float(np.clip(shared / max(unique, epsilon), 0, alpha)))
    return ram(base, experts, epsilon, factors)


def per_row(method: Callable[[Array], Array], matrix: Array) -> Array:
    """A method of vectors on each row."""
    return np.stack([method(row) for row in matrix])
