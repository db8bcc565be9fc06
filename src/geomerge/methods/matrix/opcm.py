"""OPCM's projection: what of a new task vector is added to the sum of the earlier ones.

Tang et al. 2025, Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging,
arXiv:2501.09522. The method is sequential and needs norms over whole models, so it is no method of a recipe:
`geomerge continue` (`geomerge.continual`) runs it, for one expert or for several in their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def cleaned(total: Tensor, delta: Tensor, alpha: float, *, zero_diagonal: bool = True) -> Tensor:
    """The task vector without what the sum has in its leading directions: τ − Σ_{i,j<r or i=j} ⟨u_i, τv_j⟩ u_iv_jᵀ.

    With S = UΣVᵀ, r is the number of directions whose singular values make up no more than the share α of their sum: the
    block that τ has in these r goes, and so does its whole diagonal, which makes τ orthogonal to S. The paper's formula keeps
    only what lies outside of both leading subspaces; its code, which this follows, keeps what couples them to the rest. (The
    paper's repository clears the diagonal of a copy, so that it stays: `zero_diagonal` false. Later versions clear it.)
    Directions of singular value zero do not count: which ones they are, rounding decides.

    Args:
        total: S, the sum so far, shape ``(rows, columns)``.
        delta: τ, the new task vector.
        alpha: From 0 to 1; from 1 on no block is removed.
        zero_diagonal: Remove the diagonal.
    """
    # In full: the diagonal tells nearly equal singular values apart, where a Gram matrix was off by 4·10⁻⁴.
    u, sigma, vt = torch.linalg.svd(total, full_matrices=False)
    rank = int((sigma > torch.finfo(sigma.dtype).eps * max(total.shape) * sigma[0]).sum())
    u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
    if not rank:
        return delta.clone()
    r = 0
    if alpha < 1:
        # The first direction with which the share exceeds α is not one of them.
        share = sigma.cumsum(0) / sigma.sum()
        r = int((share > alpha).int().argmax())
    coupled = u.T @ delta @ vt.T
    removed = torch.zeros_like(coupled)
    removed[:r, :r] = coupled[:r, :r]
    if zero_diagonal:
        removed.diagonal().copy_(coupled.diagonal())
    return torch.addmm(delta, u @ removed, vt, alpha=-1)
