"""The optimisation-based methods once more: slow, in float64, written from the formulas with NumPy alone.

`taus` are task vectors of one weight, shape ``(T, rows, columns)``. Nothing is precomputed, factored or shared with the
package: gradients are sums over tasks in every step, spectra are those of the whole C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def adam(theta: Array, gradient: Callable[[Array], Array], lr: float, steps: int) -> Array:
    """Algorithm 1 of Kingma and Ba."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, steps + 1):
        g = gradient(theta)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        theta = theta - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return theta


def wudi_loss(theta: Array, taus: Sequence[Array]) -> float:
    """Σ_t ‖(θ − τ_t)τ_tᵀ‖² / ‖τ_t‖²."""
    return float(sum(np.sum(((theta - v) @ v.T) ** 2) / np.sum(v * v) for v in taus if v.any()))


def wudi(taus: Sequence[Array], lr: float = 1e-5, steps: int = 300) -> Array:
    """Adam on the loss from the sum."""

    def gradient(theta: Array) -> Array:
        return np.asarray(sum(2 * (theta - v) @ v.T @ v / np.sum(v * v) for v in taus if v.any()))

    return adam(np.sum(taus, 0), gradient, lr, steps)


def spectral(taus: Sequence[Array], f: Callable[[Array], Array], start: Array | None = None) -> Array:
    """θ − θVfVᵀ + DV(f/λ̃)Vᵀ with λ̃ = max(λ, 10⁻⁸) and f a function of all λ̃, largest first."""
    c = sum(v.T @ v / np.sum(v * v) for v in taus)
    d = sum(v @ v.T @ v / np.sum(v * v) for v in taus)
    values, vectors = np.linalg.eigh(c)
    values, vectors = np.maximum(values[::-1], 1e-8), vectors[:, ::-1]
    theta = np.sum(taus, 0) if start is None else start
    share = f(values)
    return np.asarray(
        theta - theta @ vectors @ np.diag(share) @ vectors.T + d @ vectors @ np.diag(share / values) @ vectors.T
    )


def rank_k(matrix: Array, k: int) -> tuple[Array, Array]:
    """U_kS_kV_kᵀ and S_kV_kᵀ."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :k] * s[:k] @ vt[:k], s[:k, None] * vt[:k]


def optmerge(taus: Sequence[Array], mode: str, steps: int = 300) -> Array:
    """All variants, step by step."""
    mean, k = np.mean(taus, 0), max(1, min(taus[0].shape) // (5 if mode == "modality" else len(taus)))
    targets = [rank_k(v - mean, k)[0] + mean if mode == "full" else rank_k(v, k)[0] for v in taus]
    probes = [v if mode == "modality" else rank_k(v, k)[1] for v in taus]

    def gradient(theta: Array) -> Array:
        terms = zip(taus, targets, probes, strict=True)
        return np.asarray(sum(2 * (theta - a) @ p.T @ p / np.sum(v * v) for v, a, p in terms))

    if mode == "full":
        return adam(np.sum(taus, 0), gradient, 1e-5, steps)
    theta, momentum = mean, np.zeros_like(mean)
    for _ in range(steps):
        momentum = 0.9 * momentum + gradient(theta)
        theta = theta - (0.05 if mode == "modality" else 1e-4) * momentum
    return theta


def doge_shift(taus: Sequence[Array], eta: float = 0.07, subspace: int = 6, steps: int = 400) -> tuple[Array, Array]:
    """Δ and the projector PΔ ought to be free of."""
    r, m = min(taus[0].shape), taus[0].shape[0]
    lam = [eta / np.linalg.norm(v) for v in taus]
    wide = np.zeros((m, r))
    each = r // len(taus)
    for t, v in enumerate(taus):
        wide[:, t * each : (t + 1) * each] = np.linalg.svd(v, full_matrices=False)[0][:, :each]
    q = np.linalg.svd(wide, full_matrices=False)[0][:, : r // subspace]

    def gradient(delta: Array) -> Array:
        slope = np.zeros_like(delta)
        merged = sum(a * v for a, v in zip(lam, taus, strict=True)) + sum(lam) * delta
        for v in taus:
            for i in range(m):
                slope[i] -= 2 * sum(lam) * np.dot(v[i], v[i] - merged[i]) * v[i]
        return np.asarray(slope - q @ (q.T @ slope))

    return adam(np.zeros_like(taus[0]), gradient, 1e-4, steps), q @ q.T


def doge(taus: Sequence[Array], density: float = 0.3, steps: int = 400) -> Array:
    """Σ λ_t(τ_t + Δ)⊙mask_t."""
    delta, _ = doge_shift(taus, steps=steps)
    total = np.zeros_like(delta)
    for v in taus:
        least = np.sort(np.abs(v).ravel())[v.size - int(density * v.size) - 1]
        total += 0.07 / np.linalg.norm(v) * (v + delta) * (np.abs(v) >= least)
    return total


def widen(base: Array, experts: Sequence[Array], t: float = 1.0, s: float = 1.0, rows: bool = False) -> Array:
    """Column by column (of the transpose, for `rows`); anything but a matrix element by element."""
    taus = [x - base for x in experts]
    if base.ndim != 2:
        sizes = np.array([np.abs(v) for v in taus])
        scores = np.exp(sizes) / np.exp(sizes).sum(0)
        means = [np.mean(size) if size.size else 0.0 for size in sizes]
        scores = [np.where(size > t * m, s, score) for score, size, m in zip(scores, sizes, means, strict=True)]
        return np.asarray(base + sum(score * v for score, v in zip(scores, taus, strict=True)))
    if rows:
        return widen(base.T, [x.T for x in experts], t, s).T
    n = base.shape[1]
    weights = np.zeros((len(experts), n))
    for change in (_magnitude, _direction):
        ranks = np.zeros((len(experts), n))
        for k, x in enumerate(experts):
            values = [change(base[:, j], x[:, j]) for j in range(n)]
            for rank, j in enumerate(sorted(range(n), key=lambda j: values[j])):
                ranks[k, j] = rank
        scores = np.exp(ranks / n) / np.exp(ranks / n).sum(0)
        scores[2 * ranks > t * (n - 1)] = s
        weights += scores / 2
    return np.asarray(base + sum(w * v for w, v in zip(weights, taus, strict=True)))


def _magnitude(a: Array, b: Array) -> float:
    return float(abs(np.linalg.norm(b) - np.linalg.norm(a)))


def _direction(a: Array, b: Array) -> float:
    """1 − cos, from 2 sin²(φ/2) = ‖a/‖a‖ − b/‖b‖‖²/2."""
    if not a.any() or not b.any():
        return 0.0
    return float(np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2) / 2)
