"""OptMerge: WUDI against task vectors that were stripped of their redundant directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from geomerge.methods.base import Matrix, parameter
from geomerge.methods.eigen import eigh, gram
from geomerge.methods.matrix.quadratic import Quadratic, norms
from geomerge.methods.properties import BASE, PERMUTATION, SIGN, SINGLE
from geomerge.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True)
class Optmerge(Matrix):
    """Minimise WUDI's interference with low-rank targets, seen through each task's leading right singular vectors.

    With k = ⌊min(m, n)/T⌋, at least 1, and L_t = S_kV_kᵀ of τ_t, the objective is Σ_t ‖(θ − a_t)L_tᵀ‖²/‖τ_t‖².
    *Full* fine-tunes: a_t is the mean task vector plus the rank-k part of what τ_t adds to it; 300 steps of Adam (lr 10⁻⁵)
    from the sum of task vectors. The paper gave the result λ = 0.1 in a 1B model. As in `wudi`, lr must suit the size of the
    task vectors.
    *LoRA* fine-tunes: a_t is the rank-k part of τ_t; 300 steps of gradient descent (lr 10⁻⁴, momentum 0.9) from the mean task
    vector. This mode scales and rotates with the task vectors, and identical experts come back as they are.
    *Modality*, for experts of different inputs (image, sound, video): as LoRA, with steps of 0.05, k = ⌊min(m, n)/5⌋ whatever
    the number of experts, and all of τ_t as L_t.
    With `closed_form` the steps go on for ever: the minimiser that lies closest to the start.
    """

    name: ClassVar[str] = "optmerge"
    aliases: ClassVar[tuple[str, ...]] = ("wudi2",)
    title: ClassVar[str] = "OptMerge (WUDI v2)"
    paper: ClassVar[str] = (
        "Wei et al. 2026, Unifying Multimodal LLM Capabilities and Modalities via Model Merging, arXiv:2505.19892"
    )
    formula: ClassVar[str] = (
        "θ = θ₀ + λ·argmin_τ Σ_t ‖(τ − a_t)L_tᵀ‖²_F / ‖τ_t‖²_F,  L_t = S_kV_kᵀ of τ_t, stopped early"
    )
    when: ClassVar[str] = (
        "Capabilities of multimodal or language models from experts of one base. Say which kind of fine-tunes they are: `mode`."
    )
    properties: ClassVar[frozenset[str]] = frozenset({PERMUTATION, BASE, SINGLE, SIGN})
    example: ClassVar[str] = """\
merge_method: optmerge
base_model: ./base
models: [{model: ./base+./charts-lora}, {model: ./base+./ocr-lora}]
parameters: {mode: lora}
dtype: bfloat16
"""

    rest: str = parameter(
        "base",
        choices=("mean", "sum", "base", "scaled_sum"),
        doc="what becomes of tensors that are no weight matrices (norms, biases, embeddings, heads)",
    )
    mode: str = parameter(
        "full",
        choices=("full", "lora", "modality"),
        doc="how the experts were trained: all weights, or LoRA; or that they have different inputs",
    )
    lr: float | None = parameter(
        None, within=(0, math.inf), doc="step size; by default 1e-5 (full), 1e-4 (lora) or 0.05 (modality)"
    )
    steps: int = parameter(300, within=(0, 100_000), doc="steps of Adam (full) or of descent with momentum")
    full_weights: bool = parameter(
        False, doc="take whole checkpoints with mode lora, such as those that adapters were merged into"
    )
    closed_form: bool = parameter(False, doc="the minimiser closest to the start, instead of steps towards it")

    @property
    def adapters_only(self) -> bool:
        return self.mode == "lora" and not self.full_weights

    def merge(self, deltas: Tensor) -> Tensor:
        full = self.mode == "full"
        start = deltas.sum(0) if full else deltas.mean(0)
        modality = self.mode == "modality"
        k = max(1, min(deltas.shape[1:]) // (5 if modality else len(deltas)))
        mean = deltas.mean(0)
        size = norms(deltas)
        targets, probes = [], []
        for delta, norm in zip(deltas, size, strict=True):
            if norm > 0:
                part, probe = _leading(delta, k)
                targets.append(mean + _leading(delta - mean, k)[0] if full else part)
                probes.append((delta if modality else probe) / norm)
        if not targets:
            return start
        objective = Quadratic(
            torch.stack(targets),
            torch.stack(probes),
            factored=2 * probes[0].shape[0] * len(targets) < deltas.shape[2],
        )
        if self.closed_form:
            return objective.nearest(start)
        if full:
            return objective.adam(start, 1e-5 if self.lr is None else self.lr, self.steps)
        return objective.momentum(start, (0.05 if modality else 1e-4) if self.lr is None else self.lr, self.steps)


def _leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rank-k part U_kS_kV_kᵀ of a matrix, and the probe S_kV_kᵀ (up to a rotation of its rows, which no product with its
    transpose shows): shapes ``(m, n)`` and ``(k, n)``.

    The singular vectors of the shorter side are eigenvectors of a small matrix, several times cheaper than a singular value
    decomposition. Singular values below 10⁻⁸ of the largest are lost to it; they weigh as little in both results.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        u = eigh(gram(matrix, upper=True), k)[1]
        probe = u.T @ matrix
        return u @ probe, probe
    values, v = eigh(gram(matrix.T, upper=True), k)
    return matrix @ v @ v.T, values.clamp(min=0.0).sqrt().unsqueeze(1) * v.T
