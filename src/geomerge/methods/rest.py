"""What a matrix method does with tensors that are no weight matrices: a sum of their task vectors.

| rule | the task vector of the output, times λ |
|---|---|
| mean | Σ τₜ / T |
| sum | Σ τₜ |
| scaled_sum | Σ τₜ / √T: as long as one task vector, when they are orthogonal and equally long |
| base | 0: the base is kept |

A method that knows no base averages the models.
"""

from __future__ import annotations

import math

from geomerge.methods import registry
from geomerge.methods.base import Matrix, Method


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of that shape can be a weight matrix."""
    return len(shape) == 2 and 0 not in shape


def rest_method(method: Matrix, count: int) -> Method:
    """The span method that stands in for a matrix method; `count` as in `Method.make`."""
    if method.base_use == "ignored":
        return registry.get("linear").make({"weight": 1.0}, count=count)
    weight = {"mean": 1 / count, "sum": 1.0, "scaled_sum": 1 / math.sqrt(count), "base": 0.0}[method.rest]
    return registry.get("task_arithmetic").make({"weight": weight, "lambda": method.lambda_}, count=count)
