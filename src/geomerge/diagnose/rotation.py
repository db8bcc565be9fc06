"""Are two models the same up to a rotation of their hidden basis?

Angles between weights change when one model's residual basis is rotated. The inner products between the rows of a matrix that
reads from the residual stream do not: W → WQ leaves WWᵀ as it is, and row i is still neuron i. So the similarity of these
products (debiased linear CKA of the rows) is near 1 for a rotated fine-tune and near 0 for a model of another
initialisation, whose neurons do not correspond.

Token embeddings would be no evidence: models that learnt independently from the same texts have embeddings whose inner
products agree, because they follow the tokens' frequencies and meanings (measured on the lab's skills models: 0.87).
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from geomerge.diagnose.group import Group, group_of
from geomerge.diagnose.parents import Parents
from geomerge.engine.build import Builder
from geomerge.engine.plan import Node
from geomerge.methods.tile import elements

ROWS = 256
"""Rows of a matrix that are compared: a run from its middle."""

GROUPS = 8
"""Groups (a block's attention or MLP matrices) that are looked at, spread evenly."""

_LEAST = 8


def likeness(parents: Parents) -> dict[tuple[int, int], float]:
    """How alike the models are whatever their bases, for every pair (indices in `Parents.models`).

    Of each group the best of its matrices counts, because a rotation leaves the rows of those that write to the residual
    stream no more alike than chance; the result is the mean over the groups.

    Returns:
        Pair → likeness, about 0 for strangers and at most 1; empty when there are no matrices in blocks.
    """
    groups: dict[Group, list[Node]] = {}
    for node in parents.plan.nodes:
        part = parents.parts[node.name]
        if part.position == "block" and len(node.shape) == 2 and node.shape[0] >= _LEAST and part.role != "norm":
            groups.setdefault(group_of(part), []).append(node)
    chosen = (
        [list(groups)[i] for i in sorted({round(v) for v in np.linspace(0, len(groups) - 1, GROUPS)})] if groups else []
    )
    pairs = list(combinations(range(len(parents.models)), 2))
    found: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    builder = Builder(parents.plan, parents.inputs)
    for group in chosen:
        best = dict.fromkeys(pairs, -math.inf)
        for node in groups[group]:
            grams = _row_grams(parents, builder, node)
            for pair in pairs:
                value = debiased_cka(grams[pair[0]], grams[pair[1]])
                best[pair] = max(best[pair], value) if math.isfinite(value) else best[pair]
        for pair, value in best.items():
            found[pair] += [value] if math.isfinite(value) else []
    return {pair: math.fsum(values) / len(values) for pair, values in found.items() if values}


def _row_grams(parents: Parents, builder: Builder, node: Node) -> list[np.ndarray]:
    """Inner products of some rows of a matrix in each model."""
    rows, columns = node.shape
    count = min(ROWS, rows)
    start = (rows - count) // 2
    grams = []
    for operand in node.operands[0 if parents.base is None else 1 :]:
        values = elements(builder.source(operand, node), start * columns, count * columns).reshape(count, columns)
        grams.append(values @ values.T)
    return grams


def debiased_cka(k: np.ndarray, m: np.ndarray) -> float:
    """CKA from two Gram matrices of the same n samples, without the bias that few samples of many features have.

    Reference:
        Song et al. 2012, Feature selection via dependence maximization (the unbiased HSIC).
    """
    product = _hsic(k, k) * _hsic(m, m)
    return _hsic(k, m) / float(np.sqrt(product)) if product > 0 else math.nan


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    total = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
    return float(total / (n * (n - 3)))
