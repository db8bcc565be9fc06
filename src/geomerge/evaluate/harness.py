"""lm-evaluation-harness, used as a library: find tasks, run them on a loaded model, hand out per-sample outcomes.

It is imported when one of its tasks is asked for, never before: that takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from geomerge.errors import DataError, GeomergeError, ModelError, UsageError, did_you_mean
from geomerge.evaluate.models import Model, evaluating
from geomerge.evaluate.samples import Link, hash_text
from geomerge.evaluate.task import Settings, Tick

_BATCH = 8
_FEWSHOT_SEED = 1234
"""The harness's own default, so that few-shot prompts are those that others get."""

_EXTRAS = {"langdetect": "ifeval", "immutabledict": "ifeval", "nltk": "ifeval", "math-verify": "math", "sympy": "math"}
"""The harness's extra that brings a package."""


@dataclass(frozen=True)
class Loaded:
    """Tasks of the harness.

    Attributes:
        tasks: The leaf tasks by name.
        weighted: Whether a group's score is the mean over all samples and not over its tasks.
        metric: The metric that the group is about, if it says so.
    """

    tasks: dict[str, Any]
    weighted: bool
    metric: str | None


@dataclass(frozen=True)
class Record:
    """One sample of one leaf task.

    Attributes:
        outcomes: What the harness computed, by metric.
        hash: Of the question, the prompt and the answer.
        choices: How many answers there were to choose from, 0 when they were free.
    """

    outcomes: dict[str, Any]
    hash: str
    choices: int


@dataclass(frozen=True)
class Outcome:
    """One sample's value in a form that can be averaged: Σ weight·value / Σ weight, then `link`."""

    value: float
    weight: float
    link: Link


def harness() -> ModuleType:
    """The package.

    Raises:
        UsageError: It is not installed.
    """
    # The harness and its libraries send nothing home and fetch nothing that no task names.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import lm_eval
    except ImportError as error:
        raise UsageError(
            f"tasks of lm-eval need the package lm_eval ({error})", hint="pip install 'geomerge[eval]'"
        ) from None
    found: ModuleType = lm_eval
    return found


def harness_version() -> str:
    """The installed version, without importing it; empty when there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _manager(include: tuple[Path, ...], defaults: bool) -> Any:
    harness()
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=[str(path) for path in include], include_defaults=defaults)


def load(name: str, include: Sequence[Path], *, defaults: bool = True) -> Loaded:
    """Load a task, a group or a tag with its data.

    Args:
        name: As the harness calls it.
        include: Directories of task files, looked through first.
        defaults: Whether to go on to the harness's own tasks, whose index takes more than ten seconds.

    Raises:
        UsageError: There is no such task, or it needs a package that is missing.
        DataError: Its data cannot be had.
    """
    manager = _manager(tuple(include), False) if include else None
    if manager is None or name not in manager.task_index:
        if not defaults:
            raise UsageError(
                f"there is no task {name!r}", hint=did_you_mean(name, manager.all_tasks if manager else ())
            )
        manager = _manager(tuple(include), True)
    if name not in manager.task_index:
        raise UsageError(
            f"there is no task {name!r}",
            hint=did_you_mean(name, [*manager.all_tasks, "skills", "glyphs", "mlp", "leaderboard"])
            or "a lab suite, a task of lm-eval, leaderboard, perplexity:FILE, classification:DIR or FILE.py:FUNCTION",
        )
    try:
        with quiet():
            found = manager.load([name])
    except GeomergeError:
        raise
    except ModuleNotFoundError as error:
        extra = next((extra for word, extra in _EXTRAS.items() if word in str(error)), None)
        needed = str(error).partition(" is required")[0]
        hint = "install it" if extra is None else f"pip install 'lm_eval[{extra}]'"
        raise UsageError(f"the task {name!r} needs a package: {needed}", hint=hint) from None
    except Exception as error:  # noqa: BLE001 - data sets fail in as many ways as there are file formats
        raise _no_data(name, manager, error) from None
    tasks: dict[str, Any] = found["tasks"]
    if not tasks:
        raise UsageError(f"the group {name!r} has no tasks")
    for task in tasks.values():
        task.set_fewshot_seed(_FEWSHOT_SEED)
    group = found.get("groups", {}).get(name)
    aggregates = (group.aggregate_metric_list if group is not None else None) or []
    first = aggregates[0] if aggregates else None
    weighted = bool(getattr(first, "weight_by_size", True)) if group is not None else len(tasks) == 1
    return Loaded(tasks, weighted, str(first.metric) if first is not None else None)


def _no_data(name: str, manager: Any, error: Exception) -> GeomergeError:
    """What to say when a task's data cannot be loaded."""
    entry = manager.task_index.get(name)
    config = (entry.cfg if entry is not None else None) or {}
    place = config.get("dataset_path")
    said = str(error).strip().splitlines()
    first = said[0] if said else type(error).__name__
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files:
        listed = files.values() if isinstance(files, dict) else [files] if isinstance(files, str) else files
        gone = [str(f) for f in listed if not Path(str(f)).exists()]
        hint = f"there is no {gone[0]}" if gone else f"its data_files: {files}"
        return DataError(f"the data of the task {name!r} cannot be loaded: {first}", hint=hint)
    offline = next(
        (v for v in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(v, "0") not in ("0", "")), None
    )
    data = f"the data set {place!r} of" if place else "the data of"
    if offline is not None:
        return DataError(
            f"{data} the task {name!r} is not in the local cache, and {offline} is set ({first})",
            hint=f"unset {offline} to download it, or set HF_HOME to the cache of a machine that has it",
        )
    return DataError(
        f"{data} the task {name!r} cannot be had: {first}",
        hint="without a network set HF_HOME to a cache that holds it; for data behind terms accept them and set HF_TOKEN",
    )


def run(model: Model, loaded: Loaded, settings: Settings, tick: Tick) -> tuple[dict[str, list[Record]], dict[str, Any]]:
    """Run tasks on a model.

    Args:
        model: Loaded as a causal language model.
        loaded: The tasks.
        settings: `Settings.limit` counts for each leaf task.
        tick: See `geomerge.evaluate.task.Tick`.

    Returns:
        The samples of each leaf task, and the harness's own results by leaf task and ``metric,filter``.

    Raises:
        ModelError: The model cannot be used.
        UsageError: The task cannot be run.
    """
    package = harness()
    module, tokenizer = model.causal_lm(settings), model.tokenizer(settings)
    if not hasattr(module, "config"):
        raise ModelError("tasks of lm-eval need a transformers model", where=model.name)
    with quiet(), evaluating(module):
        adapter = _adapter()(module, tokenizer, settings.batch(_BATCH), tick)
        try:
            found = package.evaluate(
                adapter,
                task_dict={"tasks": loaded.tasks, "groups": {}, "group_map": {}},
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
            )
        except ValueError as error:
            first = str(error).splitlines()[0] if str(error) else "ValueError"
            raise UsageError(f"lm-eval refuses: {first}", where=", ".join(loaded.tasks)) from None
    records = {}
    for name, samples in found["samples"].items():
        kept = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        chosen = loaded.tasks[name].OUTPUT_TYPE == "multiple_choice"
        records[name] = [
            Record(
                {metric: sample[metric] for metric in sample["metrics"]},
                hash_text(name, sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]),
                len(sample["arguments"]) if chosen else 0,
            )
            for sample in sorted(kept, key=lambda s: s["doc_id"])
        ]
    results = {name: {k.split(",")[0]: v for k, v in reversed(row.items())} for name, row in found["results"].items()}
    return records, results


@functools.cache
def _adapter() -> Any:
    """The harness's adapter for transformers models, made silent and given our progress."""
    from lm_eval.models.huggingface import HFLM

    class Adapter(HFLM):  # type: ignore[misc, unused-ignore]
        """A loaded module as the harness wants it."""

        def __init__(self, module: Any, tokenizer: Any, batch_size: int, tick: Tick) -> None:
            super().__init__(pretrained=module, tokenizer=tokenizer, batch_size=batch_size)
            self._tick, self._done, self._requests = tick, 0, 0

        def _begin(self, requests: Sequence[Any]) -> None:
            self._done, self._requests = 0, max(len(requests), 1)

        def _advance(self, rows: int) -> None:
            self._done += rows
            self._tick(min(self._done / self._requests, 1.0))

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self._begin(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_call(inps, *args, **kwargs)
            self._advance(len(inps))
            return found

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_generate(context, *args, **kwargs)
            self._advance(len(context))
            return found

    return Adapter


def outcome(metric: str, found: Any) -> Outcome | None:
    """One sample's value from what the harness gives for a metric, or `None` when it cannot be averaged."""
    if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        likelihood, length = (float(part) for part in found)
        scale = math.log(2) if metric == "bits_per_byte" else 1.0
        return Outcome(-likelihood / length / scale, length, "mean" if metric == "bits_per_byte" else "exp")
    if isinstance(found, list):
        return Outcome(sum(map(float, found)) / len(found), len(found), "mean") if found else None
    try:
        value = float(found)
    except (TypeError, ValueError):
        return None
    return Outcome(-value, 1.0, "exp") if metric == "perplexity" else Outcome(value, 1.0, "mean")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness and its libraries say nothing on stderr: bars, advice, and warnings about what we decided."""
    names = ("lm_eval", "datasets", "transformers", "huggingface_hub", "evaluate", "accelerate")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
