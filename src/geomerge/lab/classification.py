"""A classification task: a shared backbone, and a frozen head that belongs to the task and is never merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from geomerge.errors import UsageError
from geomerge.lab.kinds import SPLITS, Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

Data = Callable[[Split], "tuple[Tensor, Tensor]"]
"""Inputs ``(samples, ...)`` in float32 and labels ``(samples,)`` of a split."""

Features = Callable[["nn.Module", "Tensor"], "Tensor"]
"""From a backbone and inputs to features ``(samples, width)``."""


@dataclass(frozen=True)
class Labelled:
    """One sample.

    Attributes:
        image: The input (for the suite mlp a vector).
        label: The index of its class.
    """

    image: Tensor
    label: int


@dataclass(frozen=True)
class ClassificationTask:
    """A task of a suite with heads; see `geomerge.lab.kinds.LabTask`.

    Attributes:
        classes: The names of the classes.
        head: The file of the frozen head, with ``weight`` ``(classes, width)`` and, perhaps, ``bias``.
        data: Makes a split.
        features: Runs a backbone.
    """

    name: str
    suite: str
    kind: str
    title: str
    version: str
    classes: tuple[str, ...]
    data: Data = field(repr=False)
    features: Features = field(repr=False)
    head: Path | None = None

    @property
    def chance(self) -> float:
        return 1 / len(self.classes)

    def tensors(self, split: Split, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a split, or of its first `limit` samples.

        Raises:
            UsageError: There is no such split.
        """
        if split not in SPLITS:
            raise UsageError(f"there is no split {split!r}", hint=f"there are: {', '.join(SPLITS)}")
        inputs, labels = self.data(split)
        return inputs[:limit], labels[:limit]

    def examples(self, split: Split, limit: int | None = None) -> Sequence[Labelled]:
        """The samples of a split, the same ones at every call."""
        inputs, labels = self.tensors(split, limit)
        return [Labelled(image, int(label)) for image, label in zip(inputs, labels)]

    def logits(self, model: nn.Module, inputs: Tensor, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """Logits ``(samples, classes)`` of a batch; differentiable in the backbone's weights.

        Args:
            model: The backbone.
            inputs: A batch.
            head: What `load_head` gave, so that it need not be read for every batch.
        """
        from torch.nn import functional

        first = next(model.parameters())
        features = self.features(model, inputs.to(first.device, first.dtype)).float()
        weight, bias = head or self.load_head()
        moved = None if bias is None else bias.to(features.device)
        return functional.linear(features, weight.to(features.device), moved)

    def load_head(self) -> tuple[Tensor, Tensor | None]:
        """The frozen head's weight and bias.

        Raises:
            UsageError: The task was made without its head's file.
        """
        from safetensors.torch import load_file

        if self.head is None:
            raise UsageError(f"the task {self.name!r} has no head", hint="take tasks from a suite that has been built")
        tensors = load_file(str(self.head))
        return tensors["weight"].float(), tensors["bias"].float() if "bias" in tensors else None

    def correct(
        self, model: nn.Module, split: Split = "test", limit: int | None = None, batch_size: int = 256
    ) -> NDArray[np.bool_]:
        """Whether the largest logit is the label's, for each sample in the split's order."""
        import numpy as np

        _, labels = self.tensors(split, limit)
        scores = self._all_logits(model, split, limit, batch_size)
        return np.asarray((scores.argmax(-1) == labels).numpy(), dtype=np.bool_)

    def nll(
        self, model: nn.Module, split: Split = "test", limit: int | None = None, batch_size: int = 256
    ) -> NDArray[np.float64]:
        """The negative log-likelihood of each sample's label, in nats."""
        import numpy as np
        from torch.nn import functional

        _, labels = self.tensors(split, limit)
        scores = self._all_logits(model, split, limit, batch_size)
        return np.asarray(functional.cross_entropy(scores.double(), labels, reduction="none").numpy(), dtype=np.float64)

    def _all_logits(self, model: nn.Module, split: Split, limit: int | None, batch_size: int) -> Tensor:
        import torch

        inputs, _ = self.tensors(split, limit)
        head = self.load_head()
        training = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad():
                parts = [self.logits(model, batch, head).cpu() for batch in torch.split(inputs, batch_size)]
        finally:
            for module, mode in training.items():
                module.training = mode
        return torch.cat(parts) if parts else torch.zeros(0, len(self.classes))
