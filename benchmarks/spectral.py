"""Spectral methods against the same mathematics with full singular value decompositions, as the published code does it.

    python benchmarks/spectral.py [ROWSxCOLUMNS …]      # by default 768x768 768x3072 2048x512 1536x1536

Both sides work on the same float64 task vectors on one thread; the best of two runs counts. A task vector is what fine-tunes
have: a spectrum that falls off slowly, and noise.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from geomerge.methods import registry

TASKS = 8
SHAPES = ((768, 768), (768, 3072), (2048, 512), (1536, 1536))


def task_vectors(rows: int, columns: int) -> Tensor:
    """Random task vectors with singular values like 1/√i over a floor of noise."""
    torch.manual_seed(rows * columns)
    rank = min(rows, columns) // 4
    strength = torch.arange(1, rank + 1, dtype=torch.float64) ** -0.5
    made = torch.randn(TASKS, rows, columns, dtype=torch.float64) * 0.1
    for delta in made:
        strong = torch.randn(rows, rank, dtype=torch.float64) * strength
        delta.add_(strong @ torch.randn(rank, columns, dtype=torch.float64))
    return made * 1e-4


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin decomposition."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def unit(matrix: Tensor) -> Tensor:
    """The polar factor."""
    u, _, vh = svd(matrix)
    return u @ vh


def tsvm(deltas: Tensor) -> Tensor:
    """TSV-Merge."""
    k = min(deltas.shape[1:]) // len(deltas)
    parts = [svd(delta) for delta in deltas]
    u = unit(torch.cat([p[0][:, :k] for p in parts], 1))
    vh = unit(torch.cat([p[2][:k] for p in parts]))
    return (u * torch.cat([p[1][:k] for p in parts])) @ vh


def iso_c(deltas: Tensor) -> Tensor:
    """Iso-C."""
    u, s, vh = svd(deltas.sum(0))
    return (u @ vh) * s.mean()


def iso_cts(deltas: Tensor) -> Tensor:
    """Iso-CTS."""
    short, tasks = min(deltas.shape[1:]), len(deltas)
    each = round((short - int(short * 0.8)) / tasks)
    c = short - each * tasks
    common = [x[:, :c] if i == 0 else x[:c] for i, x in enumerate(svd(deltas.sum(0)))]
    parts = [svd(delta - common[0] @ (common[0].T @ delta)) for delta in deltas]
    u = unit(torch.cat([*(p[0][:, :each] for p in parts), common[0]], 1))
    vh = unit(torch.cat([*(p[2][:each] for p in parts), common[2]]))
    return (u @ vh) * torch.cat([*(p[1][:each] for p in parts), common[1]]).mean()


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of the better of two runs, and the result."""
    best = float("inf")
    for _ in range(2):
        begun = time.perf_counter()
        made = work()
        best = min(best, time.perf_counter() - begun)
    return best, made


def main(shapes: list[tuple[int, int]]) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{TASKS} task vectors, float64, one thread")
    print(f"{'shape':>12s}  {'method':8s} {'ours':>9s} {'full SVD':>9s} {'faster':>7s} {'difference':>11s}")
    for rows, columns in shapes:
        deltas = task_vectors(rows, columns)
        for reference in (tsvm, iso_c, iso_cts):
            method = registry.get(reference.__name__).make({}, count=TASKS)
            ours, found = timed(lambda: method.merge(deltas.clone()))  # type: ignore[attr-defined]  # noqa: B023
            theirs, expected = timed(lambda: reference(deltas))  # noqa: B023
            difference = float((found - expected).norm() / expected.norm())
            name = f"{rows}x{columns}"
            print(
                f"{name:>12s}  {reference.__name__:8s} {ours:8.2f}s {theirs:8.2f}s {theirs / ours:6.1f}x {difference:11.1e}",
                flush=True,
            )


if __name__ == "__main__":
    given = [(int(a), int(b)) for a, b in (word.split("x") for word in sys.argv[1:])]
    main(given or list(SHAPES))
