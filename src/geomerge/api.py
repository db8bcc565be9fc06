"""The Python face: the same verbs as the command line's, on paths, recipes and state dicts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomerge import anatomy
from geomerge.checkpoint import from_state_dict
from geomerge.diagnose.guarded import guarded_plan
from geomerge.engine.adapted import open_model
from geomerge.engine.plan import Plan
from geomerge.engine.run import Progress, Report, run_in_memory, run_plan
from geomerge.errors import UsageError
from geomerge.recipe import Pipeline, load, loads
from geomerge.recipe.references import parse_reference
from geomerge.recipe.values import NOWHERE

if TYPE_CHECKING:
    from torch import Tensor

    from geomerge.checkpoint import Checkpoint
    from geomerge.continual import Step

RecipeLike = str | Path | Pipeline
"""A recipe's path, its YAML text (anything with a line break), or what `load_recipe` returned."""


def load_recipe(recipe: RecipeLike, *, compat: str | None = None) -> Pipeline:
    """Read a recipe, geomerge's or mergekit's.

    Args:
        recipe: A path, or YAML text (recognised by a line break).
        compat: ``"mergekit"`` overrides what the recipe says.

    Raises:
        RecipeError: With the file and line.
        UsageError: `recipe` is of another type.
    """
    if isinstance(recipe, Pipeline):
        return recipe
    if not isinstance(recipe, str | os.PathLike):
        raise UsageError(
            f"a recipe is a path, YAML text, or what `load_recipe` returned, not {type(recipe).__name__}",
            hint="a mapping becomes text by `json.dumps(recipe, indent=1)`" if isinstance(recipe, Mapping) else None,
        )
    if isinstance(recipe, str) and "\n" in recipe:
        return loads(recipe, compat=compat)
    return load(recipe, compat=compat)


def plan(
    recipe: RecipeLike,
    *,
    compat: str | None = None,
    models: Mapping[str, Mapping[str, Tensor]] | None = None,
    allow_pickle: bool = False,
) -> Plan:
    """Resolve a recipe against its models without merging anything.

    Args:
        recipe: See `load_recipe`.
        compat: See `load_recipe`.
        models: State dicts by the name that the recipe uses.
        allow_pickle: Read pickled weights (weights only, no code is run).

    Raises:
        RecipeError: The recipe is wrong; the line is named.
        ModelError: A model cannot be used, or the models do not fit.
    """
    made, opened = _planned(recipe, compat, models, allow_pickle=allow_pickle)
    for checkpoint in opened:
        checkpoint.close()
    return made


def merge(
    recipe: RecipeLike | Plan,
    out: str | Path,
    *,
    compat: str | None = None,
    models: Mapping[str, Mapping[str, Tensor]] | None = None,
    allow_pickle: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Merge models into a model directory.

    Args:
        recipe: See `load_recipe`; or a plan.
        out: The directory to make. It appears whole or not at all.
        compat, models, allow_pickle: See `plan`.
        threads, device, resume, force, progress: See `geomerge.engine.run.run_plan`, as for further ``options``.

    Raises:
        GeomergeError: See `geomerge.errors`.
    """
    opened: list[Checkpoint] | None = None
    if not isinstance(recipe, Plan):
        recipe, opened = _planned(recipe, compat, models, allow_pickle=allow_pickle)
    return run_plan(
        recipe,
        out,
        inputs=opened,
        threads=threads,
        device=device,
        resume=resume,
        force=force,
        progress=progress,
        **options,
    )


def merge_state_dicts(
    recipe: RecipeLike,
    models: Mapping[str, Mapping[str, Tensor]] | None = None,
    *,
    compat: str | None = None,
    threads: int | None = None,
) -> dict[str, Tensor]:
    """Merge into a state dict in memory: bit for bit what `merge` writes.

    Args:
        recipe, compat: See `load_recipe`.
        models: State dicts by the name that the recipe uses; other names are paths or hub ids.
        threads: By default one for each core that the process may use.
    """
    made, opened = _planned(recipe, compat, models)
    return run_in_memory(made, opened, threads=threads)


def transplant(
    model: str | Path,
    donor: str | Path,
    out: str | Path,
    *,
    missing: str = "omp",
    sparsity: int = 64,
    pad_to: int | None = None,
    **options: Any,
) -> Report:
    """Give a model another one's tokenizer.

    Args:
        model: The model whose weights the output has.
        donor: The model whose tokenizer it gets.
        out: The directory to make.
        missing: What tokens that `model` lacks become: ``omp``, ``mean`` or ``zero``.
        sparsity: For ``omp``: the most of the model's own rows in a token's sum.
        pad_to: Pad the vocabulary to a multiple of this number.
        options: As for `merge`.

    Raises:
        GeomergeError: See `geomerge.errors`.
    """
    recipe = transplant_recipe(model, donor, missing=missing, sparsity=sparsity, pad_to=pad_to)
    return merge(loads(recipe, ""), out, **options)


def transplant_recipe(
    model: str | Path, donor: str | Path, *, missing: str = "omp", sparsity: int = 64, pad_to: int | None = None
) -> str:
    """The recipe of `transplant`, as YAML text."""
    lines = [
        "merge_method: passthrough",
        f"models: [{{model: {json.dumps(str(model))}}}]",
        "tokens:",
        f"  policy: {json.dumps(f'model:{donor}')}",
        f"  missing: {missing}",
    ]
    if missing == "omp":
        lines.append(f"  sparsity: {sparsity}")
    if pad_to is not None:
        lines.append(f"  pad_to: {pad_to}")
    return "\n".join(lines) + "\n"


def inspect(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """A model's anatomy as plain data: see `geomerge.anatomy.summary`. No weight is read.

    Raises:
        ModelError: The model cannot be opened.
    """
    ref = parse_reference(str(model), NOWHERE)
    with open_model(replace(ref, revision=revision or ref.revision)) as checkpoint:
        found = anatomy.read(checkpoint.shapes, checkpoint.config)
        return anatomy.summary(found, checkpoint.shapes, checkpoint.dtypes)


def _planned(
    recipe: RecipeLike,
    compat: str | None,
    models: Mapping[str, Mapping[str, Tensor]] | None,
    *,
    allow_pickle: bool = False,
) -> tuple[Plan, list[Checkpoint]]:
    return guarded_plan(load_recipe(recipe, compat=compat), models=_in_memory(models), allow_pickle=allow_pickle)


def _in_memory(models: Mapping[str, Mapping[str, Tensor]] | None) -> dict[str, Checkpoint]:
    models = {} if models is None else models
    if not isinstance(models, Mapping):
        raise UsageError(f"`models` is a mapping of names to state dicts, not {type(models).__name__}")
    for name, tensors in models.items():
        _check_state_dict(name, tensors)
    return {name: from_state_dict(tensors, name=name) for name, tensors in models.items()}


def _check_state_dict(name: object, tensors: object) -> None:
    """Refuse what maps no names to tensors."""
    from torch import Tensor

    if not isinstance(name, str):
        raise UsageError(f"the name of a model is text, not {name!r}")
    if not isinstance(tensors, Mapping):
        raise UsageError(
            f"a model in memory is a state dict, not {type(tensors).__name__}",
            where=name,
            hint="such as `module.state_dict()`",
        )
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise UsageError(
                f"a state dict maps names to tensors, not {key!r} to {type(tensor).__name__}",
                where=name,
                hint="such as `module.state_dict()`",
            )


def continue_merge(state: str | Path, experts: Sequence[str | Path] | str | Path, **options: Any) -> Step:
    """Take the next experts into a continual merge: see `geomerge.continual.continue_merge`, as for the ``options``."""
    from geomerge import continual

    return continual.continue_merge(state, experts, **options)
