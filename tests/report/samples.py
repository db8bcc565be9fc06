"""Merged models and scores for the tests of reports: real merges of tiny models, scores computed from made-up answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

import geomerge
from cli_samples import TIES, write_models, write_recipe
from geomerge.evaluate import statistics
from geomerge.evaluate.scores import Mean, ModelRow, PairedRow, Score, Scores, SynergyRow, TaskRow

SLERP = """\
merge_method: slerp
base_model: {0}/a
models: [{{model: {0}/a}}, {{model: {0}/b}}]
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
    - {{value: 0.5}}
dtype: bfloat16
"""

TASKS = ("format", "symbols", "arithmetic", "facts", "story", "recall")


def merged(folder: Path, name: str = "slerp", recipe: str | None = None) -> Path:
    """A real merge of the two fine-tunes of `cli_samples.write_models`, made in `folder`."""
    if not (folder / "base").is_dir():
        write_models(folder)
    text = recipe or {"slerp": SLERP, "ties": TIES}[name]
    geomerge.merge(write_recipe(folder, text, f"{name}.yml"), folder / name)
    return folder / name


def scores(
    merges: Sequence[str] = ("merged",),
    parents: Sequence[str] = ("expert-a", "expert-b"),
    tasks: Sequence[str] = TASKS,
    *,
    base: str | None = "base",
    skill: float = 0.8,
    samples: int = 200,
    source: str = "out/",
) -> Scores:
    """Scores of made-up models: each parent is an expert in every so many tasks, the first merge is good at all of them."""
    roles: list[tuple[str, Literal["model", "parent", "base"]]] = [(m, "model") for m in merges]
    roles += [(p, "parent") for p in parents]
    roles += [(base, "base")] if base else []
    generator = np.random.default_rng(7)
    right: dict[tuple[str, str], np.ndarray] = {}
    for (i, (name, role)), (t, task) in itertools.product(enumerate(roles), enumerate(tasks)):
        own = role == "parent" and t % max(len(parents), 1) == i - len(merges)
        level = {"model": max(skill - 0.03 * i, 0.1) + 0.02 * (t % 3), "parent": 0.93 if own else 0.35, "base": 0.3}[
            role
        ]
        right[name, task] = generator.random(samples) < level
    value = {at: float(found.mean()) for at, found in right.items()}
    rows, paired, synergy, means = [], [], [], []
    for name, role in roles:
        for task in tasks:
            theirs = [value[p, task] for p in parents]
            half = 1.96 * (value[name, task] * (1 - value[name, task]) / samples) ** 0.5
            at = value[name, task]
            share = at / max(theirs) if theirs and max(theirs) else None
            rows.append(Score(name, task, at, max(at - half, 0), min(at + half, 1), share, 1.5))
            if role != "model":
                continue
            for parent in parents:
                gap = right[name, task].astype(float) - right[parent, task]
                arm = 1.96 * float(gap.std()) / samples**0.5
                middle = float(gap.mean())
                p = 0.0004 if abs(middle) > arm else 0.3
                paired.append(PairedRow(name, task, parent, middle, middle - arm, middle + arm, p, "mcnemar"))
            if theirs:
                s = statistics.synergy(theirs, at)
                synergy.append(SynergyRow(name, task, s.expected, s.delta, s.relative, s.improvement, s.diversity))
        average = sum(value[name, t] for t in tasks) / len(tasks)
        shares = [r.normalised for r in rows if r.model == name and r.normalised is not None]
        means.append(Mean(name, average, sum(shares) / len(shares) if shares else None))
    by = {m.model: m.value for m in means}
    for name in merges if parents else ():
        s = statistics.synergy([by[p] for p in parents], by[name])
        synergy.append(SynergyRow(name, "mean", s.expected, s.delta, s.relative, s.improvement, s.diversity))
    return Scores(
        models=tuple(
            ModelRow(n, source if r == "model" else n, f"{i:064x}", r, 400_000) for i, (n, r) in enumerate(roles)
        ),
        tasks=tuple(
            TaskRow(t, "lab:skills", "exact_match", True, 0.1, "1", samples, f"{i:064x}") for i, t in enumerate(tasks)
        ),
        scores=tuple(rows),
        means=tuple(means),
        paired=tuple(paired),
        synergy=tuple(synergy),
        settings={"batch_size": 32, "dtype": "float32", "limit": None, "seed": 0, "versions": {"torch": "2.13.0"}},
        made="2026-11-24T12:00:00Z",
    )
