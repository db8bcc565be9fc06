"""KnOTS: adapters in a basis that they share, where elementwise merging finds like with like.

    [ΔW₁ … ΔW_T] = U·diag(σ)·[V₁ᵀ … V_Tᵀ],  Rₜ = diag(σ)·Vₜᵀ,  ΔW = U·merge(R₁ … R_T)

The SVD is that of a small matrix: with [B₁ … B_T] = Q·[C₁ … C_T] and Aₜᵀ = Pₜ·Sₜ it is the one of [C₁S₁ᵀ … C_TS_Tᵀ]. The
representations Rₜ of all layers are merged as one long vector, so TIES keeps the largest of the whole adapter. They are
held in memory, T times (rank × inputs) numbers a layer: about as many as the adapters' own A's.

Directions with σ ≤ 10⁻⁶·σ₁ are dropped. (The authors' code drops σ ≤ 10⁻⁵, so that an adapter times a small number would
lose directions that it has.)

Reference: Stoica et al. 2025, Model merging with SVD to tie the KnOTS, arXiv:2410.19735.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geomerge.adapter.low_rank import Factors
from geomerge.methods.base import Method
from geomerge.methods.kernel import prepare
from geomerge.methods.tile import Scan, TensorSource

CUTOFF = 1e-6
"""Singular values this much smaller than the largest carry nothing."""


@dataclass(frozen=True)
class Joint:
    """One layer in the basis that the adapters share.

    Attributes:
        basis: U, shape ``(rows, k)``.
        parts: R₁ … R_T, shape ``(T, k, columns)``.
    """

    basis: Tensor
    parts: Tensor


def joint(terms: Sequence[Factors]) -> Joint:
    """The representations of one layer's changes."""
    q, c = torch.linalg.qr(torch.cat([t.b for t in terms], 1))
    inner, small, at = [], [], 0
    for term in terms:
        p, s = torch.linalg.qr(term.a.T)
        small.append(c[:, at : at + term.rank] @ s.T)
        inner.append(p)
        at += term.rank
    u, sigma, vh = torch.linalg.svd(torch.cat(small, 1), full_matrices=False)
    k = max(int((sigma > CUTOFF * sigma[0]).sum()), 1)
    scaled = sigma[:k].unsqueeze(1) * vh[:k]
    parts, at = [], 0
    for p in inner:
        parts.append(scaled[:, at : at + p.shape[1]] @ p.T)
        at += p.shape[1]
    return Joint(q @ u[:, :k], torch.stack(parts))


def merge(layers: Sequence[Joint], method: Method, seed: int, *, based: bool) -> list[Factors]:
    """Merge the representations of all layers as one vector for each adapter.

    Args:
        layers: The layers in order.
        method: An elementwise method on task vectors, or one whose coefficients need no measuring.
        seed: Key of random draws.
        based: The method takes a base, which is zero here.
    """
    count = len(layers[0].parts)
    sizes = [each.parts[0].numel() for each in layers]
    vectors = torch.zeros(count + based, sum(sizes), dtype=torch.float64)
    at = 0
    for each, size in zip(layers, sizes, strict=True):
        vectors[based:, at : at + size] = each.parts.reshape(count, size)
        at += size
    shape = (vectors.shape[1],)
    sources = [TensorSource(v, f"adapter {i}") for i, v in enumerate(vectors)]

    def open_scan(**tiling: Any) -> Scan:
        return Scan(sources, shape, name="knots", seed=seed, **tiling)

    prepared = prepare(method, open_scan, shape)
    merged = torch.empty(shape, dtype=torch.float64)
    for segment in prepared.scan.segments:
        for start, values in prepared.tiles(segment):
            merged[start : start + values.numel()] = values
    parts = torch.split(merged, sizes)
    return [Factors(e.basis, p.view(e.parts[0].shape)) for e, p in zip(layers, parts, strict=True)]
