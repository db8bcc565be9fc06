"""Any task of `geomerge.evaluate` as a judge: half of its samples to search with, the other half held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geomerge.errors import UsageError
from geomerge.search.objective import Half, Measured

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn


class TaskJudge:
    """The mean over tasks; a sample's hash says which half it belongs to.

    Scores that are better when lower count negatively.
    """

    def __init__(self, tasks: Sequence[str], parent: str, limit: int | None) -> None:
        from geomerge.evaluate.references import find_tasks
        from geomerge.evaluate.task import Settings

        self._settings = Settings(limit=limit)
        self._tasks = find_tasks(list(tasks))
        self._parent = parent
        for task in self._tasks:
            task.prepare(self._settings)

    def load(self, path: str) -> nn.Module:
        from geomerge.evaluate.models import Model
        from geomerge.evaluate.task import random_state_kept

        model = Model("candidate", "model", reference=path)
        with random_state_kept():
            if any(task.source == "classification" for task in self._tasks):
                return model.image_classifier(self._settings)
            return model.causal_lm(self._settings)

    def measure(self, module: nn.Module, half: Half) -> Measured:
        from geomerge.evaluate.models import Model
        from geomerge.evaluate.samples import Samples
        from geomerge.evaluate.task import random_state_kept

        tokenizer = self._parent if Path(self._parent).exists() else None
        parts, samples = {}, {}
        for task in self._tasks:
            with random_state_kept():
                found = task.score(
                    Model("candidate", "model", module=module, tokenizer=tokenizer), self._settings, lambda share: None
                )
            mine = _in_half(found.hashes, half, task.name)
            sign = 1.0 if task.higher_is_better else -1.0
            chosen = Samples(
                found.values[mine],
                found.weights[mine],
                found.strata[mine],
                found.baselines,
                found.link,
                tuple(h for h, m in zip(found.hashes, mine, strict=True) if m),
            )
            parts[task.name] = sign * chosen.score()
            weight = np.maximum(chosen.weights.sum(1), 1e-12)
            samples[task.name] = sign * (chosen.values * chosen.weights).sum(1) / weight
        return Measured(sum(parts.values()) / len(parts), parts, samples)


def _in_half(hashes: Sequence[str], half: Half, task: str) -> NDArray[np.bool_]:
    """Which samples belong to a half, shape ``(samples,)``: those with even hashes are searched with.

    Raises:
        UsageError: There are no two different samples.
    """
    numbers = [int(h, 16) for h in hashes]
    if len(set(numbers)) < 2:
        raise UsageError(
            f"the task {task} needs at least 2 different samples, to hold some of them out",
            hint="give it more samples, or a larger limit",
        )
    even = np.array([number % 2 == 0 for number in numbers])
    if even.all() or not even.any():  # by chance, with few samples
        even ^= np.array([number == min(numbers) for number in numbers])
    return even if half == "search" else ~even
