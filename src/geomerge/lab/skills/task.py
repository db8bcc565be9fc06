"""One skill as a task of the lab: see `geomerge.lab.kinds.LabTask`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from geomerge.errors import UsageError
from geomerge.lab.kinds import SPLITS, Split
from geomerge.lab.skills.generators import Question, questions
from geomerge.lab.skills.language import IGNORED, encode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

TITLES = {
    "instruction": "keep exactly to a format (as IFEval)",
    "reasoning": "several symbolic steps (as BBH)",
    "arithmetic": "add numbers (as MATH)",
    "choice": "pick the right answer among look-alikes (as GPQA)",
    "story": "follow who has what (as MuSR)",
    "recall": "know many things (as MMLU-Pro)",
    "domain": "know an invented field",
}

CHANCE = {"choice": 1 / 3, "story": 1 / 3, "recall": (1 / 8 + 1 / 6 + 1 / 8) / 3, "domain": 1 / 6}
"""What somebody gets who has understood the question and knows nothing."""


@dataclass(frozen=True)
class SkillTask:
    """Questions of one skill at the hard level.

    Attributes:
        counts: Questions of each split, in `SPLITS`' order.
    """

    name: str
    seed: int
    version: str
    counts: tuple[int, int, int, int]
    suite: str = "skills"
    kind: str = "causal-lm"

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def chance(self) -> float:
        return CHANCE.get(self.name, 0.0)

    def examples(self, split: Split, limit: int | None = None) -> Sequence[Question]:
        """The questions of a split, the same ones at every call.

        Raises:
            UsageError: There is no such split.
        """
        if split not in SPLITS:
            raise UsageError(f"there is no split {split!r}", hint=f"there are: {', '.join(SPLITS)}")
        return questions(self.name, "hard", self.seed, split, self.counts[SPLITS.index(split)])[:limit]

    def correct(
        self, model: nn.Module, split: Split = "test", limit: int | None = None, batch_size: int = 256
    ) -> NDArray[np.bool_]:
        """Whether greedy generation gives the answer and nothing but the answer.

        All characters are predicted in one pass over question and true answer: greedy generation gives the same answer exactly
        when each of these predictions is right.
        """
        import numpy as np

        parts = []
        for logits, labels in self._passes(model, split, limit, batch_size):
            right = (logits.argmax(-1) == labels) | (labels == IGNORED)
            parts.append(right.all(1).cpu().numpy())
        return np.concatenate(parts)

    def nll(
        self, model: nn.Module, split: Split = "test", limit: int | None = None, batch_size: int = 256
    ) -> NDArray[np.float64]:
        """The negative log-likelihood of each answer, in nats."""
        import numpy as np
        from torch.nn import functional

        parts = []
        for logits, labels in self._passes(model, split, limit, batch_size):
            each = functional.cross_entropy(
                logits.double().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            parts.append(each.view(labels.shape).sum(1).cpu().numpy())
        return np.concatenate(parts)

    def _passes(
        self, model: nn.Module, split: Split, limit: int | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and labels of the tokens after the first, batch by batch."""
        import torch

        encoded = encode(self.examples(split, limit))
        device = next(model.parameters()).device
        training = {module: module.training for module in model.modules()}
        try:
            model.eval()
            for rows in torch.split(torch.arange(len(encoded)), batch_size):
                batch = encoded.batch(rows)
                with torch.no_grad():
                    logits = model(input_ids=batch.ids.to(device)).logits[:, :-1].float()
                yield logits, batch.labels[:, 1:].to(device)
        finally:
            for module, mode in training.items():
                module.training = mode

    def write_lm_eval(self, folder: Path, split: Split = "test", limit: int | None = None) -> str:
        """Write the questions and a task file for lm-eval; returns the task's name there.

        Args:
            folder: The directory, to be given as ``--include``; made if need be.
            split: Which questions.
            limit: At most so many.
        """
        name = f"lab_{self.suite}_{self.name}"
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / f"{name}.jsonl"
        rows = (json.dumps({"prompt": q.prompt, "answer": q.answer}) for q in self.examples(split, limit))
        data.write_text("\n".join(rows) + "\n", encoding="utf-8")
        longest = max(len(q.answer) for q in self.examples(split, limit))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["."], "max_gen_toks": longest + 2, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")
        return name
