"""The study file: which merge to search, how candidates are judged, and how much it may cost.

parents: [./instruct, ./maths]      # the first is at coefficient 0
objective:
  tasks: [lab:skills]               # whatever `geomerge evaluate --tasks` takes
  # text: [general.txt, maths.txt]  # or plain text: one file for each parent's domain
space: six_scalars                  # or anchors:5, or global
budget: {trials: 28, minutes: 20}
sampler: tpe                        # or gp, cmaes
seed: 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from geomerge.errors import RecipeError, UsageError, did_you_mean

SAMPLERS = ("tpe", "gp", "cmaes")
DEFAULT_TRIALS = 28


@dataclass(frozen=True)
class Objective:
    """How a candidate is judged: the mean over tasks, or the likelihood of texts.

    Attributes:
        tasks: Task names as for `geomerge.evaluate`.
        text: UTF-8 files, one for each domain.
        limit: At most so many samples of each task in each half.
    """

    tasks: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Study:
    """A study file's content; see this module's text."""

    parents: tuple[str, ...]
    objective: Objective
    method: str = "layer_adaptive_slerp"
    space: str = "six_scalars"
    trials: int | None = DEFAULT_TRIALS
    minutes: float | None = None
    sampler: Literal["tpe", "gp", "cmaes"] = "tpe"
    seed: int = 0
    dtype: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def recipe_text(self, schedule: Mapping[str, Any]) -> str:
        """The YAML of a candidate's recipe."""
        import io

        from ruamel.yaml import YAML

        data: dict[str, Any] = {
            "merge_method": self.method,
            "base_model": self.parents[0],
            "models": [{"model": p} for p in self.parents[1:]],
            "schedule": _rounded(schedule),
            **({"dtype": self.dtype} if self.dtype else {}),
            "guardrails": "off",
            **self.recipe,
        }
        out = io.StringIO()
        writer = YAML(typ="safe", pure=True)
        writer.default_flow_style = None
        writer.sort_base_mapping_type_on_output = False
        writer.width = 120
        writer.dump(data, out)
        return out.getvalue()


def _rounded(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Coefficients to six digits: what a merge can feel, and a person can read."""
    return {
        key: [round(v, 6) for v in value]
        if isinstance(value, list)
        else round(value, 6)
        if isinstance(value, float)
        else value
        for key, value in schedule.items()
    }


def load_study(path: str | Path) -> Study:
    """Read a study file.

    Raises:
        RecipeError: It cannot be read, is not YAML, or says something that cannot be; the message has the line.
    """
    from geomerge.recipe.document import Table, plain, read_documents, read_text

    text = read_text(Path(path), str(path))
    documents = read_documents(text, str(path))
    if len(documents) != 1 or not isinstance(documents[0], Table):
        raise RecipeError(
            "a study file is one mapping", where=str(path), hint="with the keys parents, objective, budget"
        )
    table = documents[0]
    lines = {key: str(where) for key, (where, _) in table.entries.items()}
    return make_study(plain(table), lines, str(path))


def make_study(data: Any, lines: Mapping[str, str] | None = None, where: str = "study") -> Study:
    """A study from plain data.

    Args:
        data: As in a study file.
        lines: Where its keys stand.
        where: What to say for the others.

    Raises:
        RecipeError: Something in it cannot be.
    """

    def refuse(key: str, what: str, hint: str | None = None) -> RecipeError:
        return RecipeError(what, where=(lines or {}).get(key, where), hint=hint)

    keys = ("parents", "objective", "method", "space", "budget", "sampler", "seed", "dtype", "recipe")
    for key in data:
        if key not in keys:
            raise refuse(key, f"a study has no key {key!r}", did_you_mean(str(key), keys))
    parents = data.get("parents")
    if not isinstance(parents, list) or len(parents) < 2 or not all(isinstance(p, str) and p for p in parents):
        raise refuse("parents", "a study needs `parents`: a list of at least two models")
    if len(set(parents)) != len(parents):
        raise refuse("parents", "a parent is listed twice")
    found: dict[str, Any] = {"parents": tuple(parents), "objective": _objective(data.get("objective"), refuse)}
    if "budget" in data:
        found |= _budget(data["budget"], refuse)
    if "sampler" in data:
        if data["sampler"] not in SAMPLERS:
            raise refuse(
                "sampler", f"there is no sampler {data['sampler']!r}", did_you_mean(str(data["sampler"]), SAMPLERS)
            )
        found["sampler"] = data["sampler"]
    if "seed" in data:
        if isinstance(data["seed"], bool) or not isinstance(data["seed"], int) or data["seed"] < 0:
            raise refuse("seed", f"'seed' must be a whole number, not {data['seed']!r}")
        found["seed"] = data["seed"]
    if "space" in data:
        from geomerge.search.space import space

        try:
            space(str(data["space"]))
        except UsageError as error:
            raise refuse("space", error.what, error.hint) from None
        found["space"] = str(data["space"])
    for key in ("method", "dtype"):
        if data.get(key) is not None:
            found[key] = str(data[key])
    if "recipe" in data:
        if not isinstance(data["recipe"], dict):
            raise refuse("recipe", "'recipe' must be a mapping of further recipe keys")
        own = {"merge_method", "models", "base_model", "schedule", "slices", "modules"} & set(data["recipe"])
        if own:
            raise refuse("recipe", f"the study itself sets {min(own)!r}", "remove it from 'recipe'")
        found["recipe"] = data["recipe"]
    study = Study(**found)
    _check_recipe(study, refuse)
    return study


def _check_recipe(study: Study, refuse: Any) -> None:
    """Refuse what no candidate's recipe could say, at the study's own lines."""
    from geomerge.checkpoint.dtypes import parse_dtype
    from geomerge.methods import registry
    from geomerge.recipe import loads
    from geomerge.search.space import preset

    for key, check in (("method", registry.get), ("dtype", parse_dtype)):
        value = getattr(study, key)
        if value is not None:
            try:
                check(value)
            except UsageError as error:
                raise refuse(key, error.what, error.hint) from None
    try:
        loads(study.recipe_text(preset("global")), "")
    except RecipeError as error:
        raise refuse("recipe" if study.recipe else "method", error.what, error.hint) from None


def _objective(said: Any, refuse: Any) -> Objective:
    if isinstance(said, str):
        said = {"tasks": [said]}
    if not isinstance(said, dict) or not (bool(said.get("tasks")) ^ bool(said.get("text"))):
        raise refuse(
            "objective", "a study needs an `objective` with either `tasks` or `text`", "as in {tasks: [lab:skills]}"
        )
    for key in said:
        if key not in ("tasks", "text", "limit"):
            raise refuse(
                "objective", f"an objective has no key {key!r}", did_you_mean(str(key), ("tasks", "text", "limit"))
            )
    several = {}
    for key in ("tasks", "text"):
        value = said.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise refuse("objective", f"the objective's {key!r} must be a list of names")
        several[key] = tuple(value)
    limit = said.get("limit")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise refuse("objective", f"the objective's 'limit' must be a positive whole number, not {limit!r}")
    return Objective(several["tasks"], several["text"], limit)


def _budget(said: Any, refuse: Any) -> dict[str, Any]:
    if isinstance(said, int) and not isinstance(said, bool):
        said = {"trials": said}
    if not isinstance(said, dict) or not said or set(said) - {"trials", "minutes"}:
        raise refuse("budget", "the budget must be a number of trials, or a mapping with `trials` and `minutes`")
    trials, minutes = said.get("trials"), said.get("minutes")
    if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
        raise refuse("budget", f"the budget must allow at least one trial, not {trials!r}")
    if minutes is not None and (isinstance(minutes, bool) or not isinstance(minutes, int | float) or not minutes > 0):
        raise refuse("budget", f"the budget's minutes must be a positive number, not {minutes!r}")
    return {"trials": trials, "minutes": None if minutes is None else float(minutes)}
