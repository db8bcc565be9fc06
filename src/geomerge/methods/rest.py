"""What a matrix method does with tensors that are no weight matrices: a weighted sum of their task vectors.

A method that knows no base averages the models.
"""

from __future__ import annotations

from typing import TypeGuard

from geomerge.methods import registry
from geomerge.methods.base import Matrix, Method


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of that shape can be a weight matrix."""
    return len(shape) == 2 and 0 not in shape


def merges_whole(method: object, shape: tuple[int, ...]) -> TypeGuard[Matrix]:
    """Whether a tensor of that shape is a weight matrix to a matrix method, and no tensor that its rest rule is for."""
    return isinstance(method, Matrix) and method.matrix is not False and is_matrix(shape)


def rest_method(method: Matrix, count: int) -> Method:
    """The span method that stands in for a matrix method; `count` as in `Method.make`."""
    if method.base_use == "ignored":
        return registry.get("linear").make({"weight": 1.0}, count=count)
    return registry.get("task_arithmetic").make({"weight": method.rest_weights(count)}, count=count)
