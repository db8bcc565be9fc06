"""The search: presets first, then a sampler's proposals, each a live merge; the best on the search half wins.

Trials lie in a SQLite file beside the results (Optuna's own storage), so that an interrupted search goes on where it
stopped, with the same proposals: the sampler's seed of a trial is (seed, number), whatever happened before.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geomerge.errors import RunError, UsageError
from geomerge.search.space import FIRST, Schedule, preset, space

if TYPE_CHECKING:
    from geomerge.search.objective import Judge, Measured
    from geomerge.search.study import Study

STORAGE = "trials.sqlite3"
RESULT = "search.json"
RECIPE = "best.yml"


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        number: In the order of evaluation, the presets first.
        name: The preset's, or ``trial``.
        point: Its place in the space; empty for a schedule outside of it.
        schedule: Its schedule.
        value, parts: Its score on the search half.
        blend, score: Seconds to blend it and to score it.
    """

    number: int
    name: str
    point: Mapping[str, float]
    schedule: Schedule
    value: float
    parts: Mapping[str, float]
    blend: float
    score: float


@dataclass(frozen=True)
class Held:
    """A model's score on the half that the search never saw."""

    name: str
    value: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        study: The study.
        trials: All candidates, in order.
        best: Index of the winner among them.
        best_preset: Index of the best preset.
        held_out: Scores of the winner, the best preset, and the parents, on the held-out half.
        optimism: The winner's score on the search half minus that on the held-out half.
        difference: Winner minus best preset on the held-out half, paired by sample, with a 95 % interval.
        recipe: The winner's recipe.
        stopped: Why the search ended: ``budget``, ``time`` or ``interrupted``.
        blocks: Blocks of the models.
    """

    study: Study
    trials: tuple[Trial, ...]
    best: int
    best_preset: int
    held_out: tuple[Held, ...]
    optimism: float
    difference: tuple[float, float, float]
    recipe: str
    stopped: str
    blocks: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``search.json``."""
        return {
            "format": 1,
            "kind": "search",
            "study": asdict(self.study),
            "trials": [asdict(t) for t in self.trials],
            "best": self.best,
            "best_preset": self.best_preset,
            "held_out": [asdict(h) for h in self.held_out],
            "optimism": self.optimism,
            "difference": dict(zip(("value", "low", "high"), self.difference, strict=True)),
            "recipe": self.recipe,
            "stopped": self.stopped,
            "blocks": self.blocks,
            "importance": importance(self.trials),
        }


Progress = Callable[[Trial, Trial, int, float | None], None]
"""Told after each trial: it, the best so far, trials in all (0: no limit), seconds left (if known)."""


def search(
    study: Study | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    judge: Judge | None = None,
    allow_pickle: bool = False,
) -> Found:
    """Search a merge's coefficients.

    Args:
        study: What to search: a study, or its file.
        out: Directory for the trials, the winning recipe and the results.
        resume: Go on with the trials that lie there.
        progress: See `Progress`.
        judge: Scores candidates, in place of the study's objective.
        allow_pickle: Read pickled weights (weights only).

    Raises:
        UsageError: The place is taken, or the study there is another one.
        ModelError: A parent cannot be used.
        RunError: No candidate could be scored.
    """
    from geomerge.search.objective import make_judge
    from geomerge.search.study import Study, load_study

    if isinstance(study, str | Path):
        study = load_study(study)
    if not isinstance(study, Study):
        raise UsageError(f"a study is a Study or a file's path, not {type(study).__name__}")
    folder = Path(out)
    if (folder / STORAGE).exists() and not resume:
        raise UsageError("a search lies there already", where=str(folder), hint="go on with it with --resume")
    if folder.exists() and not folder.is_dir():
        raise UsageError("the place is taken by a file", where=str(folder))
    return _Search(study, folder, judge or make_judge(study), progress, allow_pickle).run()


class _Search:
    def __init__(self, study: Study, folder: Path, judge: Judge, progress: Progress | None, allow_pickle: bool) -> None:
        from geomerge.engine.adapted import open_model
        from geomerge.engine.live import LiveMerge
        from geomerge.recipe.references import parse_reference
        from geomerge.recipe.values import NOWHERE

        self.study, self.folder, self.judge, self.progress = study, folder, judge, progress
        self.space = space(study.space)
        # Opened before anything else asks for them: a path that is not there is then said to be that.
        opened = {p: open_model(parse_reference(p, NOWHERE), allow_pickle=allow_pickle) for p in study.parents}
        self.module = judge.load(study.parents[0])
        calibrate = getattr(judge, "calibrate", None)
        if calibrate is not None:
            calibrate([judge.load(parent) for parent in study.parents])
        self.live = LiveMerge(opened, self.module)
        self.blocks = self._blocks()
        self._blend(preset("global"))  # whatever is wrong with the parents shows here, before anything is written
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trials = self._open()
        self.deadline = math.inf if study.minutes is None else time.monotonic() + 60 * study.minutes

    def run(self) -> Found:
        stopped = "budget"
        begun, done = time.monotonic(), len(self.trials)
        try:
            while self.study.trials is None or len(self.trials) < max(self.study.trials, 1):
                if time.monotonic() > self.deadline and len(self.trials) >= 1:
                    stopped = "time"
                    break
                self._next()
                self._tell(begun, done)
        except KeyboardInterrupt:
            if not self.trials:
                raise
            stopped = "interrupted"
        return self._conclude(stopped)

    # -- trials --------------------------------------------------------------------------------------------------------

    def _open(self) -> list[Trial]:
        """The study in its file, and the trials that lie there."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna = optuna.create_study(
            study_name="geomerge",
            storage=f"sqlite:///{self.folder / STORAGE}",
            direction="maximize",
            load_if_exists=True,
        )
        said = json.loads(json.dumps(asdict(self.study)))
        fixed = {k: v for k, v in said.items() if k not in ("trials", "minutes")}
        known = self.optuna.user_attrs.get("study")
        if known is not None and known != fixed:
            changed = ", ".join(k for k in fixed if known.get(k) != fixed[k])
            raise UsageError(
                f"the search that lies there is another one: {changed} differ",
                where=str(self.folder),
                hint="use another --out",
            )
        self.optuna.set_user_attr("study", fixed)
        rows = [*self.optuna.user_attrs.get("outside", [])]
        rows += [t.user_attrs["trial"] for t in self.optuna.get_trials(deepcopy=False) if "trial" in t.user_attrs]
        return [Trial(**row) for row in sorted(rows, key=lambda row: row["number"])]

    def _next(self) -> None:
        """Evaluate the next candidate and keep it."""
        number = len(self.trials)
        name = FIRST[number] if number < len(FIRST) else "trial"
        point = self.space.point(name) if name != "trial" else None
        if name != "trial" and point is None:
            trial = self._evaluate(number, name, {}, preset(name))
            self.optuna.set_user_attr("outside", [*self.optuna.user_attrs.get("outside", []), asdict(trial)])
        else:
            state: Mapping[str, Any] = {}
            if point is None:
                point, state = self._ask(number)
            trial = self._evaluate(number, name, point, self.space.schedule(point, self.blocks))
            self._record(trial, state)
        self.trials.append(trial)

    def _ask(self, number: int) -> tuple[dict[str, float], Mapping[str, Any]]:
        """The sampler's proposal, and what it wants to remember with it.

        It is asked in a copy of the study, so that a proposal whose evaluation was cut short leaves nothing behind.
        """
        import optuna

        copy = optuna.create_study(direction="maximize", sampler=self._sampler(number))
        copy.add_trials(self.optuna.get_trials(deepcopy=False))
        asked = copy.ask(self._distributions())
        return {key: float(value) for key, value in asked.params.items()}, copy.trials[-1].system_attrs

    def _record(self, trial: Trial, state: Mapping[str, Any]) -> None:
        from optuna.trial import create_trial

        self.optuna.add_trial(
            create_trial(
                params=dict(trial.point),
                distributions=self._distributions(),
                value=trial.value if math.isfinite(trial.value) else -1e9,  # one that broke is the worst there is
                user_attrs={"trial": asdict(trial)},
                system_attrs=dict(state),
            )
        )

    def _distributions(self) -> dict[str, Any]:
        from optuna.distributions import FloatDistribution

        return {key: FloatDistribution(low, high) for key, (low, high) in self.space.box.items()}

    def _sampler(self, number: int) -> Any:
        """A sampler whose draws depend on the seed, the trial's number and the trials before it."""
        import warnings

        from optuna import samplers

        seed = int(np.random.SeedSequence([self.study.seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "experimental": which is the maintainers' to say, not our user's to read
            if self.study.sampler == "gp":
                return samplers.GPSampler(seed=seed, n_startup_trials=len(FIRST), deterministic_objective=True)
            if self.study.sampler == "cmaes":
                start = self.space.point("H") or {k: (a + b) / 2 for k, (a, b) in self.space.box.items()}
                sigma = 0.2 * min(b - a for a, b in self.space.box.values())
                return samplers.CmaEsSampler(x0=start, sigma0=sigma, seed=seed, n_startup_trials=len(FIRST), popsize=8)
            return samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=len(FIRST) + 2)

    def _evaluate(self, number: int, name: str, point: Mapping[str, float], schedule: Schedule) -> Trial:
        begun = time.perf_counter()
        self._blend(schedule)
        blended = time.perf_counter()
        measured = self.judge.measure(self.module, "search")
        end = time.perf_counter()
        return Trial(number, name, point, schedule, measured.value, measured.parts, blended - begun, end - blended)

    def _blend(self, schedule: Schedule) -> None:
        from geomerge.recipe import loads

        self.live.blend(loads(self.study.recipe_text(schedule), ""))

    def _blocks(self) -> int:
        from geomerge import anatomy

        first = next(iter(self.live.parents.values()))
        return max(anatomy.read(first.shapes, first.config).depth.values(), default=1)

    def _tell(self, begun: float, before: int) -> None:
        if self.progress is None:
            return
        done = len(self.trials) - before
        left = (
            None
            if self.study.trials is None
            else (time.monotonic() - begun) / done * (self.study.trials - len(self.trials))
        )
        if self.deadline < math.inf:
            rest = max(self.deadline - time.monotonic(), 0.0)
            left = rest if left is None else min(left, rest)
        self.progress(self.trials[-1], _best(self.trials), self.study.trials or 0, left)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _conclude(self, stopped: str) -> Found:
        best = _best(self.trials)
        if not math.isfinite(best.value):
            raise RunError(
                "no candidate could be scored", where=str(self.folder), hint="do the parents work by themselves?"
            )
        best_preset = _best([t for t in self.trials if t.name != "trial"])
        held: dict[str, Measured] = {}
        for name, trial in (("best", best), (f"preset {best_preset.name}", best_preset)):
            self._blend(trial.schedule)
            held[name] = self.judge.measure(self.module, "held_out")
        for parent in self.study.parents:
            held[parent] = self.judge.measure(self.judge.load(parent), "held_out")
        winner, rival = list(held.values())[:2]
        found = Found(
            study=self.study,
            trials=tuple(self.trials),
            best=best.number,
            best_preset=best_preset.number,
            held_out=tuple(Held(name, m.value, m.parts) for name, m in held.items()),
            optimism=best.value - winner.value,
            difference=paired(winner, rival, seed=self.study.seed),
            recipe=self.study.recipe_text(best.schedule),
            stopped=stopped,
            blocks=self.blocks,
        )
        (self.folder / RECIPE).write_text(found.recipe, "utf-8")
        (self.folder / RESULT).write_text(json.dumps(found.to_dict(), indent=1) + "\n", "utf-8")
        return found


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda t: (t.value if math.isfinite(t.value) else -math.inf, -t.number))


def paired(one: Measured, other: Measured, *, seed: int) -> tuple[float, float, float]:
    """The difference of two mean-over-tasks scores with a 95 % interval, samples resampled in pairs within each task."""
    from scipy import stats

    names = list(one.samples)
    differences = [one.samples[n] - other.samples[n] for n in names]
    value = float(np.mean([d.mean() for d in differences]))
    if all((d == d[0]).all() for d in differences):
        return value, value, value

    def statistic(*parts: Any, axis: int = -1) -> Any:
        return sum(p.mean(axis=axis) for p in parts) / len(parts)

    found = stats.bootstrap(
        differences, statistic, n_resamples=2000, method="percentile", vectorized=True, rng=np.random.default_rng(seed)
    )
    return value, float(found.confidence_interval.low), float(found.confidence_interval.high)


def importance(trials: Sequence[Trial], seed: int = 0) -> dict[str, float]:
    """The share of each number in the objective's variance (fANOVA, Hutter et al. 2014); empty with few trials."""
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    inside = [t for t in trials if t.point and math.isfinite(t.value)]
    if len(inside) < 8 or len({t.value for t in inside}) == 1:
        return {}
    keys = list(inside[0].point)
    box = {k: FloatDistribution(min(t.point[k] for t in inside), max(t.point[k] for t in inside)) for k in keys}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for t in inside:
        study.add_trial(optuna.trial.create_trial(params=dict(t.point), distributions=box, value=t.value))
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
    return {key: float(found.get(key, 0.0)) for key in keys}
