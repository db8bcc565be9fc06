"""Spectral methods against the same mathematics with full singular value decompositions, as the published code does it.

    python benchmarks/spectral.py [--spectrum slow|power|noise] [--rounds N] [--methods tsvm,iso_c] [ROWSxCOLUMNS …]
    python benchmarks/spectral.py --layers    # all weights of a layer of two models together
    python benchmarks/spectral.py --cores 2   # several weights of each shape, as a merge makes them
    python benchmarks/spectral.py --pieces    # what decompositions cost, in products of two square matrices

By default all methods on 768x768 768x3072 3072x768 1536x1536. Both sides work on the same float64 task vectors on one thread,
in turns; what counts is the median of each side's processor seconds, which other work on the machine disturbs least. With
``--cores N`` there are twice as many weights of each shape, and what counts is the seconds until all are done: ours are made N
side by side, each by one thread; the others one after the other, with N of torch's threads each.

A task vector's spectrum: ``slow``, 1/√i for a quarter of the rank over a floor of noise; ``power``, 1/i to the last; ``noise``,
that of independent elements, the worst case for whatever looks for leading directions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from geomerge.engine.memory import keep_freed_memory
from geomerge.methods import eigen, registry, roots
from geomerge.methods.direct import Function
from geomerge.methods.linalg import one_thread

TASKS = 8
SHAPES = ("768x768", "768x3072", "3072x768", "1536x1536")
LAYERS = {
    "ViT-B": {"768x768": 4, "3072x768": 1, "768x3072": 1},
    "Qwen2.5-0.5B": {"896x896": 2, "128x896": 2, "4864x896": 2, "896x4864": 1},
}
"""The weights of a layer of the models that most papers merge, and of a language model."""

EQUAL = 1e-4
"""The largest difference of results, relative to their norm, of the same method."""

VALUES: dict[str, Any] = {"lore": {"sweeps": 1}}
"""What is not the default: one round of what many are alike."""


def task_vectors(rows: int, columns: int, spectrum: str, weight: int = 0) -> Tensor:
    """Random task vectors."""
    torch.manual_seed(rows * columns + weight)
    short = min(rows, columns)
    made = torch.randn(TASKS, rows, columns, dtype=torch.float64)
    if spectrum == "noise":
        return made * 1e-4
    rank, power = (short // 4, -0.5) if spectrum == "slow" else (short, -1.0)
    strength = torch.arange(1, rank + 1, dtype=torch.float64) ** power
    made *= 0.1 if spectrum == "slow" else 0.0
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


def resm(deltas: Tensor) -> Tensor:
    """RESM: TSV-Merge of task vectors that their outliers' mass weighs."""
    sizes = deltas.abs().flatten(1)
    outliers = sizes > (sizes.mean(1) + 3 * sizes.std(1, correction=0))[:, None]
    mass = (sizes * outliers).sum(1)
    return tsvm(deltas * (len(deltas) * mass / mass.sum())[:, None, None])


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


def low(matrix: Tensor, share: float) -> Tensor:
    """The nearest matrix of lower rank."""
    u, s, vh = svd(matrix)
    k = int(share * len(s) + 1e-9)
    return (u[:, :k] * s[:k]) @ vh[:k]


def twin(deltas: Tensor) -> Tensor:
    """Twin-Merging with a tenth of the rank."""
    shared = 0.3 * deltas.sum(0)
    merged = shared.clone()
    for delta in deltas:
        merged += low(delta - shared, 0.1) / len(deltas)
    return merged


def knots(deltas: Tensor) -> Tensor:
    """KnOTS-TIES."""
    u, s, vh = svd(torch.cat(list(deltas), 1))
    coordinates = list((s[:, None] * vh).split(deltas.shape[2], dim=1))
    ties = Function(registry.get("ties"))
    return u @ ties(torch.zeros_like(coordinates[0]), coordinates, weight=1.0, density=0.2, top_k="kth_inclusive")


def svd_compress(deltas: Tensor) -> Tensor:
    """Task vectors of a tenth of the rank, added up."""
    return torch.stack([low(delta, 0.1) for delta in deltas]).sum(0)


def lore(deltas: Tensor) -> Tensor:
    """A round of LoRE-Merging."""
    base = deltas.mean(0)
    merged = base.clone()
    for delta in deltas:
        u, s, vh = svd(delta - base)
        merged += (u * (s - 0.005).clamp(min=0.0)) @ vh
    return merged


def timed(
    sides: tuple[Callable[[Tensor], Tensor], ...], weights: list[Tensor], rounds: int, cores: int
) -> tuple[list[float], list[Tensor]]:
    """The median seconds of each side, run in turns, and its first result. Each gets task vectors that it may change."""
    seconds: list[list[float]] = [[] for _ in sides]
    made: list[Tensor] = []
    clock = time.thread_time if cores == 1 else time.perf_counter
    for _ in range(rounds):
        made = []
        for ours, (side, times) in zip((True, False), zip(sides, seconds, strict=True), strict=True):
            own = [deltas.clone() for deltas in weights]
            begun = clock()
            made.append((together if ours and cores > 1 else one_by_one)(side, own, cores)[0])
            times.append(clock() - begun)
    return [statistics.median(times) for times in seconds], made


def one_by_one(side: Callable[[Tensor], Tensor], weights: list[Tensor], cores: int) -> list[Tensor]:
    """As a loop over a model's weights does it."""
    torch.set_num_threads(cores)
    return [side(deltas) for deltas in weights]


def together(side: Callable[[Tensor], Tensor], weights: list[Tensor], cores: int) -> list[Tensor]:
    """As the engine does it."""
    with one_thread(), ThreadPoolExecutor(cores) as pool:
        return list(pool.map(side, weights))


def pieces(rounds: int = 5) -> None:
    """Print what decompositions of square matrices cost in products of two such, and each routine of LAPACK in ours."""

    def seconds(work: Callable[[], object]) -> float:
        work()
        return statistics.median(seconds_of(work) for _ in range(rounds))

    call, resolvents, spent = eigen._call, roots._resolvents, defaultdict[str, float](float)

    def timed_call(library: str, name: str, *arguments: object) -> None:
        begun = time.thread_time()
        call(library, name, *arguments)
        spent[name] += time.thread_time() - begun

    def timed_resolvents(*given: Any) -> tuple[Tensor, Tensor]:
        begun = time.thread_time()
        made = resolvents(*given)
        spent[f"{len(given[2])} systems"] += time.thread_time() - begun
        return made

    for n in (768, 1536):
        delta = task_vectors(n, n, "slow").sum(0)
        square = eigen.gram(delta)
        product = seconds(lambda: delta @ delta)  # noqa: B023
        works: dict[str, Callable[[], object]] = {
            "svd": lambda: svd(delta),  # noqa: B023
            "torch's eigh": lambda: torch.linalg.eigh(square),  # noqa: B023
            "all eigenvectors": lambda: eigen.eigh(square),  # noqa: B023
            "an eighth": lambda: eigen.eigh(square, n // 8),  # noqa: B023
            "a fortieth": lambda: eigen.eigh(square, n // 40),  # noqa: B023
            "Gram matrix": lambda: eigen.gram(delta),  # noqa: B023
            "inverse root": lambda: root(square),  # noqa: B023
            "symmetric": lambda: eigen.symmetric_product(square, delta, first=True),  # noqa: B023
            "Cholesky": lambda: torch.linalg.cholesky(square + torch.eye(n, dtype=torch.float64)),  # noqa: B023
        }
        print(f"n = {n}, a product {product * 1e3:.0f} ms:", flush=True)
        print("  ", ", ".join(f"{name} {seconds(work) / product:.1f}" for name, work in works.items()), flush=True)
        eigen._call = timed_call
        roots._resolvents = timed_resolvents
        for name in ("all eigenvectors", "inverse root"):
            spent.clear()
            whole = sum(seconds_of(works[name]) for _ in range(rounds))
            parts = {**spent, "the rest": whole - sum(spent.values())}
            said = ", ".join(f"{part} {total / rounds / product:.1f}" for part, total in parts.items())
            print(f"   of {name}: {said}", flush=True)
        eigen._call, roots._resolvents = call, resolvents


def root(square: Tensor) -> Tensor:
    """The inverse square root of a Gram matrix."""
    form = eigen.tridiagonal(square)
    made = roots.inverse_root(form) if form else None
    assert made is not None
    return made


def seconds_of(work: Callable[[], object]) -> float:
    """Processor seconds."""
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def main() -> None:
    """Print the table."""
    references = (tsvm, resm, iso_c, iso_cts, twin, knots, svd_compress, lore)
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--spectrum", choices=("slow", "power", "noise"), default="slow")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pieces", action="store_true")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--methods", default=",".join(reference.__name__ for reference in references))
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a merge does
    eigen.eigh(torch.eye(1024, dtype=torch.float64))  # loads what is loaded once
    if given.pieces:
        pieces()
        return
    amount = "one weight, one thread" if given.cores == 1 else f"{2 * given.cores} weights, {given.cores} cores"
    print(f"{TASKS} task vectors, spectrum {given.spectrum}, float64, {amount}")
    print(f"{'shape':>12s}  {'method':12s} {'ours':>9s} {'full SVD':>9s} {'faster':>7s} {'difference':>11s}")
    shapes = dict.fromkeys(shape for layer in LAYERS.values() for shape in layer) if given.layers else given.shapes
    seconds = defaultdict[str, dict[str, list[float]]](dict)
    worst = 0.0
    for name in shapes:
        rows, columns = (int(side) for side in name.split("x"))
        count = 1 if given.cores == 1 else 2 * given.cores
        weights = [task_vectors(rows, columns, given.spectrum, i) for i in range(count)]
        for reference in (r for r in references if r.__name__ in given.methods.split(",")):
            method = registry.get(reference.__name__).make(VALUES.get(reference.__name__, {}), count=TASKS)
            sides = method.merge, reference  # type: ignore[attr-defined]
            taken, (found, expected) = timed(sides, weights, given.rounds, given.cores)
            seconds[reference.__name__][name] = taken
            apart = float((found - expected).norm() / expected.norm())
            row(name, reference.__name__, taken, f" {apart:11.1e}")
            worst = max(worst, apart)
    for name, layer in LAYERS.items() if given.layers else ():
        for method_name, taken_by in seconds.items():
            sums = [sum(count * taken_by[shape][side] for shape, count in layer.items()) for side in (0, 1)]
            row(name, method_name, sums)
    if worst > EQUAL:
        sys.exit(f"results differ by {worst:.1e} of their norm; the same method gives the same to {EQUAL:.0e}")


def row(name: str, method: str, seconds: list[float], more: str = "") -> None:
    """Print a row of the table."""
    ours, theirs = seconds
    print(f"{name:>12s}  {method:12s} {ours:8.2f}s {theirs:8.2f}s {theirs / ours:6.1f}x{more}", flush=True)


if __name__ == "__main__":
    main()
