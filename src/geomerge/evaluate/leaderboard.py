"""``leaderboard``: the six tasks of the Open LLM Leaderboard v2 with its own normalisation, so that figures compare with
published tables (which are in percent).

Of each sub-task the accuracy of guessing is subtracted and the rest rescaled, s = max(0, (a − 1/n) / (1 − 1/n)) with n answers
to choose from; a task is the mean of its sub-tasks:

    BBH        acc_norm, each of 24 sub-tasks with its own n       MuSR      acc_norm, 3 sub-tasks with n = 2, 5, 3
    GPQA       acc_norm over all questions, n = 4                  MMLU-Pro  acc, n = 10
    IFEval     mean of the strict accuracies by prompt and by instruction, as they are
    MATH-hard  exact match over all problems of level 5, as it is

The leaderboard's average is the mean of the six.

Reference:
    https://huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomerge.errors import UsageError, did_you_mean
from geomerge.evaluate import harness
from geomerge.evaluate.lm_eval_tasks import from_records
from geomerge.evaluate.models import Model
from geomerge.evaluate.samples import Samples
from geomerge.evaluate.task import Settings, Tick

NAME = "leaderboard"

BBH_CHOICES: Mapping[str, int] = {
    "boolean_expressions": 2,
    "causal_judgement": 2,
    "date_understanding": 6,
    "disambiguation_qa": 3,
    "formal_fallacies": 2,
    "geometric_shapes": 11,
    "hyperbaton": 2,
    "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3,
    "movie_recommendation": 6,
    "navigate": 2,
    "object_counting": 19,
    "penguins_in_a_table": 5,
    "reasoning_about_colored_objects": 18,
    "ruin_names": 6,
    "salient_translation_error_detection": 6,
    "snarks": 2,
    "sports_understanding": 2,
    "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3,
    "web_of_lies": 2,
}
MUSR_CHOICES: Mapping[str, int] = {"murder_mysteries": 2, "object_placements": 5, "team_allocation": 3}
GPQA_CHOICES, MMLU_PRO_CHOICES = 4, 10


@dataclass(frozen=True)
class _Part:
    """How one of the six is put together.

    Attributes:
        group: The harness's name.
        harness_metric: The outcome that counts.
        metric: What it is called here.
        choices: By the leaf tasks' names; a single number for all samples pooled; `None` for no baseline.
    """

    group: str
    harness_metric: str
    metric: str
    choices: Mapping[str, int] | int | None


PARTS: Mapping[str, _Part] = {
    "ifeval": _Part("leaderboard_ifeval", "prompt_level_strict_acc", "strict_accuracy", None),
    "bbh": _Part(
        "leaderboard_bbh",
        "acc_norm",
        "normalised_accuracy",
        {f"leaderboard_bbh_{name}": n for name, n in BBH_CHOICES.items()},
    ),
    "math_hard": _Part("leaderboard_math_hard", "exact_match", "exact_match", None),
    "gpqa": _Part("leaderboard_gpqa", "acc_norm", "normalised_accuracy", GPQA_CHOICES),
    "musr": _Part(
        "leaderboard_musr",
        "acc_norm",
        "normalised_accuracy",
        {f"leaderboard_musr_{name}": n for name, n in MUSR_CHOICES.items()},
    ),
    "mmlu_pro": _Part("leaderboard_mmlu_pro", "acc", "normalised_accuracy", MMLU_PRO_CHOICES),
}
"""In the order of the leaderboard's own columns."""


@dataclass(frozen=True)
class LeaderboardTask:
    """One of the six tasks.

    Attributes:
        part: Its key in `PARTS`.
    """

    part: str

    source = NAME
    higher_is_better = True

    @property
    def name(self) -> str:
        return f"{NAME}/{self.part}"

    @property
    def version(self) -> str:
        return hashlib.sha256(f"1 {harness.harness_version()}".encode()).hexdigest()[:16]

    @property
    def metric(self) -> str:
        return PARTS[self.part].metric

    @property
    def chance(self) -> float | None:
        return None if self.part == "ifeval" else 0.0

    @functools.cached_property
    def _loaded(self) -> harness.Loaded:
        folder = Path(str(harness.harness().__file__)).parent / "tasks" / NAME
        return harness.load(PARTS[self.part].group, [folder], defaults=False)

    def prepare(self, settings: Settings) -> None:
        """Load the data."""
        assert self._loaded

    def score(self, model: Model, settings: Settings, tick: Tick) -> Samples:
        """See `geomerge.evaluate.task.Task`."""
        records, _ = harness.run(model, self._loaded, settings, tick)
        return put_together(self.part, records)


def put_together(part: str, records: dict[str, list[harness.Record]]) -> Samples:
    """The samples of one of the six tasks, whose score is the leaderboard's.

    Args:
        part: A key of `PARTS`.
        records: By leaf task.

    Raises:
        UsageError: The harness has a sub-task that this version does not know.
    """
    found = PARTS[part]
    if part == "ifeval":
        return _ifeval(records)
    if not isinstance(found.choices, Mapping):
        made = from_records(records, found.harness_metric, pooled=True, name=part)
        return _rescaled(made, [0.0 if found.choices is None else 1 / found.choices])
    for leaf in records:
        if leaf not in found.choices:
            raise UsageError(f"lm-eval's {found.group} has a sub-task {leaf!r} whose number of answers is not known")
    made = from_records(records, found.harness_metric, pooled=False, name=part)
    return _rescaled(made, [1 / found.choices[leaf] for leaf in records])


def _rescaled(samples: Samples, baselines: list[float]) -> Samples:
    return Samples.of(
        samples.values, samples.hashes, weights=samples.weights, strata=samples.strata, baselines=baselines
    )


def _ifeval(records: dict[str, list[harness.Record]]) -> Samples:
    """Two columns: whether all of a prompt's instructions were followed, and which share of them, counted by instruction."""
    rows = [record for found in records.values() for record in found]
    values: list[list[float]] = []
    weights: list[list[float]] = []
    for row in rows:
        followed: list[Any] = row.outcomes["inst_level_strict_acc"]
        values.append([float(row.outcomes["prompt_level_strict_acc"]), sum(map(float, followed)) / len(followed)])
        weights.append([1.0, float(len(followed))])
    return Samples.of(values, (row.hash for row in rows), weights=weights)


def leaderboard_tasks(reference: str) -> list[LeaderboardTask]:
    """The tasks of ``leaderboard`` (all six) or ``leaderboard/bbh`` (one).

    Raises:
        UsageError: There is no such part.
    """
    _, slash, part = reference.partition("/")
    if not slash:
        return [LeaderboardTask(name) for name in PARTS]
    if part not in PARTS:
        raise UsageError(f"the leaderboard has no task {part!r}", hint=did_you_mean(part, PARTS))
    return [LeaderboardTask(part)]
