"""Which tensors of a model are weight matrices to the matrix methods, and what memory whole matrices take."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from geomerge.engine.plan import REST
from geomerge.methods import registry
from geomerge.methods.base import Matrix, Method
from geomerge.methods.rest import is_matrix, merges_whole, rest_method

if TYPE_CHECKING:
    from geomerge.anatomy import Part
    from geomerge.engine.plan import Node, Operand, Plan

_NO_MATRICES = frozenset({"embedding", "head", "norm"})

_TABLE = re.compile(
    r"(?:^|\.)(?:relative_attention_bias|relative_position_bias(?:_table)?|rel_pos(?:_[a-z]+)?|attention_biases|r_[a-z]+_bias"
    r"|rel_embeddings|pos_bias_[uv]|a_log|text_projection)(?:\.|$)"
)
"""2-D tensors that look up or modulate instead of multiplying a vector. CLIP's last projection stands with the heads, as in the
published code of TSV-Merge and Iso-C."""

ROOM = 8 << 30
"""Bytes that whole matrices may take in all. One tensor that needs more is made alone."""


def weighs(method: Matrix, part: Part, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a weight matrix to a method."""
    if method.matrix is not None:
        return method.matrix and is_matrix(shape)
    return is_weight(part, shape)


def is_weight(part: Part, shape: tuple[int, ...]) -> bool:
    """Whether a tensor multiplies a vector: of two dimensions, and neither embedding, head, norm nor table."""
    return is_matrix(shape) and part.role not in _NO_MATRICES and not _TABLE.search(part.name.lower())


def rest(method: Matrix, operands: list[Operand]) -> tuple[str, Method, list[Operand]]:
    """Rule, method and inputs of a tensor that is no weight matrix."""
    count = len(operands) - (method.base_use == "required")
    if method.base_use == "required" and method.rest == "base":
        return f"{REST}base", registry.get("passthrough").make({}, count=1), operands[:1]
    if method.surveys_rest:
        return f"{REST}{method.rest}", replace(method, matrix=False), operands
    return f"{REST}{method.rest}", rest_method(method, count), operands


def whole_matrices(plan: Plan, node: Node) -> int:
    """Bytes of the whole matrices that are in memory while a node is made: its own and those of the stages it reads."""
    found = 0
    if merges_whole(node.method, node.shape):
        count = len(node.operands)
        found = 8 * node.numel * (count + node.method.workspace(count))
    if is_matrix(node.shape) and any(step.whole for step in node.chain):
        found += 8 * node.numel * (len(node.operands) + 14)
    if all(o.node < 0 and o.rows < 0 for o in node.operands):
        return found
    return found + sum(whole_matrices(plan, plan.nodes[i]) for i in _stages(plan, node))


def _stages(plan: Plan, node: Node) -> set[int]:
    operands = [*node.operands, *(m for o in node.operands if o.rows >= 0 for m in plan.rows[o.rows].matrices if m)]
    return {o.node for o in operands if o.node >= 0}
