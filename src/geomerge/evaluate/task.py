"""What a task is, and the settings that a score depends on."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from geomerge.evaluate.models import Model
    from geomerge.evaluate.samples import Samples

Tick = Callable[[float], None]
"""Told which share of the task is finished, 0 to 1."""


@dataclass(frozen=True)
class Settings:
    """How models are evaluated.

    Attributes:
        batch_size: Samples in one forward pass; `None` leaves it to the task.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (the checkpoint's own).
        device: Where to compute.
        limit: Only the first samples of every task (of every sub-task).
        seed: Of whatever a task draws at random, and of the bootstrap.
        chat_template: Put prompts of generative tasks into the model's chat template.
        trust_remote_code: Allow a model directory's own Python code to run.
    """

    batch_size: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    limit: int | None = None
    seed: int = 0
    chat_template: bool = False
    trust_remote_code: bool = False

    def batch(self, usual: int) -> int:
        """The batch size, or a task's usual one."""
        return self.batch_size or usual


class Task(Protocol):
    """Something that models are scored on.

    `name`, `source` and `version` are known at once. The rest may need the task's data and is asked for after `score`.

    Attributes:
        name: One word or path, unique among the tasks of an evaluation.
        source: What kind of task: see `geomerge.evaluate.scores.TaskRow`.
        version: A hash of all that its outcome depends on beside model and settings; `None` when that cannot be known,
            and then its scores are not cached.
        metric: ``accuracy``, ``perplexity``, ...
        higher_is_better: Whether it is.
        chance: What guessing gets, or `None`.
    """

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def version(self) -> str | None: ...
    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def chance(self) -> float | None: ...

    def prepare(self, settings: Settings) -> None:
        """Find the data; called before any model is loaded.

        Raises:
            DataError: It is not there, or damaged.
        """

    def score(self, model: Model, settings: Settings, tick: Tick) -> Samples:
        """Score one model. The caller has seeded the global generators, and restores them.

        Raises:
            ModelError: The model cannot be loaded, or cannot do this.
        """


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards the global generators of Python, NumPy and torch are as they were before."""
    import numpy as np
    import torch

    # numpy's legacy generator, which libraries use and seed.
    python, legacy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def seed_everything(seed: int) -> None:
    """Seed the global generators, so that no score depends on those before it; use inside `random_state_kept`."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
