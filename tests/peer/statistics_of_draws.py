"""Statistics of a random merge over many seeds, from which a test judges agreement in distribution.

For each tensor, with D the output minus the base and R the full task vector Σ w_k δ_k, a seed gives four numbers:

``kept``      the share of elements where D is not zero
``mean``      the mean of D
``square``    the mean of D²
``along``     ⟨D, R⟩ / ⟨R, R⟩: 1 when the method is unbiased

Stored are each number's mean and standard deviation over the seeds (so two implementations, run over seeds of their
own, can be compared by z-score), and for one expert ``kept_by_rank``: the share kept in each tenth of a row's ranks
of |δ|, from the smallest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

SEEDS = 40


def task_vectors(models: Path, recipe: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """The base, the weighted sum of task vectors in float64, and the number of experts of a plain recipe."""
    parsed = yaml.safe_load(recipe)
    load = lambda name: load_file(models.parent / name / "model.safetensors")  # noqa: E731
    start = load(parsed["base_model"])
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in start.items()}
    for entry in parsed["models"]:
        weights = load(entry["model"])
        for name, value in start.items():
            total[name] += entry["parameters"]["weight"] * (weights[name].double() - value.double())
    return start, total, len(parsed["models"])


def deciles(reference: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Kept share by tenth of the rank of |reference| in each row (a vector is one row)."""
    rows = reference.abs().reshape(-1, reference.shape[-1])
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1)
    tenth = (ranks * 10) // rows.shape[1]
    flags = kept.reshape(rows.shape).double()
    return torch.stack([flags[tenth == k].mean() if (tenth == k).any() else flags.new_tensor(-1.0) for k in range(10)])


def measure(run: Callable[[int], dict[str, torch.Tensor]], models: Path, recipe: str) -> dict[str, Any]:
    """Run the seeds 0..39 and summarise each tensor."""
    start, reference, experts = task_vectors(models, recipe)
    draws: dict[str, list[list[float]]] = {name: [] for name in start}
    ranks: dict[str, torch.Tensor] = {}
    for seed in range(SEEDS):
        for name, value in run(seed).items():
            delta, full = value.double() - start[name].double(), reference[name]
            power = float((full * full).sum())
            along = float((delta * full).sum()) / power if power else 0.0
            kept = delta != 0
            draws[name].append([float(kept.double().mean()), float(delta.mean()), float((delta**2).mean()), along])
            # Elements whose δ is zero show nothing: they count as they would look, never kept.
            ranks[name] = ranks.get(name, torch.zeros(10, dtype=torch.float64)) + deciles(full, kept) / SEEDS
    summary: dict[str, Any] = {}
    for name, rows in sorted(draws.items()):
        table = torch.tensor(rows, dtype=torch.float64)
        entry: dict[str, Any] = {"elements": reference[name].numel(), "moving": int((reference[name] != 0).sum())}
        for column, what in enumerate(("kept", "mean", "square", "along")):
            values = table[:, column]
            entry[what] = [float(f"{values.mean():.9g}"), float(f"{values.std():.6g}")]
        if experts == 1 and reference[name].shape[-1] >= 10:
            entry["kept_by_rank"] = [round(float(value), 6) for value in ranks[name]]
        summary[name] = entry
    return {"seeds": SEEDS, "tensors": summary}
