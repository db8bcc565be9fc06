"""Greedy soup: average only what helps (Wortsman et al. 2022, Model soups, arXiv:2203.05482).

The models are sorted by their scores. The soup starts with the best; each of the others in turn is added if the average with it
scores at least as well. Averages are blended in memory; all scores but the last are taken on the search half of the samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from geomerge.errors import RunError, UsageError
from geomerge.methods.base import BaseUse, Method
from geomerge.methods.properties import IDENTICAL
from geomerge.search.run import Held, paired
from geomerge.search.study import Objective, Study

if TYPE_CHECKING:
    from geomerge.search.objective import Judge


@dataclass(frozen=True)
class GreedySoup(Method):
    """Average only what helps: models join the soup, best first, if its score does not fall.

    It needs a score, so it is a search and no method of a recipe; what it writes is a recipe of `linear`. Half of the samples
    play no part in the choice and say what it is worth; so a task's function has to return a value for each sample.
    """

    name: ClassVar[str] = "greedy_soup"
    title: ClassVar[str] = "Greedy soup"
    paper: ClassVar[str] = "Wortsman et al. 2022, Model soups, arXiv:2203.05482"
    formula: ClassVar[str] = "θ = Σ_{k∈S} θₖ / |S|,  k joins S if score(S ∪ {k}) ≥ score(S), in the order of score(θₖ)"
    when: ClassVar[str] = (
        "Several fine-tunes of one base on the same task (other seeds, learning rates, data orders), and held-out samples to "
        "score them by. For experts of different tasks the methods for task vectors are better."
    )
    family: ClassVar[str] = "search"
    models: ClassVar[tuple[int, int | None]] = (2, None)
    base_use: ClassVar[BaseUse] = "ignored"
    properties: ClassVar[frozenset[str]] = frozenset({IDENTICAL})
    example: ClassVar[str] = """\
geomerge soup ./seed-1 ./seed-2 ./seed-3 --tasks score.py:accuracy --merge ./soup
"""

    @classmethod
    def usage(cls) -> str:
        return "geomerge soup"


@dataclass(frozen=True)
class Tried:
    """A model and what became of it.

    Attributes:
        model: Its path.
        alone: Its own score on the search half.
        together: The score of the soup with it.
        kept: Whether it stayed.
    """

    model: str
    alone: float
    together: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """A greedy soup.

    Attributes:
        tried: All models, best first.
        held_out: On samples that played no part: the soup, the average of all, and the best model alone.
        difference: Soup minus best model, held out, paired by sample, with a 95 % interval.
        recipe: The soup's recipe.
    """

    tried: tuple[Tried, ...]
    held_out: tuple[Held, ...]
    difference: tuple[float, float, float]
    recipe: str

    @property
    def kept(self) -> tuple[str, ...]:
        """The models in the soup."""
        return tuple(t.model for t in self.tried if t.kept)


Progress = Callable[[Tried], None]
"""Told of each model what became of it."""


def greedy_soup(
    models: Sequence[str],
    objective: Objective,
    *,
    dtype: str | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    progress: Progress | None = None,
    allow_pickle: bool = False,
) -> Soup:
    """Find the soup.

    Args:
        models: Two or more fine-tunes of one architecture: paths or hub ids.
        objective: What a good model is.
        dtype: The soup's, in its recipe.
        seed: Of the interval's resampling.
        judge: Scores modules, in place of the objective.
        progress: See `Progress`.
        allow_pickle: Read pickled weights (weights only).

    Raises:
        UsageError: Fewer than two models, or one twice.
        ModelError: A model cannot be used.
        RunError: No model could be scored.
    """
    from geomerge.engine.live import LiveMerge
    from geomerge.recipe import loads
    from geomerge.search.objective import make_judge

    if len(models) < 2 or len(set(models)) != len(models):
        raise UsageError("a soup needs at least two models, each once")
    judge = judge or make_judge(Study(tuple(models), objective))
    module = judge.load(models[0])
    live = LiveMerge({m: m for m in models}, module, allow_pickle=allow_pickle)

    def recipe(chosen: Sequence[str]) -> str:
        lines = [f"# geomerge soup: {len(chosen)} of {len(models)} models", "merge_method: linear", "models:"]
        lines += [f"  - model: {json.dumps(m, ensure_ascii=False)}" for m in chosen]
        lines += ["parameters: {weight: 1.0}", *([f"dtype: {dtype}"] if dtype else [])]
        return "\n".join(lines) + "\n"

    def score(chosen: Sequence[str]) -> float:
        live.blend(loads(recipe(chosen), ""))
        return judge.measure(module, "search").value

    live.blend(loads(recipe(models), ""))  # whatever keeps them from being averaged shows here
    alone = {m: score([m]) for m in models}
    order = sorted(models, key=lambda m: math.inf if math.isnan(alone[m]) else -alone[m])
    soup, best = [order[0]], alone[order[0]]
    if math.isnan(best):
        raise RunError("no model could be scored", hint="do they work by themselves?")
    tried = [Tried(order[0], best, best, kept=True)]
    for model in order[1:]:
        together = score([*soup, model])
        kept = together >= best
        if kept:
            soup, best = [*soup, model], together
        tried.append(Tried(model, alone[model], together, kept))
        if progress is not None:
            progress(tried[-1])
    held = []
    for name, chosen in (("greedy soup", soup), ("average of all", list(models)), (order[0], order[:1])):
        live.blend(loads(recipe(chosen), ""))
        held.append((name, judge.measure(module, "held_out")))
    return Soup(
        tuple(tried),
        tuple(Held(name, m.value, m.parts) for name, m in held),
        paired(held[0][1], held[2][1], seed=seed),
        recipe(soup),
    )
