"""How a candidate is judged, on samples to search with and on others that the search never sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from geomerge.errors import ModelError, UsageError, did_you_mean, first_line
from geomerge.quietly import quiet_transformers

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from geomerge.search.study import Study

Half = Literal["search", "held_out"]
Samples = "NDArray[np.float64]"

WINDOW = 256
"""Tokens of text that are scored at a time."""


@dataclass(frozen=True)
class Measured:
    """A candidate's score.

    Attributes:
        value: The objective; higher is better.
        parts: Task or text → its score.
        samples: Task or text → one number for each sample, higher is better.
    """

    value: float
    parts: Mapping[str, float]
    samples: Mapping[str, NDArray[np.float64]]


class Judge(Protocol):
    """Scores modules."""

    def measure(self, module: nn.Module, half: Half) -> Measured:
        """Score a module; it and the global random state are left as they were."""

    def load(self, path: str) -> nn.Module:
        """The module of a model directory."""


class LabJudge:
    """The tasks of a lab suite: accuracy on the validation split, held out: the test split."""

    def __init__(self, names: Sequence[str], limit: int | None) -> None:
        from geomerge.lab.suite import load_suite

        reference, _, _ = names[0].removeprefix("lab:").partition("/")
        self._suite = load_suite(reference)
        tasks = self._suite.tasks()
        chosen = [name.removeprefix("lab:").partition("/") for name in names]
        if any(suite != reference for suite, _, _ in chosen):
            raise UsageError(
                "the tasks of one search come from one suite", hint=f"all from {reference}, or one task of it"
            )
        wanted = [task for _, _, task in chosen if task] or [t for t in tasks if t in self._suite.experts]
        for task in wanted:
            if task not in tasks:
                raise UsageError(f"the suite {reference} has no task {task!r}", hint=did_you_mean(task, tasks))
        self._tasks = {name: tasks[name] for name in wanted}
        self._limit = limit

    def load(self, path: str) -> nn.Module:
        return self._suite.load(Path(path))

    def measure(self, module: nn.Module, half: Half) -> Measured:
        split: Any = "validation" if half == "search" else "test"
        samples = {n: t.correct(module, split, self._limit).astype(np.float64) for n, t in self._tasks.items()}
        return _mean(samples)


class TextJudge:
    """The likelihood of texts, one for each domain, each measured against the parent that knows it best.

    J = −(1/D) Σ_d NLL_d(candidate) / min_parent NLL_d(parent), from windows of `WINDOW` tokens; every other window is held
    out. NLL is per token, so J is −1 for a candidate that is everywhere as good as the best parent.
    """

    def __init__(self, files: Sequence[str], parents: Sequence[str], limit: int | None) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(parents[0], local_files_only=Path(parents[0]).exists())
        except (OSError, ValueError) as error:
            raise ModelError(f"its tokenizer cannot be loaded: {first_line(error)}", where=parents[0]) from None
        self._windows: dict[str, dict[Half, list[list[int]]]] = {}
        for file in files:
            ids = tokenizer(_read_text(file), add_special_tokens=False, verbose=False)["input_ids"]
            cut = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
            windows = [w for w in cut if len(w) > 1]
            if len(windows) < 2:
                raise UsageError(
                    f"the text has {len(ids)} tokens; at least {WINDOW + 2} are needed to hold some of them out",
                    where=file,
                )
            self._windows[Path(file).stem] = {"search": windows[0::2][:limit], "held_out": windows[1::2][:limit]}
        self._best: dict[tuple[str, Half], float] = {}

    def load(self, path: str) -> nn.Module:
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with quiet_transformers():
                module: nn.Module = AutoModelForCausalLM.from_pretrained(
                    path, dtype=torch.float32, local_files_only=Path(path).exists()
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"it cannot be loaded as a causal language model: {first_line(error)}", where=path
            ) from None
        return module.eval()

    def calibrate(self, parents: Sequence[nn.Module]) -> None:
        """Find the best parent of each domain."""
        for name, halves in self._windows.items():
            for half, windows in halves.items():
                self._best[name, half] = min(float(_nll(parent, windows).mean()) for parent in parents)

    def measure(self, module: nn.Module, half: Half) -> Measured:
        samples = {}
        for name, halves in self._windows.items():
            samples[name] = -_nll(module, halves[half]) / self._best[name, half]
        return _mean(samples)


def _nll(module: nn.Module, windows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The mean negative log-likelihood of the tokens of each window, shape ``(windows,)``."""
    import torch
    from torch.nn import functional

    device = next(module.parameters()).device
    found = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window], device=device)
            logits = module(input_ids=ids).logits[0, :-1].float()
            found.append(functional.cross_entropy(logits, ids[0, 1:]).item())
    return np.array(found)


def _read_text(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the text cannot be read: {error.strerror}", where=file) from None
    except UnicodeDecodeError:
        raise UsageError("the text is not UTF-8", where=file) from None
    if not text.strip():
        raise UsageError("the text is empty", where=file)
    return text


def _mean(samples: Mapping[str, NDArray[np.float64]]) -> Measured:
    parts = {name: float(values.mean()) for name, values in samples.items()}
    value = sum(parts.values()) / len(parts)
    return Measured(value, parts, samples)


def make_judge(study: Study) -> Judge:
    """The judge that a study asks for.

    Raises:
        UsageError: A task or text that cannot be had.
    """
    wanted = study.objective
    if wanted.text:
        return TextJudge(wanted.text, study.parents, wanted.limit)
    from geomerge.evaluate.lab import is_lab

    if all(is_lab(name) for name in wanted.tasks):
        return LabJudge(wanted.tasks, wanted.limit)
    from geomerge.search.tasks import TaskJudge

    return TaskJudge(wanted.tasks, study.parents[0], wanted.limit)
