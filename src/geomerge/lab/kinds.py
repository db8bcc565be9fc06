"""What a suite is made of, and the table of suites.

A kind is one object. It trains models from nothing but its settings and a seed, and gives the tasks that score them;
where the models lie, when they are made and whether they are good enough is the business of `geomerge.lab.build`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from geomerge.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "validation", "test")

Tick = Callable[[int], None]
"""Told how many training steps are finished since the last call."""

KINDS: dict[str, str] = {
    "skills": "geomerge.lab.skills:KIND",
    "glyphs": "geomerge.lab.glyphs:KIND",
    "mlp": "geomerge.lab.mlp:KIND",
}
"""Where the object of each suite is; imported when it is asked for."""


class LabTask(Protocol):
    """One task of a suite.

    Attributes:
        name: One word, unique in the suite.
        suite: The suite's name.
        kind: ``causal-lm``, ``image-classification`` or ``mlp``.
        title: One line for people.
        chance: The accuracy of guessing.
        version: Changes when the data may have changed: generator's version, seed and sizes.
    """

    @property
    def name(self) -> str: ...
    @property
    def suite(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def chance(self) -> float: ...
    @property
    def version(self) -> str: ...

    def examples(self, split: Split, limit: int | None = None) -> Sequence[Any]:
        """The samples of a split, the same ones at every call."""

    def correct(
        self, model: nn.Module, split: Split = "test", limit: int | None = None, batch_size: int = 256
    ) -> NDArray[np.bool_]:
        """Whether each sample is answered correctly, in the split's order."""

    def nll(
        self, model: nn.Module, split: Split = "test", limit: int | None = None, batch_size: int = 256
    ) -> NDArray[np.float64] | None:
        """The negative log-likelihood of each sample's answer in nats, or `None` where that has no meaning."""


@dataclass(frozen=True)
class Requirement:
    """What makes a suite's experts worth merging, in accuracy (0 to 1).

    Attributes:
        gain: Every expert is better than the base on its own task by at least so much.
        gap: The plain average's mean over all tasks is below the experts' mean on their own by at least so much.
    """

    gain: float = 0.20
    gap: float = 0.05


class SuiteKind(Protocol):
    """One suite: its settings, its training, its tasks.

    Every `train_*` writes a whole model directory into `out_dir` (which exists and is empty), is a function of its
    arguments alone, and calls `tick` once for each finished step (or with how many).

    Attributes:
        name: As in `KINDS`.
        title: One line for people.
        kind: ``causal-lm``, ``image-classification`` or ``mlp``.
        sizes: The first is the default.
        others: Models beside base and experts, such as ``("instruct", "domain")``.
        has_heads: Whether the tasks have frozen heads, which `make_heads` writes.
        in_process: The models train in seconds: processes would cost more than they save.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def sizes(self) -> tuple[str, ...]: ...
    @property
    def others(self) -> tuple[str, ...]: ...
    @property
    def has_heads(self) -> bool: ...
    @property
    def in_process(self) -> bool: ...

    def requirement(self, size: str) -> Requirement:
        """What the score table has to show."""

    def settings(self, size: str) -> dict[str, Any]:
        """Everything that the models depend on beside the seed, as plain JSON data: a change makes new models."""

    def tasks(self, size: str, seed: int, heads: Mapping[str, Path] | None = None) -> dict[str, LabTask]:
        """The tasks by name, in the order of the tables.

        Args:
            size: One of `sizes`.
            seed: The suite's.
            heads: The file of each task's frozen head, if the suite has such; without them data can be had, not scores.
        """

    def steps(self, size: str) -> dict[str, int]:
        """Training steps for ``base``, each task and each of `others`, for the progress."""

    def train_base(self, size: str, seed: int, out_dir: Path, tick: Tick) -> None:
        """Train the base from random weights."""

    def train_expert(
        self, base_dir: Path, task: str, size: str, seed: int, out_dir: Path, tick: Tick, head: Path | None = None
    ) -> None:
        """Fine-tune the base on one task.

        Args:
            head: The task's frozen head, where the suite has heads.
        """

    def train_other(self, base_dir: Path, name: str, size: str, seed: int, out_dir: Path, tick: Tick) -> None:
        """Make one of `others` from the base."""

    def make_heads(self, base_dir: Path, size: str, seed: int, out_dir: Path) -> None:
        """Write ``TASK.safetensors`` for every task; called once, after the base and before the experts."""

    def load_model(self, path: Path) -> nn.Module:
        """A model of this suite in float32, in evaluation mode."""


def get_kind(name: str) -> SuiteKind:
    """The object of a suite.

    Raises:
        UsageError: There is no suite of this name.
    """
    if name not in KINDS:
        close = difflib.get_close_matches(name, KINDS, n=1)
        raise UsageError(
            f"there is no suite {name!r}",
            hint=f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(KINDS)}",
        )
    module, _, attribute = KINDS[name].partition(":")
    found: SuiteKind = getattr(importlib.import_module(module), attribute)
    return found


def check_size(kind: SuiteKind, size: str) -> None:
    """Refuse a size that a suite does not have.

    Raises:
        UsageError: It is none of `kind.sizes`.
    """
    if size not in kind.sizes:
        raise UsageError(f"the suite {kind.name!r} has no size {size!r}", hint=f"it has: {', '.join(kind.sizes)}")
