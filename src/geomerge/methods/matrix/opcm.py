"""OPCM: experts one after the other, of each what is orthogonal to the leading directions of the sum of the earlier ones.

`geomerge continue` (`geomerge.continual`) takes the same steps when the experts come one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import RESTS, Matrix, parameter
from geomerge.methods.linalg import one_thread
from geomerge.methods.properties import BASE, ROTATION, SCALE, SIGN, SINGLE
from geomerge.methods.registry import register
from geomerge.methods.rest import merges_whole
from geomerge.methods.tile import Scan, Tile, block_sums
from geomerge.methods.walk import Walk, whole

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.methods.base import Method


@register
@dataclass(frozen=True)
class Opcm(Matrix):
    """Add up the task vectors in the order of the models, each without what the sum has in its leading directions.

    The sum is then given the mean norm of the experts, over all tensors together: λ_T = ‖S‖ / mean ‖τₜ‖ (Tang et al. 2025).
    That takes all of S, so the weights are decomposed twice, for the norm and for the output; `geomerge continue`, which keeps
    S in a file, decomposes them once for each expert and gives the same model. Tensors that are no matrices are added up.
    """

    name: ClassVar[str] = "opcm"
    title: ClassVar[str] = "OPCM (orthogonal projection-based continual merging)"
    paper: ClassVar[str] = "Tang et al. 2025, Merging Models on the Fly Without Retraining, arXiv:2501.09522"
    formula: ClassVar[str] = (
        "θ = θ₀ + λ·S/λ_T,  S ← S + τₜ − Σ_{i,j<r or i=j} ⟨uᵢ, τₜvⱼ⟩ uᵢvⱼᵀ with S = UΣVᵀ,  λ_T = ‖S‖ / mean ‖τₜ‖"
    )
    when: ClassVar[str] = (
        "Experts that were trained one after the other, when the merge is to be as far from the base as they are. Their order "
        "matters a little. When they arrive one at a time, take `geomerge continue`; where all are there, try TSV-M and a WUDI "
        "method, too: of the lab's language and image experts these keep more, of its small networks less."
    )
    properties: ClassVar[frozenset[str]] = frozenset({BASE, SINGLE, SCALE, SIGN, ROTATION})
    surveys_rest: ClassVar[bool] = True
    example: ClassVar[str] = """\
merge_method: opcm
base_model: ./base
models: [{model: ./cars}, {model: ./signs}, {model: ./digits}]
parameters: {alpha: 0.5}
dtype: bfloat16
"""

    rest: str = parameter(
        "sum",
        choices=RESTS,
        doc="what tensors that are no weight matrices get of the task vectors, before they are divided",
    )
    alpha: float = parameter(
        0.5, within=(0, 1), doc="share of the singular values that the protected directions make up"
    )
    zero_diagonal: bool = parameter(True, doc="remove the diagonal, too (false: the paper's published numbers)")

    @property
    def factor(self) -> float:
        return self.lambda_ * (1.0 if self.known is None else self.known)

    def rest_weights(self, count: int) -> tuple[float, ...]:
        return tuple(w if self.known is None else w * self.known for w in super().rest_weights(count))

    @property
    def surveys(self) -> int:
        return 1

    @property
    def surveyed_alike(self) -> Hashable:
        return ()  # one norm for all tensors, whatever the parameters of each

    def survey(self, walk: Walk) -> float:
        """1/λ_T."""
        method_of = dict(zip(walk.names, walk.methods, strict=True))
        squares = [found for found in walk.over(lambda scan: _squares(method_of[scan.name], scan)) if found]
        *own, total = [math.sqrt(math.fsum(column)) for column in zip(*squares, strict=True)] or [0.0]
        return mean_norm(total, math.fsum(own), len(own))

    def merge(self, deltas: Tensor) -> Tensor:
        total = deltas[0].clone()
        for delta in deltas[1:]:
            total.add_(cleaned(total, delta, self.alpha, zero_diagonal=self.zero_diagonal))
        return total


def mean_norm(norm: float, norms: float, count: int) -> float:
    """What a sum of that norm is multiplied by for the mean norm of `count` task vectors; `norms` is the sum of theirs."""
    return norms / count / norm if norm > 0 and norms > 0 else 1.0


def _squares(method: Method, scan: Scan) -> list[float]:
    """‖τₜ‖² of one tensor for each expert, and ‖S‖²; nothing of a tensor without elements."""
    assert isinstance(method, Opcm)
    if not scan.numel:
        return []
    if merges_whole(method, scan.shape):
        deltas = whole(scan, based=True)
        own = [block_sums(delta.square()) for delta in deltas]
        with one_thread():
            total = method.merge(deltas.view(-1, *scan.shape)).reshape(-1)
        return [math.fsum(sums) for sums in (*own, block_sums(total.square_()))]
    weights = replace(method, lambda_=1.0, known=None).rest_weights(scan.experts)

    def quantities(tile: Tile) -> list[Tensor]:
        deltas = tile.task_vectors()
        total = deltas[0] * weights[0]
        for w, delta in zip(weights[1:], deltas[1:], strict=True):
            total.add_(delta, alpha=w)
        return [*(delta.square() for delta in deltas), total.square_()]

    return scan.sums(quantities)


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
    right = delta @ vt.T
    block = u[:, :r].T @ right[:, :r]
    if zero_diagonal:
        diagonal = torch.linalg.vecdot(u, right, dim=0)
        block.diagonal().sub_(diagonal[:r])
        delta = torch.addmm(delta, u * diagonal, vt, alpha=-1)
    return torch.addmm(delta, u[:, :r] @ block, vt[:r], alpha=-1)
